//! Verbs of machines that `main.rs` does not show: copies of what does not run, streams and terminals, figures.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::common::terminal::Terminal;
use super::common::{Ended, Home, IMAGE, finish_within, until};
use super::{HOME, run, sleeper};

/// What `inspect` says.
fn inspect(home: &Home, name: &str) -> serde_json::Value {
    home.json(["inspect", name])[0].clone()
}

/// What a shell says in a machine.
#[track_caller]
fn sh(home: &Home, name: &str, script: &str) -> String {
    home.ok(["exec", name, "sh", "-c", script])
}

#[test]
fn a_running_machine_is_forked_with_its_memory_or_with_its_disk_alone() {
    let Some(home) = &*HOME else { return };
    let origin = sleeper(home, "both");
    sh(home, "both", "echo disk > /kept; echo memory > /dev/shm/kept");
    home.ok(["fork", "--disk", "both", "disk"]);
    home.ok(["fork", "--memory", "both", "memory"]);
    assert_eq!(inspect(home, "disk")["status"], "created", "who wanted a disk starts the machine himself");
    assert_eq!(
        sh(home, "memory", "cat /kept /dev/shm/kept; cat /proc/[0-9]*/comm | grep -c sleep"),
        "disk\nmemory\n1"
    );
    home.ok(["start", "disk"]);
    assert_eq!(sh(home, "disk", "cat /kept; ls /dev/shm"), "disk");
    for name in ["disk", "memory"] {
        assert_eq!(inspect(home, name)["parent"], origin.as_str(), "{name}");
        sh(home, name, "echo of another > /kept");
    }
    assert_eq!(sh(home, "both", "cat /kept /dev/shm/kept"), "disk\nmemory");
    let taken = home.kiln(["fork", "both", "disk"]);
    assert!(taken.code == 1 && taken.stderr.contains("disk"), "{taken:?}");
    assert_eq!(sh(home, "disk", "cat /kept"), "of another", "whose name it is stays as it was");
    home.ok(["rm", "-f", "both", "disk", "memory"]);
}

#[test]
fn a_machine_that_does_not_run_is_forked_and_saved_with_its_disk() {
    let Some(home) = &*HOME else { return };
    home.ok(["create", "--vm", "--memory", "256m", "--name", "still", IMAGE, "sleep", "600"]);
    // (the verb, what is said where there is neither a disk nor a memory)
    let table: [(&[&str], &str); 4] = [
        (&["fork", "still", "never"], "has never been started"),
        (&["fork", "--memory", "still", "never"], "has no memory to copy"),
        (&["snapshot", "create", "still"], "has never been started"),
        (&["snapshot", "create", "--memory", "still"], "has no memory to save"),
    ];
    for (words, said) in table {
        let ended = home.kiln(words);
        assert!(ended.code == 1 && ended.stderr.contains(said), "{words:?}: {ended:?}");
        assert_eq!(home.kiln(["inspect", "never"]).code, 1, "{words:?} leaves nothing");
    }
    home.ok(["start", "still"]);
    sh(home, "still", "echo first > /kept");
    home.ok(["stop", "-t", "0", "still"]);

    let ended = home.kiln(["fork", "--memory", "still", "never"]);
    assert!(ended.code == 1 && ended.stderr.contains("has no memory to copy"), "{ended:?}");
    assert_eq!(home.kiln(["inspect", "never"]).code, 1);
    home.ok(["fork", "still", "plain"]);
    home.ok(["fork", "--disk", "plain", "grandchild"]);
    assert_eq!(inspect(home, "plain")["status"], "created");
    assert_eq!(inspect(home, "grandchild")["parent"], inspect(home, "plain")["id"]);

    // Its name is the time if none is given.
    let before = jiff::Zoned::now();
    let name = home.ok(["snapshot", "create", "still"]);
    let time: jiff::civil::DateTime = jiff::civil::DateTime::strptime("%Y-%m-%dT%H-%M-%S", &name).unwrap();
    let second = jiff::Span::new().seconds(1);
    let (earliest, latest) = (before.datetime() - second, jiff::Zoned::now().datetime());
    assert!(earliest <= time && time <= latest, "{earliest} {name} {latest}");
    let listed = home.json(["snapshot", "ls", "--format", "json", "still"]);
    assert_eq!(listed[0]["name"], name.as_str());
    assert!(listed[0]["memory"].is_null() && listed[1].is_null(), "{listed}");

    home.ok(["start", "still", "plain", "grandchild"]);
    sh(home, "still", "echo second > /kept; echo more > /more");
    let hosts: std::collections::BTreeSet<_> =
        ["still", "plain", "grandchild"].map(|name| sh(home, name, "hostname")).into();
    assert_eq!(hosts.len(), 3);
    for copy in ["plain", "grandchild"] {
        assert_eq!(sh(home, copy, "cat /kept; ls /more 2>&1 | grep -c 'No such'"), "first\n1", "{copy}");
    }
    home.ok(["snapshot", "restore", "--force", "still", &name]);
    home.ok(["start", "still"]);
    assert_eq!(sh(home, "still", "cat /kept; ls /more 2>&1 | grep -c 'No such'"), "first\n1");
    home.ok(["rm", "-f", "still", "plain", "grandchild"]);
}

#[test]
fn what_is_typed_into_a_machine_and_what_it_says_goes_through_attach_logs_and_restart() {
    let Some(home) = &*HOME else { return };
    let script = "echo begun; while read -r line; do [ \"$line\" = end ] && exit 5; \
                  echo \"heard $line\"; echo \"sorry $line\" >&2; done";
    home.ok(run(&["-d", "-i", "--name", "ears"], &["sh", "-c", script]));
    // Twice: who detaches or is killed takes nothing along.
    for word in ["one", "two"] {
        let mut client = home.command(["attach", "ears"]);
        let mut client =
            client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        client.stdin.as_mut().unwrap().write_all(format!("{word}\n").as_bytes()).unwrap();
        let mut heard = String::new();
        let mut said = BufReader::new(client.stdout.take().unwrap());
        while !heard.contains(&format!("heard {word}\n")) {
            assert_ne!(said.read_line(&mut heard).unwrap(), 0, "{heard}");
        }
        client.kill().unwrap();
        client.wait().unwrap();
    }
    let logs = home.kiln(["logs", "ears"]);
    assert_eq!((logs.code, logs.stdout.as_str()), (0, "begun\nheard one\nheard two\n"), "{logs:?}");
    assert_eq!(logs.stderr, "sorry one\nsorry two\n");
    assert_eq!(home.ok(["logs", "-n", "1", "ears"]), "");
    assert_eq!(home.ok(["logs", "-n", "2", "ears"]), "heard two");

    // A new life of the same machine, whose words come after those of the last.
    sh(home, "ears", "echo kept > /kept; echo gone > /dev/shm/gone");
    home.ok(["restart", "-t", "0", "ears"]);
    assert_eq!(sh(home, "ears", "cat /kept; ls /dev/shm"), "kept");
    until("it has begun again", || home.ok(["logs", "ears"]).ends_with("heard two\nbegun"));
    let following = home.command(["logs", "-f", "-n", "1", "ears"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut client = home.command(["attach", "ears"]);
    let mut client =
        client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    client.stdin.take().unwrap().write_all(b"three\nend\n").unwrap();
    let ended = Ended::from(client.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stderr.as_str()), (5, "sorry three\n"), "{ended:?}");
    assert!(ended.stdout.ends_with("heard three\n"), "{ended:?}");
    let followed = Ended::from(following.wait_with_output().unwrap());
    assert_eq!((followed.code, followed.stdout.as_str()), (0, "begun\nheard three\n"), "{followed:?}");
    assert_eq!(inspect(home, "ears")["exit"]["code"], 5);
    let refused = home.kiln(["attach", "ears"]);
    assert!(refused.code == 1 && refused.stderr.contains("exited"), "{refused:?}");
    home.ok(["rm", "-f", "ears"]);
}

#[test]
fn a_command_in_a_machine_has_a_terminal_of_the_size_of_ours() {
    let Some(home) = &*HOME else { return };
    sleeper(home, "term");
    let mut terminal = Terminal::open(31, 97);
    let mut child = terminal.start(home.command(["exec", "-it", "-e", "WORD=given", "term", "sh"]));
    terminal.type_in("stty size; tty; echo $WORD\n");
    terminal.expect("31 97\r\n");
    terminal.expect("/dev/pts/");
    terminal.expect("given\r\n");
    terminal.resize(42, 78);
    kill_process(Pid::from_child(&child), Signal::WINCH).unwrap();
    // The new size travels beside what is typed.
    terminal.type_in("until stty size | grep '^42 78'; do sleep 0.1; done\n");
    terminal.expect("42 78\r\n");
    // What a terminal makes of keys is its own business: a process is interrupted, and the shell lives.
    terminal.type_in("sleep 500; echo after=$?\n");
    until("it sleeps", || home.ok(["top", "term"]).contains("sleep 500"));
    terminal.type_in("\x03");
    terminal.type_in("\necho sur\"\"vived; exit 6\n");
    terminal.expect("survived\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(6), "{}", terminal.seen);
    assert!(!home.ok(["top", "term"]).contains("sleep 500"));

    // The keys that detach leave what runs there running.
    let mut terminal = Terminal::open(24, 80);
    let mut child =
        terminal.start(home.command(["exec", "-it", "term", "sh", "-c", "echo he\"\"re; exec sleep 501"]));
    terminal.expect("here\r\n");
    terminal.type_in("\x10\x11");
    assert_eq!(child.wait().unwrap().code(), Some(0), "{}", terminal.seen);
    assert!(home.ok(["top", "term"]).contains("sleep 501"));
    home.ok(["rm", "-f", "term"]);
}

#[test]
fn figures_of_a_machine_are_those_of_its_guest() {
    let Some(home) = &*HOME else { return };
    let id = sleeper(home, "figures");
    let stats = || home.json(["stats", "--no-stream", "--format", "json", "figures"])[0].clone();
    let before = stats();
    assert_eq!(before["id"], id.as_str());
    sh(
        home,
        "figures",
        "dd if=/dev/zero of=/dev/shm/held bs=1M count=40 2>/dev/null; dd if=/dev/zero of=/large bs=1M count=8 2>/dev/null; \
         sync; for n in 1 2 3; do sleep 602 & done",
    );
    let after = stats();
    let number =
        |of: &serde_json::Value, field: &str| of[field].as_u64().unwrap_or_else(|| panic!("{field}: {of}"));
    let more = |field| number(&after, field).saturating_sub(number(&before, field));
    let limit = number(&after, "memory_limit");
    assert!((180 << 20..=256 << 20).contains(&limit), "{after}");
    assert!((40 << 20..limit).contains(&more("memory")), "{before} {after}");
    assert!(more("block_written") >= 8 << 20, "{before} {after}");
    assert!(more("pids") >= 3, "{before} {after}");
    assert!(after["cpu"] != before["cpu"], "{before} {after}");
    let table = home.ok(["stats", "--no-stream", "figures"]);
    assert!(table.lines().nth(1).is_some_and(|row| row.starts_with(&id[..12])), "{table}");
    // What does not run uses nothing.
    home.ok(["stop", "-t", "0", "figures"]);
    assert_eq!(
        home.json(["stats", "--no-stream", "--format", "json"])
            .as_array()
            .unwrap()
            .iter()
            .filter(|row| row["name"] == "figures")
            .count(),
        0
    );
    home.ok(["rm", "-f", "figures"]);
}

#[test]
fn processors_that_a_machine_is_given_are_there_at_its_next_start() {
    let Some(home) = &*HOME else { return };
    home.ok(["create", "--vm", "--memory", "256m", "--name", "wide", IMAGE, "sleep", "600"]);
    home.ok(["update", "--cpus", "2", "wide"]);
    // The first of this shape makes its template, which a busy host takes its time for.
    let ended = finish_within(home.command(["start", "wide"]), Duration::from_secs(240));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(sh(home, "wide", "nproc; grep -c ^processor /proc/cpuinfo"), "2\n2");
    home.ok(["fork", "wide", "wider"]);
    assert_eq!(sh(home, "wider", "nproc"), "2");
    home.ok(["rm", "-f", "wide", "wider"]);
}
