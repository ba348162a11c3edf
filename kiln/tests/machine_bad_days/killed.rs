//! Whoever of a machine is killed at whatever moment of a verb: what is listed is whole, the original answers, and nothing is left.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use super::common::{Home, until};
use super::{HOME, deaf, gone, kill, names, processes};

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
