//! Kernels that never get to a guest, a change from one that does to another, and what is shown while the first machine of its
//! kind is made ready.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::common::terminal::Terminal;
use super::common::{Home, IMAGE, finish_within, until};
use super::{HOME, deaf, inspect, names, run};

/// What is left in a home besides locks, when nothing runs for it any more.
pub(super) fn left(home: &Home) -> BTreeSet<String> {
    until("nothing runs", || running(home).is_empty());
    let mut left = BTreeSet::new();
    for directory in ["disks", "instances", "templates"] {
        if home.path().join(directory).exists() {
            let found = names(home, directory).into_iter();
            let found = found.filter(|name| !name.ends_with("lock") && name != ".tmp");
            left.extend(found.map(|name| format!("{directory}/{name}")));
        }
    }
    left
}

/// The processes that were started for a home, or are in it.
pub(super) fn running(home: &Home) -> BTreeSet<String> {
    let (place, setting) = (home.path(), format!("KILN_HOME={}\0", home.path().display()));
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let is_here = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&place));
        if is_here || String::from_utf8_lossy(&environment).contains(&setting) {
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.insert(format!("{pid} {}", String::from_utf8_lossy(&words).replace('\0', " ")));
        }
    }
    found
}

/// A kernel of x86-64 that writes a line to its console and then waits for ever.
fn silent() -> Vec<u8> {
    const BASE: u32 = 0x0100_0000;
    const PAGE: usize = 4096;
    // mov esi, text; mov dx, 0x3f8; 1: lodsb; test al, al; jz 2f; out dx, al; jmp 1b; 2: cli; hlt; jmp 2b
    let mut body = vec![0xbe, 0, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03];
    body.extend([0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xfa, 0xf4, 0xeb, 0xfc]);
    let text = BASE + u32::try_from(body.len()).unwrap();
    body[1..5].copy_from_slice(&text.to_le_bytes());
    body.extend(b"Linux version 6.1.0-silent (nobody)\r\nand says nothing more\r\n\0");
    // The note by which PVH enters it (XEN_ELFNOTE_PHYS32_ENTRY).
    let note = [&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0][..], b"Xen\0", &BASE.to_le_bytes()].concat();
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for value in [u64::from(BASE), 64, 0] {
        elf.extend(value.to_le_bytes()); // entry, program headers, sections
    }
    for value in [0_u16, 0, 64, 56, 2, 64, 0, 0] {
        elf.extend(value.to_le_bytes()); // flags, sizes and numbers of headers
    }
    for (kind, flags, at, address, length, align) in
        [(1_u32, 7_u32, PAGE, BASE, body.len(), PAGE), (4, 4, 64 + 2 * 56, 0, note.len(), 4)]
    {
        elf.extend(kind.to_le_bytes());
        elf.extend(flags.to_le_bytes());
        for value in [at, address as usize, address as usize, length, length, align] {
            elf.extend((value as u64).to_le_bytes());
        }
    }
    elf.extend(note);
    elf.resize(PAGE, 0);
    elf.extend(body);
    elf
}

/// A file with each `from` in it as `to`, which is as long.
fn replaced(file: &Path, from: &str, to: &str) -> Vec<u8> {
    let sed =
        Command::new("sed").env("LC_ALL", "C").arg(format!("s|{from}|{to}|g")).arg(file).output().unwrap();
    assert!(sed.status.success(), "{sed:?}");
    sed.stdout
}

/// A home with a kernel from these bytes and nothing else of a machine's.
fn home_with(kernel: &[u8]) -> Option<Home> {
    kiln_fixtures::require("qemu-system-x86_64")?;
    let home = Home::with_busybox()?;
    let path = home.beside("kernel");
    fs::write(&path, kernel).unwrap();
    home.ok(["kernel", "install", "-q", "--from", path.to_str().unwrap(), "--name", "given"]);
    Some(home)
}

/// The directory of the shared home's kernel of Debian.
fn debian(home: &Home) -> PathBuf {
    let debian = names(home, "kernels").into_iter().find(|name| name.ends_with("-amd64"));
    home.path().join("kernels").join(debian.unwrap())
}

#[test]
fn a_guest_that_never_says_hello_is_given_up_in_time_with_its_last_words_and_nothing_is_left() {
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let Some(home) = home_with(&silent()) else { return };
    let before = left(&home);
    for flags in [&["--rm"][..], &["--rm", "--cold"], &["--rm", "-d"]] {
        let begun = Instant::now();
        let mut command = home.command(run(flags, &["true"]));
        command.env("KILN_BOOT_TIMEOUT", "2");
        let ended = finish_within(command, Duration::from_secs(100));
        assert_eq!(ended.code, 125, "{flags:?}: {ended:?}");
        for said in [
            "the guest did not say hello within 2 s",
            "give it longer with KILN_BOOT_TIMEOUT, in seconds; its console's last lines:",
            "Linux version 6.1.0-silent (nobody)",
            "and says nothing more",
        ] {
            assert!(ended.stderr.contains(said), "{flags:?}: no `{said}`: {}", ended.stderr);
        }
        assert!(begun.elapsed() >= Duration::from_secs(2), "{flags:?}");
        assert_eq!(left(&home), before, "{flags:?}");
    }
    // One that is kept has not run, and says why.
    home.ok(["create", "--vm", "--memory", "256m", "--name", "kept", IMAGE, "true"]);
    let mut command = home.command(["start", "--cold", "kept"]);
    command.env("KILN_BOOT_TIMEOUT", "2");
    let ended = finish_within(command, Duration::from_secs(100));
    assert!(ended.code == 1 && ended.stderr.contains("and says nothing more"), "{ended:?}");
    until("nothing runs", || running(&home).is_empty());
    assert_ne!(inspect(&home, "kept")["status"], "running");
    // What is no time is refused before anything is made or begun.
    for (said, words, code) in [
        ("soon", run(&["--rm"], &["true"]), 125),
        ("0", run(&["--rm", "--cold"], &["true"]), 125),
        ("1.5", ["start", "kept"].map(Into::into).to_vec(), 1),
    ] {
        let mut command = home.command(&words);
        command.env("KILN_BOOT_TIMEOUT", said);
        let ended = finish_within(command, Duration::from_secs(100));
        assert_eq!(ended.code, code, "{words:?}: {ended:?}");
        for part in [&format!("`{said}` in KILN_BOOT_TIMEOUT"), "a whole number of seconds, at least 1"] {
            assert!(ended.stderr.contains(part), "{words:?}: no `{part}`: {}", ended.stderr);
        }
    }
    home.ok(["rm", "kept"]);
    assert_eq!(left(&home), before);
}

#[test]
fn a_kernel_that_panics_before_there_is_a_guest_says_why_and_nothing_is_left() {
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let Some(shared) = &*HOME else { return };
    // Debian's, which does not find what it should run.
    let kernel = replaced(&debian(shared).join("vmlinux"), r"/init\x00", r"/none\x00");
    let Some(home) = home_with(&kernel) else { return };
    let before = left(&home);
    for flags in [&["--rm"][..], &["--rm", "--cold"]] {
        let ended = finish_within(home.command(run(flags, &["true"])), Duration::from_secs(240));
        assert_eq!(ended.code, 125, "{flags:?}: {ended:?}");
        let said = "the machine's kernel panicked: VFS: Unable to mount root fs";
        assert!(ended.stderr.contains(said), "{flags:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("its console's last lines:"), "{flags:?}: {}", ended.stderr);
        assert_eq!(left(&home), before, "{flags:?}");
    }
}

#[test]
fn a_machine_goes_from_one_kernel_to_another_and_back() {
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let Some(home) = &*HOME else { return };
    // Debian's again, uncompressed, with another version in it and in its modules.
    let debian = debian(home);
    let name = debian.file_name().unwrap().to_str().unwrap().to_owned();
    let other = name.replace("-amd64", "-other");
    let tree = home.beside("other-kernel");
    let modules = tree.join("lib/modules").join(&other).join("kernel");
    fs::create_dir_all(&modules).unwrap();
    fs::create_dir_all(tree.join("boot")).unwrap();
    let renamed = |from: &Path, to: PathBuf| fs::write(to, replaced(from, &name, &other)).unwrap();
    renamed(&debian.join("vmlinux"), tree.join("boot").join(format!("vmlinuz-{other}")));
    renamed(&debian.join("config"), tree.join("boot").join(format!("config-{other}")));
    for module in fs::read_dir(debian.join("modules")).unwrap().flatten() {
        renamed(&module.path(), modules.join(module.file_name()));
    }
    assert_eq!(home.ok(["kernel", "install", "-q", "--from", tree.to_str().unwrap()]), other);
    assert_eq!(home.ok(["kernel", "default"]), name, "the default stays");
    deaf(home, "wanders");
    home.ok(["exec", "wanders", "sh", "-c", "echo kept > /kept; sync"]);
    for (kernel, given) in [(&name, None), (&other, Some(&other)), (&name, Some(&name))] {
        if let Some(given) = given {
            home.ok(["stop", "-t", "0", "wanders"]);
            home.ok(["update", "--kernel", given, "wanders"]);
            let start = finish_within(home.command(["start", "wanders"]), Duration::from_secs(240));
            assert_eq!(start.code, 0, "{start:?}");
        }
        assert_eq!(home.ok(["exec", "wanders", "uname", "-r"]), **kernel);
        let shown = inspect(home, "wanders");
        assert_eq!(shown["spec"]["machine"]["kernel"].as_str(), given.map(String::as_str), "{shown}");
    }
    assert_eq!(home.ok(["exec", "wanders", "cat", "/kept"]), "kept");
    home.ok(["rm", "-f", "wanders"]);
}

#[test]
fn what_the_first_machine_of_its_kind_needs_is_shown_at_a_terminal_told_elsewhere_and_not_with_quiet() {
    let Some(home) = &*HOME else { return };
    let image = |name: &str| {
        let root = home.beside(name);
        fs::create_dir_all(root.join("bin")).unwrap();
        let busybox = kiln_fixtures::require("busybox").unwrap();
        fs::copy(busybox, root.join("bin/busybox")).unwrap();
        fs::write(root.join("name"), name).unwrap();
        home.ok(["image", "import", "-q", root.to_str().unwrap(), name]);
    };
    let words = |flags: &[&str], image: &str, memory: &str| {
        let all = [
            &["run", "--vm", "--rm", "--memory", memory][..],
            flags,
            &[image, "/bin/busybox", "echo", "ran"],
        ];
        all.concat().iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()
    };
    image("at-a-terminal");
    let mut terminal = Terminal::open(24, 100);
    let mut command = home.command(words(&[], "at-a-terminal", "192m"));
    command.env("TERM", "xterm").env_remove("NO_COLOR");
    let mut child = terminal.start(command);
    for shown in ["render", "(1 CPU, 192 MiB)", "template", "at-a-terminal", "ran"] {
        terminal.expect(shown);
    }
    assert!(child.wait().unwrap().success());

    image("told");
    let ended = finish_within(home.command(words(&[], "told", "256m")), Duration::from_secs(240));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
    assert!(ended.stderr.contains("render done"), "{ended:?}");
    assert!(ended.stderr.contains("told: template done\n") && !ended.stderr.contains('\u{1b}'), "{ended:?}");
    // Nothing of it the second time.
    let ended = finish_within(home.command(words(&[], "told", "256m")), Duration::from_secs(240));
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");

    image("quiet");
    let before = names(home, "templates").len();
    let ended = finish_within(home.command(words(&["-q"], "quiet", "256m")), Duration::from_secs(240));
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (0, "ran\n", ""), "{ended:?}");
    assert!(names(home, "templates").len() > before, "there was something to make");
}
