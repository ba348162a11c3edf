//! `kiln kernel …`, with made-up kernels that no machine could boot.

mod common;

use std::path::PathBuf;

use common::Home;

/// A bzImage with nothing but a version in it, and what it takes for it to be known that nothing is missing: nothing.
fn kernel(home: &Home, version: &str) -> PathBuf {
    let mut image = vec![0; 0x1000];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
    let text = format!("{version} (someone) #1\0");
    image[0x500..0x500 + text.len()].copy_from_slice(text.as_bytes());
    let path = home.path().join(format!("kernel-{version}"));
    std::fs::create_dir_all(home.path()).unwrap();
    std::fs::write(&path, image).unwrap();
    path
}

#[test]
fn kernels_are_installed_listed_chosen_and_removed() {
    let home = Home::new();
    for (version, name) in [("6.9.1", None), ("6.10.2", None), ("6.1.5", Some("old"))] {
        let path = kernel(&home, version);
        let mut words = vec!["kernel", "install", "--from", path.to_str().unwrap()];
        words.extend(name.into_iter().flat_map(|name| ["--name", name]));
        assert_eq!(home.ok(words), name.unwrap_or(version));
    }
    assert_eq!(home.ok(["kernel", "ls", "-q"]), "6.10.2\n6.9.1\nold");
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    assert_eq!(home.ok(["kernel", "default"]), "6.10.2");
    assert_eq!(home.ok(["kernel", "default", "old"]), "old");
    let table = home.ok(["kernel", "ls"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..3], ["NAME", "VERSION", "ARCH"]);
    assert_eq!(lines[3][..4], ["old", "6.1.5", "x86_64", "path"]);
    assert_eq!(lines[3].last(), Some(&"default"));
    let rows: serde_json::Value =
        serde_json::from_str(&home.ok(["kernel", "ls", "--format", "json"])).unwrap();
    assert_eq!(rows[2]["name"], "old");
    assert_eq!((&rows[2]["default"], &rows[0]["default"]), (&true.into(), &false.into()));
    assert_eq!(rows[2]["source"]["kind"], "path");

    let refused = home.kiln(["kernel", "rm", "old"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("the kernel `old` is the default\nhint: "), "{refused:?}");
    assert_eq!(home.ok(["kernel", "rm", "--force", "old", "6.9.1"]), "old\n6.9.1");
    assert_eq!(home.ok(["kernel", "default"]), "6.10.2");
}

#[test]
fn without_a_kernel_the_command_that_installs_one_is_named() {
    let home = Home::new();
    let ended = home.kiln(["kernel", "default"]);
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.ends_with("hint: install one: kiln kernel install\n"), "{ended:?}");
    assert_eq!(home.ok(["kernel", "ls", "-q"]), "");
}

#[test]
fn what_is_no_kernel_is_an_error_that_says_so() {
    let home = Home::new();
    let path = kernel(&home, "6.1");
    std::fs::write(&path, "a text").unwrap();
    let ended = home.kiln(["kernel", "install", "--from", path.to_str().unwrap()]);
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("is not a Linux kernel for machines"), "{ended:?}");
    let ended = home.kiln(["kernel", "install", "--from", "host", "--from", "debian"]);
    assert_eq!(ended.code, 2, "{ended:?}");
}
