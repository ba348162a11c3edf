//! `kiln fs commit` and `kiln commit`: what of changes becomes an image, and from where.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::place::Place;
use common::{Home, IMAGE};

const BACKENDS: [&str; 2] = ["overlay", "fuse"];

/// Runs a shell in a directory of the host.
fn sh(directory: &Path, script: &str) {
    let ended = Command::new("sh").args(["-ec", script]).current_dir(directory).output().unwrap();
    assert!(ended.status.success(), "{script}: {}", String::from_utf8_lossy(&ended.stderr));
}

/// What an image shows.
fn paths(home: &Home, reference: &str) -> Vec<String> {
    let empty = home.beside("empty");
    fs::create_dir_all(&empty).unwrap();
    home.ok(["fs", "commit", "--from", empty.to_str().unwrap(), "-t", "empty"]);
    let all = home.ok(["fs", "diff", "empty", reference]);
    all.lines()
        .filter(|line| *line != "C /")
        .map(|line| line.strip_prefix("A ").unwrap().to_owned())
        .collect()
}

#[test]
fn equal_content_has_equal_digests_whenever_it_is_committed() {
    for place in Place::all() {
        for backend in BACKENDS {
            let at = match &place.user {
                Some(_) => "/kiln".to_owned(),
                None => place.beside("at").display().to_string(),
            };
            let script = format!(
                "cd {at}; mkdir -p opt/tool; echo text > opt/tool/text; echo more >> etc/passwd; rm etc/group; \
                 ln opt/tool/text opt/other; ln -s text opt/tool/link; {} fs commit",
                place.program()
            );
            let commit = |epoch: &str| {
                let words =
                    ["fs", "run", IMAGE, "-e", "--at", &at, "--backend", backend, "--", "sh", "-ec", &script];
                let mut command = place.command(&words);
                command.env("SOURCE_DATE_EPOCH", epoch);
                let ended = common::finish(command);
                assert_eq!(ended.code, 0, "{ended:?}");
                ended.stdout
            };
            let first = commit("1000000000");
            std::thread::sleep(std::time::Duration::from_millis(1100));
            assert_eq!(commit("1000000000"), first, "{backend}");
            assert_ne!(commit("1000000001"), first, "{backend}");
        }
    }
}

#[test]
fn a_source_date_that_is_none_is_refused() {
    let home = Home::new();
    fs::create_dir(home.beside("empty")).unwrap();
    let mut command = home.command(["fs", "commit", "--from", "empty"]);
    let ended = common::finish({
        command.env("SOURCE_DATE_EPOCH", "yesterday");
        command
    });
    assert!(ended.code == 1 && ended.stderr.contains("SOURCE_DATE_EPOCH is `yesterday`"), "{ended:?}");
}

#[test]
fn a_directory_and_its_tars_become_the_same_image() {
    let home = Home::new();
    let directory = home.beside("tool");
    fs::create_dir(&directory).unwrap();
    sh(
        &directory,
        "mkdir -p bin lib/deep; echo '#!/bin/sh' > bin/tool; chmod 755 bin/tool; head -c 100000 /dev/zero > lib/deep/zeros
         ln bin/tool bin/same; ln -s tool bin/link; touch -d @5000 lib/deep/zeros bin; chmod 750 lib
         tar --sort=name -cf ../tool.tar .; gzip -k ../tool.tar",
    );
    let commit = |words: &[&str], input: Option<&str>| {
        let mut command = home.command([&["fs", "commit"], words].concat());
        command.env("SOURCE_DATE_EPOCH", "1000000000");
        if let Some(input) = input {
            command.stdin(fs::File::open(home.beside(input)).unwrap());
        }
        let ended = common::finish(command);
        assert_eq!(ended.code, 0, "{ended:?}");
        ended.stdout.trim_end().to_owned()
    };
    let of_directory = commit(&["--from", "tool", "-t", "tool:dir"], None);
    commit(&["--from", "tool.tar", "-t", "tool:tar"], None);
    commit(&["--from", "-", "-t", "tool:stdin"], Some("tool.tar.gz"));
    let all = ["/bin", "/bin/link", "/bin/same", "/bin/tool", "/lib", "/lib/deep", "/lib/deep/zeros"];
    for tag in ["tool:dir", "tool:tar", "tool:stdin"] {
        assert_eq!(paths(&home, tag), all, "{tag}");
        assert_eq!(home.ok(["fs", "diff", "tool:dir", tag]), "", "{tag}");
    }
    // Later, with other times: the same, byte for byte.
    sh(&directory, "touch bin/tool lib; touch .; tar --sort=name -cf ../tool.tar .");
    assert_eq!(commit(&["--from", "tool"], None), of_directory);
    let config = home.json(["image", "inspect", "tool:dir"]).to_string();
    assert!(config.contains("2001-09-09T01:46:40Z") && !config.contains("2026"), "{config}");
    for (words, says) in [
        (&["fs", "commit", "--from", "none"][..], "cannot read none"),
        (&["fs", "commit", "--from", "tool", "-t", "A b"], "not an image name"),
        (&["fs", "commit", "--from", "tool", "--exclude", "["], "`[` cannot be used"),
        (&["fs", "commit", "--from", "tool", "--mask", "/"], "`/` cannot be used"),
        (&["fs", "commit", "--from", "tool", "--onto", "no/such"], "no such image"),
    ] {
        let ended = home.kiln(words);
        assert!(ended.code == 1 && ended.stderr.contains(says), "{words:?}: {ended:?}");
    }
    let not_both = home.kiln(["fs", "commit", "view", "--from", "tool"]);
    assert_eq!(not_both.code, 2, "{not_both:?}");
}

#[test]
fn patterns_and_masks_say_what_a_layer_has() {
    let home = Home::new();
    for (name, script) in [
        ("base", "mkdir -p bin lib; echo 1 > bin/a; echo 1 > bin/b; echo 1 > lib/c"),
        (
            "new",
            "mkdir -p bin lib/x; echo 2 > bin/a; echo 2 > lib/x/y.py; echo 2 > lib/x/y.pyc; echo 2 > top",
        ),
    ] {
        fs::create_dir(home.beside(name)).unwrap();
        sh(&home.beside(name), script);
    }
    sh(&home.beside("new"), "tar -cf ../new.tar .");
    home.ok(["fs", "commit", "--from", "base", "-t", "base"]);
    for from in ["new", "new.tar"] {
        let commit = |words: &[&str]| {
            home.ok([&["fs", "commit", "--from", from, "-t", "made"], words].concat());
            paths(&home, "made")
        };
        assert_eq!(
            commit(&["--include", "lib/**/*.py", "--include", "/top"]),
            ["/lib", "/lib/x", "/lib/x/y.py", "/top"]
        );
        assert_eq!(
            commit(&["--exclude", "**/*.pyc", "--exclude", "bin", "--exclude", "top"]),
            ["/lib", "/lib/x", "/lib/x/y.py"]
        );
        // A mask hides what is below, and what is new in its place.
        let masks = ["--onto", "base", "--mask", "/bin/b", "--mask", "lib", "--exclude", "top"];
        assert_eq!(commit(&masks), ["/bin", "/bin/a"], "{from}");
        assert_eq!(home.ok(["fs", "cat", "made", "/bin/a"]), "2");
        // Alone, it hides the same where it is put over another.
        home.ok([
            "fs",
            "commit",
            "--from",
            from,
            "--onto",
            "base",
            "--layer",
            "-t",
            "alone",
            "--include",
            "top",
            "--mask",
            "bin/b",
        ]);
        assert_eq!(home.ok(["fs", "diff", "base", "base+alone"]), "D /bin/b\nA /top", "{from}");
        // And after a way through a registry's form.
        let archive = home.beside("alone.tar").display().to_string();
        home.ok(["image", "export", "-q", "-o", &archive, "alone"]);
        let (before, other) = (home.ok(["image", "inspect", "alone", "--format", "json"]), Home::new());
        other.ok(["image", "import", "-q", &archive]);
        assert_eq!(other.ok(["image", "inspect", "alone", "--format", "json"]), before);
    }
}

#[test]
fn a_view_and_a_container_are_committed_alike() {
    let Some(home) = Home::with_busybox() else { return };
    let change = "echo 1 > new; mkdir -p tmp/cache; echo 2 > tmp/cache/x; echo 3 >> etc/passwd; rm etc/group";
    let flags = ["--exclude", "tmp/cache", "--mask", "var/www"];
    let at = home.beside("at").display().to_string();
    let script = format!("cd {at}; {change}");
    home.ok(["fs", "run", IMAGE, "-e", "--keep", "--name", "v", "--at", &at, "--", "sh", "-ec", &script]);
    home.ok([&["fs", "commit", "v", "-t", "of/view"], &flags[..]].concat());
    let script = format!("cd /; {change}");
    home.ok(["run", "--name", "c", "--network", "none", IMAGE, "sh", "-ec", &script]);
    home.ok([&["commit", "c", "of/container"], &flags[..]].concat());
    let wanted = "D /etc/group\nC /etc/passwd\nA /new";
    for image in ["of/view", "of/container"] {
        let diff = home.ok(["fs", "diff", IMAGE, image]);
        let diff: Vec<_> =
            diff.lines().filter(|line| !line.ends_with(" /var") && !line.ends_with(" /tmp")).collect();
        let (hidden, rest): (Vec<_>, Vec<_>) = diff.into_iter().partition(|line| line.contains("/var/www"));
        assert_eq!(rest.join("\n"), wanted, "{image}");
        assert!(
            !hidden.is_empty() && hidden.iter().all(|line| line.starts_with("D ")),
            "{image}: {hidden:?}"
        );
    }
    // Only the layer: nothing of what is below.
    home.ok(["fs", "commit", "v", "--layer", "-t", "of/layer", "--include", "new"]);
    assert_eq!(paths(&home, "of/layer"), ["/new"]);
    home.ok(["fs", "runtimes", "rm", "v"]);
}

#[test]
fn a_file_that_is_being_written_is_named_and_taken_once_it_rests() {
    let Some(home) = Home::with_busybox() else { return };
    fs::create_dir(home.beside("at")).unwrap();
    for backend in ["overlay", "fuse", "router"] {
        written_while_committed(&home, backend);
    }
    home.ok(["fs", "service", "stop"]);
}

fn written_while_committed(home: &Home, backend: &str) {
    let at = home.beside("at").display().to_string();
    let (go, kiln) = (home.beside("go"), env!("CARGO_BIN_EXE_kiln"));
    // A log of which every byte is written again all the time.
    let script = format!(
        "cd {at}; head -c 30000000 /dev/zero > log
         (while test ! -e {go}; do printf x | dd of=log bs=1 seek=15000000 conv=notrunc 2>/dev/null; done) &
         {kiln} fs commit -t a 2>refused && exit 9; grep -q '/log. was being changed' refused || exit 8
         grep -q -e --exclude refused || exit 7
         {kiln} fs commit -t b --exclude log; touch {go}; wait; {kiln} fs commit -t c; sha256sum < log",
        go = go.display()
    );
    let told =
        home.ok(["fs", "run", IMAGE, "-e", "--at", &at, "--backend", backend, "--", "sh", "-c", &script]);
    fs::remove_file(&go).unwrap();
    let cat = home.command(["fs", "cat", "c", "log"]).output().unwrap().stdout;
    let digest = kiln_contract::Digest::of(&cat).hex();
    assert!(told.ends_with(&format!("{digest}  -")), "{backend}: {told}");
    assert!(home.kiln(["fs", "cat", "b", "log"]).stderr.contains("there is no `log`"));
    assert!(home.kiln(["fs", "cat", "a", "log"]).stderr.contains("no such image"));
}
