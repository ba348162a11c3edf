//! Whoever of a machine is killed at whatever moment of a verb: what is listed is whole, the original answers, and nothing is left.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use super::common::{Home, IMAGE, finish_within, until};
use super::kernels::{left, running};
use super::{HOME, deaf, gone, kill, names, processes, run};

/// What is in the home and is not of an instance that is there, and mounts in it.
fn kept(home: &Home) -> [BTreeSet<String>; 4] {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let place = home.path().to_str().unwrap().to_owned();
    let mounts = mounts.lines().filter(|line| line.contains(&place)).map(str::to_owned).collect();
    // Locks of disks and templates stay.
    let of = |directory| names(home, directory).into_iter().filter(|name| !name.ends_with("lock")).collect();
    [of("disks"), of("instances"), of("templates"), mounts]
}

#[test]
fn whoever_is_killed_during_a_verb_no_half_is_listed_and_nothing_is_left() {
    let Some(home) = &*HOME else { return };
    let before = kept(home);
    let id = deaf(home, "hit");
    home.ok(["exec", "hit", "sh", "-c", "echo kept > /kept; sync"]);
    // (the verb, who is killed): what `main.rs` does not kill.
    let snapshot = ["snapshot", "create", "--memory", "hit", "moment"];
    let fork = ["fork", "hit", "copy"];
    let table: [(&[&str], &[&str]); 2] = [
        (&snapshot, &["kiln", "supervisor", "monitor", "hypervisor"]),
        (&fork, &["supervisor", "hypervisor"]),
    ];
    for (verb, victims) in table {
        for who in victims {
            for patience in [30, 150] {
                let what = format!("{verb:?}, {who} after {patience} ms");
                let mut command = home.command(verb);
                let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
                std::thread::sleep(Duration::from_millis(patience));
                let hit = if *who == "kiln" { child.kill().is_ok() } else { kill(home, &id, who) };
                assert!(hit, "{what}");
                let output = child.wait_with_output().unwrap();
                if *who != "kiln" {
                    gone(home, &id);
                    home.ok(["start", "hit"]);
                }
                assert_eq!(home.ok(["exec", "hit", "cat", "/kept"]), "kept", "{what}");
                assert_eq!(processes(home, &id).len(), 3, "{what}");
                // What is listed is whole, whether the verb came to its end or not; what was said to be made is listed.
                let listed = home.json(["snapshot", "ls", "--format", "json", "hit"]);
                let is_listed = !listed.as_array().unwrap().is_empty();
                let makes_snapshot = verb[0] == "snapshot";
                assert!(!output.status.success() || !makes_snapshot || is_listed, "{what}: {output:?}");
                if is_listed {
                    let memory = listed[0]["memory"].as_u64().is_some_and(|bytes| bytes > 0);
                    assert_eq!(memory, verb.contains(&"--memory"), "{what}: {listed}");
                    home.ok(["snapshot", "restore", "--force", "hit", "moment"]);
                    home.ok(["start", "hit"]);
                    assert_eq!(home.ok(["exec", "hit", "cat", "/kept"]), "kept", "{what}");
                    home.ok(["snapshot", "rm", "hit", "moment"]);
                }
                // A fork is as whole as it says: it is there and answers, or it is not, or cannot be started and says why.
                if home.kiln(["inspect", "copy"]).code == 0 {
                    let started = home.kiln(["start", "copy"]);
                    let whole = started.code == 0 && home.ok(["exec", "copy", "cat", "/kept"]) == "kept";
                    assert!(whole || !output.status.success(), "{what}: {started:?} {output:?}");
                    assert!(whole || started.stderr.contains("error: "), "{what}: {started:?}");
                    home.ok(["rm", "-f", "copy"]);
                } else {
                    assert!(!output.status.success() || makes_snapshot, "{what}: {output:?}");
                }
            }
        }
        // And done to the end after all that.
        home.ok(verb);
        if verb[0] == "snapshot" {
            home.ok(["snapshot", "rm", "hit", "moment"]);
        } else {
            home.ok(["rm", "-f", "copy"]);
        }
    }
    // A start that nobody waits for any more comes to its end, or never began.
    for patience in [0, 30, 100, 250] {
        home.ok(["stop", "-t", "0", "hit"]);
        let mut start =
            home.command(["start", "hit"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(patience));
        let _ = start.kill();
        start.wait().unwrap();
        home.ok(["start", "hit"]);
        assert_eq!(home.ok(["exec", "hit", "cat", "/kept"]), "kept", "after {patience} ms");
        assert_eq!(processes(home, &id).len(), 3, "after {patience} ms");
    }
    home.ok(["rm", "-f", "hit"]);
    until("nothing of it runs", || processes(home, &id).is_empty());
    let after = kept(home);
    assert_eq!(after, before);
}

#[test]
fn a_run_in_the_foreground_that_is_killed_at_any_moment_leaves_nothing_and_the_next_one_runs() {
    let Some(home) = Home::with_kernel() else { return };
    let before = left(&home);
    let killed_after = |words: &[&str], patience: u64| {
        let mut command = home.command(words);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(patience));
        child.kill().unwrap();
        child.wait().unwrap();
        until("nothing runs", || running(&home).is_empty());
    };
    // From a template that is there: one that is for one run, and one that is kept.
    for patience in [0, 30, 100, 300] {
        killed_after(&run(&["--rm", "--name", "once"], &["sleep", "60"]), patience);
        killed_after(&run(&["--name", "kept"], &["sleep", "60"]), patience);
        let listed = home.json(["ps", "--all", "--format", "json"]);
        for instance in listed.as_array().unwrap() {
            let (name, status) = (&instance["name"], &instance["status"]);
            assert!(name == "kept" && status != "running", "after {patience} ms: {instance}");
        }
        let ended = home.kiln(run(&["--rm"], &["echo", "again"]));
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "again\n"), "after {patience} ms: {ended:?}");
        if !listed.as_array().unwrap().is_empty() {
            home.ok(["rm", "kept"]);
        }
        // An instance that was half made is swept by who looks, once nobody can be making it any more.
        until(&format!("nothing is left after {patience} ms"), || {
            home.ok(["ps", "--all"]);
            left(&home) == before
        });
    }
    // While the first of its kind is made ready: whoever makes another one clears it away.
    let words = |memory| ["run", "--vm", "--rm", "--memory", memory, IMAGE, "echo", "ran"];
    let is_unfinished = |name: &String| name.starts_with(".new");
    let mut first = home.command(words("192m")).stderr(Stdio::null()).spawn().unwrap();
    until("a template is being made", || names(&home, "templates").iter().any(is_unfinished));
    first.kill().unwrap();
    first.wait().unwrap();
    until("nothing runs", || running(&home).is_empty());
    assert!(names(&home, "templates").iter().any(is_unfinished));
    assert_eq!(home.json(["ps", "--all", "--format", "json"]), serde_json::json!([]));
    let ended = finish_within(home.command(words("320m")), Duration::from_secs(240));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
    assert!(!names(&home, "templates").iter().any(is_unfinished));
    home.ok(["template", "prune"]);
    assert_eq!(left(&home), BTreeSet::new());
}
