//! What needs no container: usage errors, exit codes, help, completion of names, closed outputs.

mod common;

use std::fs::File;
use std::process::Stdio;

use common::{Home, write};

#[test]
fn lines_that_make_no_sense_end_with_2_or_for_workloads_125() {
    let home = Home::new();
    let table: [(&[&str], i32); 16] = [
        (&["--bogus"], 2),
        (&["ps", "--bogus"], 2),
        (&["frobnicate"], 2),
        (&["run"], 125),
        (&["run", "--bogus", "x"], 125),
        (&["--home", "/nowhere", "run"], 125),
        (&["create", "--memory", "much", "x"], 125),
        (&["exec", "x"], 125),
        (&["kill", "--signal", "LOUD", "x"], 2),
        (&["ps", "--filter", "colour=red"], 2),
        (&["logs", "--since", "whenever", "x"], 2),
        (&["cp", "a", "b"], 2),
        (&["rename", "x", "no/name"], 2),
        (&["network", "create", "-x"], 2),
        (&["network", "create", "--subnet", "10.0.0.0/33", "x"], 2),
        (&["history", "x"], 2),
    ];
    for (words, code) in table {
        let ended = home.kiln(words);
        assert_eq!(ended.code, code, "{words:?}: {ended:?}");
        assert!(ended.stdout.is_empty(), "{words:?}: {ended:?}");
        assert!(ended.stderr.starts_with("error: "), "{words:?}: {ended:?}");
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    let home = Home::new();
    assert_eq!(home.ok(["--version"]), format!("kiln {}", env!("CARGO_PKG_VERSION")));
    assert!(home.ok(["--help"]).contains("Usage: kiln"));
    assert!(home.ok(["run", "--help"]).contains("--publish-all"));
    assert_eq!(home.ok(["help", "run"]), home.ok(["run", "--help"]));
    assert!(!home.path().exists(), "help makes no home");
}

#[test]
fn what_does_not_exist_is_an_error_with_a_hint() {
    let home = Home::new();
    write(&home.path().join("keep"), "");
    for words in [&["stop", "nobody"][..], &["inspect", "nobody"], &["image", "inspect", "nobody"]] {
        let ended = home.kiln(words);
        assert_eq!(ended.code, 1, "{words:?}: {ended:?}");
        assert!(ended.stderr.contains("nobody"), "{words:?}: {ended:?}");
        assert!(ended.stderr.contains("\nhint: "), "{words:?}: {ended:?}");
    }
}

#[test]
fn a_reader_that_went_away_ends_a_command_quietly() {
    let home = Home::new();
    write(&home.beside("root/file"), "content");
    home.ok(["image", "import", "-q", "root", "files"]);
    for words in [&["completion", "bash"][..], &["save", "files"], &["image", "export", "-q", "files"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = home.command(words).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let ended = common::Ended::from(child.wait_with_output().unwrap());
        assert_eq!((ended.code, ended.stderr.as_str()), (141, ""), "{words:?}: {ended:?}");
    }
}

#[test]
fn nothing_on_standard_input_is_no_image() {
    let home = Home::new();
    let child = home.command(["image", "import", "-", "empty"]).stdin(Stdio::null()).output().unwrap();
    let ended = common::Ended::from(child);
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("there is nothing on standard input"), "{ended:?}");
}

#[test]
fn a_full_disk_behind_standard_output_is_an_error() {
    let home = Home::new();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let child = home.command(["completion", "zsh"]).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let ended = common::Ended::from(child.wait_with_output().unwrap());
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("standard output") && ended.stderr.contains("No space"), "{ended:?}");
}

#[test]
fn shells_complete_commands_flags_and_names() {
    let home = Home::new();
    for name in ["web", "webhook", "db"] {
        write(&home.path().join("names").join(name), "0");
        write(&home.path().join("volumes").join(format!("{name}-data")).join("volume.json"), "{}");
    }
    let complete = |words: &[&str]| -> Vec<String> {
        let mut command = home.command(["--", "kiln"]);
        command.args(words).env("COMPLETE", "fish");
        let ended = common::Ended::from(command.output().unwrap());
        assert_eq!(ended.code, 0, "{ended:?}");
        ended.stdout.lines().map(|line| line.split('\t').next().unwrap().to_owned()).collect()
    };
    assert_eq!(complete(&["stop", "we"]), ["web", "webhook"]);
    assert_eq!(complete(&["cp", "d"]), ["db:"]);
    assert_eq!(complete(&["volume", "rm", "db"]), ["db-data"]);
    assert_eq!(complete(&["network", "inspect", "ho"]), ["host"]);
    assert_eq!(complete(&["unpau"]), ["unpause"]);
    assert!(complete(&["run", "--publish"]).contains(&"--publish-all".to_owned()));
}

#[test]
fn every_shell_gets_a_script_and_every_command_a_page() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish", "elvish"] {
        let script = home.ok(["completion", shell]);
        assert!(script.contains("COMPLETE") && script.contains("kiln"), "{shell}: {script}");
    }
    let pages = home.beside("man");
    home.ok(["man", pages.to_str().unwrap()]);
    for page in ["kiln.1", "kiln-run.1", "kiln-image-pull.1", "kiln-system-doctor.1"] {
        let text = std::fs::read_to_string(pages.join(page)).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
    assert!(!pages.join("kiln-supervise.1").exists());
}

#[test]
fn the_doctor_gives_a_verdict_on_each_thing() {
    let home = Home::new();
    let ended = home.kiln(["system", "doctor", "--format", "json"]);
    let findings: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    let findings = findings.as_array().unwrap();
    for what in ["kernel", "erofs", "overlayfs", "fuse", "user namespaces", "cgroups", "home", "space"] {
        let found = findings.iter().find(|finding| finding["what"] == what);
        let found = found.unwrap_or_else(|| panic!("nothing on {what}"));
        assert!(["ok", "warn", "fail"].contains(&found["verdict"].as_str().unwrap()), "{found}");
        assert!(!found["why"].as_str().unwrap().is_empty(), "{found}");
        let advised = found["advice"].is_string();
        assert!(advised || found["verdict"] == "ok", "{found}");
    }
    let failed = findings.iter().any(|finding| finding["verdict"] == "fail");
    assert_eq!(ended.code, i32::from(failed), "{ended:?}");
    let table = home.kiln(["system", "doctor"]).stdout;
    assert!(table.lines().any(|line| line.contains("overlayfs")), "{table}");
}

#[test]
fn registry_passwords_come_from_standard_input_only_with_a_user() {
    let home = Home::new();
    let ended = home.kiln(["login", "--password-stdin", "localhost:1"]);
    assert_eq!(ended.code, 2, "{ended:?}");
    assert!(ended.stderr.contains("--username"), "{ended:?}");
}
