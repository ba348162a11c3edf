//! From `create` to `remove`.

use std::thread;
use std::time::Duration;

use kiln_contract::{
    ErrorKind, InstanceStatus, MountKind, MountSpec, RemoveOptions, RuntimeBackend, StartMode, TmpfsOptions,
};

use crate::bed::{Bed, Test, names_in, wait_for_status};

pub(crate) const TESTS: &[Test] = &[
    ("a container goes through its states, and leaves nothing when it is removed", states),
    ("exit codes are the command's own, or tell why there was none", exit_codes),
    ("a container in the foreground with --rm leaves nothing, however it ends", foreground_leaves_nothing),
    ("a signal to a command in the foreground reaches its container", signals_are_proxied),
    ("a signal that nobody handles ends a container in the foreground", signals_of_the_kernel),
    ("a signal to a command that passes none on ends it and not its container", signals_are_kept),
    ("stopping gives time to end, and then no more", stopping),
    ("a paused container does nothing until it is resumed, and can be stopped", pausing),
    ("ten containers start at once", ten_at_once),
    ("a container can be renamed while it runs", renaming),
    ("what was written to the root is there after a restart, and hosts and tmpfs are new", roots_persist),
    ("verbs in the wrong state say so", wrong_states),
];

const FORCE: RemoveOptions = RemoveOptions { force: true, volumes: true };

fn states() {
    let bed = Bed::new();
    let record = bed.containers.create(&bed.spec("web", &["sleep", "1000"])).unwrap();
    assert_eq!(record.status, InstanceStatus::Created);
    for round in 1..=2 {
        bed.containers.start(&record.id, StartMode::Detached).unwrap();
        let running = bed.look(&record);
        assert_eq!(running.status, InstanceStatus::Running, "round {round}");
        assert!(running.process.is_some() && running.supervisor.is_some() && running.boot.is_some());
        assert_eq!(bed.containers.list().unwrap(), std::slice::from_ref(&running));
        let rows = bed.containers.top(&record.id).unwrap().rows;
        assert!(
            rows.iter().any(|row| row.last().is_some_and(|command| command.contains("sleep"))),
            "{rows:?}"
        );
        assert!(bed.containers.stats(&record.id).unwrap().pids >= 1);
        // Docker's «start» of what runs is no error either.
        bed.containers.start(&record.id, StartMode::Detached).unwrap();
        assert_eq!(bed.look(&record).process, running.process);
        bed.containers.stop(&record.id, Some(Duration::ZERO)).unwrap();
        let ended = bed.look(&record);
        assert_eq!(ended.status, InstanceStatus::Exited);
        assert_eq!((ended.process, ended.supervisor, ended.cgroup), (None, None, None));
        assert_eq!(ended.exit.unwrap().code, 137);
        bed.containers.stop(&record.id, None).unwrap();
    }
    bed.containers.remove(&record.id, RemoveOptions::default()).unwrap();
    assert_eq!(bed.traces(&record), [""; 0]);
    assert_eq!(bed.containers.find("web").unwrap_err().kind(), ErrorKind::NotFound);
}

fn exit_codes() {
    let bed = Bed::new();
    let table: [(&str, &[&str], u8); 6] = [
        ("true", &["true"], 0),
        ("false", &["false"], 1),
        ("seven", &["sh", "-c", "exit 7"], 7),
        ("killed", &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137),
        ("missing", &["no-such-command"], 127),
        ("directory", &["/etc"], 126),
    ];
    for (name, args, code) in table {
        for (remove, how) in [(false, "kept"), (true, "removed")] {
            let mut spec = bed.spec(&format!("{name}-{how}"), args);
            spec.remove = remove;
            let record = bed.containers.create(&spec).unwrap();
            let output = bed.command(&["test-start", &spec.name]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(code.into()), "{name} {how}: {said}");
            if remove {
                assert_eq!(bed.traces(&record), [""; 0], "{name}");
                continue;
            }
            let status = bed.look(&record).exit.unwrap();
            assert_eq!((status.code, status.error.is_some()), (code, (126..128).contains(&code)), "{name}");
            assert_eq!(bed.containers.wait(&record.id).unwrap().code, code);
            // Detached, a command that cannot run is told by `start` too.
            let again = bed.containers.start(&record.id, StartMode::Detached);
            match code {
                126 => assert_eq!(again.unwrap_err().kind(), ErrorKind::CommandNotExecutable),
                127 => {
                    assert_eq!(again.unwrap_err().kind(), ErrorKind::CommandNotFound);
                    assert_eq!(bed.look(&record).status, InstanceStatus::Created, "it never ran");
                }
                _ => assert_eq!(bed.containers.wait(&record.id).unwrap().code, code, "{name} again"),
            }
        }
    }
}

fn foreground_leaves_nothing() {
    let bed = Bed::new();
    for (name, script, code) in [
        ("plain", "echo out; echo err >&2; exit 3", 3),
        ("busy", "sleep 1000 & echo out; echo err >&2; touch /etc/new; exit 0", 0),
    ] {
        let mut spec = bed.spec(name, &["sh", "-c", script]);
        spec.remove = true;
        let record = bed.containers.create(&spec).unwrap();
        let output = bed.command(&["test-start", name]).output().unwrap();
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]), "{name}");
        assert_eq!(output.status.code(), Some(code), "{name}");
        assert_eq!(bed.traces(&record), [""; 0], "{name}");
    }
    assert_eq!(names_in(&bed.home.instances()), [""; 0]);
}

fn signals_are_proxied() {
    let bed = Bed::new();
    let script = "trap 'echo got TERM; exit 9' TERM; echo ready; while true; do sleep 0.01; done";
    for remove in [false, true] {
        let mut spec = bed.spec("trap", &["sh", "-c", script]);
        spec.remove = remove;
        let record = bed.containers.create(&spec).unwrap();
        let mut child =
            bed.command(&["test-start", "trap"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "got TERM");
        assert_eq!(child.wait().unwrap().code(), Some(9));
        if !remove {
            bed.containers.remove(&record.id, FORCE).unwrap();
        }
    }
}

fn signals_of_the_kernel() {
    let bed = Bed::new();
    for (signal, remove) in [(rustix::process::Signal::INT, false), (rustix::process::Signal::TERM, true)] {
        let mut spec = bed.spec("sleepy", &["sh", "-c", "echo ready; sleep 1000"]);
        spec.remove = remove;
        let record = bed.containers.create(&spec).unwrap();
        let mut child =
            bed.command(&["test-start", "sleepy"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        let expected = 128 + signal.as_raw();
        assert_eq!(child.wait().unwrap().code(), Some(expected));
        if !remove {
            assert_eq!(i32::from(bed.look(&record).exit.unwrap().code), expected);
            bed.containers.remove(&record.id, FORCE).unwrap();
        }
    }
}

fn signals_are_kept() {
    let bed = Bed::new();
    let script = "trap 'echo got TERM; exit 9' TERM; echo ready; while true; do sleep 0.01; done";
    let record = bed.containers.create(&bed.spec("kept", &["sh", "-c", script])).unwrap();
    let mut child = bed
        .command(&["test-start", "--no-sig-proxy", "kept"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15), "{status}");
    assert!(lines.next().is_none());
    assert_eq!(bed.look(&record).status, InstanceStatus::Running);
    bed.containers.stop(&record.id, None).unwrap();
    assert_eq!(bed.look(&record).exit.unwrap().code, 9);
    assert_eq!(bed.log(&record), "ready\ngot TERM\n");
}

fn stopping() {
    let bed = Bed::new();
    let stubborn = bed
        .run(&bed.spec("stubborn", &["sh", "-c", "trap '' TERM; echo ready; while true; do sleep 1; done"]));
    bed.wait_for_log(&stubborn, "ready");
    bed.containers.stop(&stubborn.id, Some(Duration::from_millis(300))).unwrap();
    assert_eq!(bed.look(&stubborn).exit.unwrap().code, 137);

    let mut spec =
        bed.spec("polite", &["sh", "-c", "trap 'exit 5' USR1; echo ready; while true; do sleep 0.01; done"]);
    spec.stop.signal = "USR1".into();
    let polite = bed.run(&spec);
    bed.wait_for_log(&polite, "ready");
    bed.containers.stop(&polite.id, None).unwrap();
    let record = bed.look(&polite);
    assert_eq!(record.exit.unwrap().code, 5);
    assert!(record.stopped_by_user);
}

fn pausing() {
    let bed = Bed::new();
    let script = "trap 'exit 4' TERM; while true; do echo tick; sleep 0.01; done";
    let record = bed.run(&bed.spec("clock", &["sh", "-c", script]));
    bed.wait_for_log(&record, "tick");
    bed.containers.pause(&record.id).unwrap();
    assert_eq!(bed.look(&record).status, InstanceStatus::Paused);
    assert_eq!(bed.containers.pause(&record.id).unwrap_err().kind(), ErrorKind::State);
    let before = bed.log(&record).len();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(bed.log(&record).len(), before);
    let output = bed.command(&["test-exec", "clock", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("paused"));
    bed.containers.resume(&record.id).unwrap();
    assert_eq!(bed.look(&record).status, InstanceStatus::Running);
    crate::bed::wait_until("it ticks again", || bed.log(&record).len() > before);
    bed.containers.pause(&record.id).unwrap();
    bed.containers.stop(&record.id, Some(Duration::from_secs(15))).unwrap();
    assert_eq!(bed.look(&record).exit.unwrap().code, 4, "the signal was heard");
}

fn ten_at_once() {
    let bed = Bed::new();
    let records: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..10)
            .map(|n| {
                let bed = &bed;
                scope.spawn(move || bed.run(&bed.spec(&format!("n{n}"), &["sh", "-c", &format!("exit {n}")])))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (n, record) in records.iter().enumerate() {
        assert_eq!(usize::from(bed.containers.wait(&record.id).unwrap().code), n);
    }
    assert_eq!(bed.containers.list().unwrap().len(), 10);
}

fn renaming() {
    let bed = Bed::new();
    let record =
        bed.run(&bed.spec("old", &["sh", "-c", "trap 'exit 0' TERM; while true; do sleep 0.01; done"]));
    bed.containers.rename(&record.id, "new").unwrap();
    assert_eq!(bed.containers.find("new").unwrap().id, record.id);
    assert_eq!(bed.containers.find("old").unwrap_err().kind(), ErrorKind::NotFound);
    bed.containers.stop(&record.id, None).unwrap();
    assert_eq!(bed.look(&record).spec.name, "new", "its supervisor has not written the old name back");
}

fn roots_persist() {
    let bed = Bed::new();
    let script = "cat /file /tmpfs/file 2>/dev/null; echo kept > /file; echo lost > /tmpfs/file; \
                  cat /etc/hostname; grep -c localhost /etc/hosts";
    let mut spec = bed.spec("disk", &["sh", "-c", script]);
    spec.hostname = Some("kilnhost".into());
    spec.mounts = vec![MountSpec {
        kind: MountKind::Tmpfs(TmpfsOptions::default()),
        target: "/tmpfs".into(),
        read_only: false,
    }];
    let record = bed.containers.create(&spec).unwrap();
    for before in ["", "kept\n"] {
        let output = bed.command(&["test-start", "disk"]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let rest = said.strip_prefix(before).unwrap_or_else(|| panic!("{said}"));
        assert!(rest.starts_with("kilnhost\n"), "{said}");
        assert!(!rest.contains("lost") && rest.lines().nth(1).is_some_and(|n| n != "0"), "{said}");
    }
    assert_eq!(bed.look(&record).restarts, 0);
}

fn wrong_states() {
    let bed = Bed::new();
    let record = bed.containers.create(&bed.spec("idle", &["sleep", "1000"])).unwrap();
    let id = &record.id;
    let kinds = [
        bed.containers.pause(id).unwrap_err().kind(),
        bed.containers.resume(id).unwrap_err().kind(),
        bed.containers.signal(id, 15).unwrap_err().kind(),
        bed.containers.stats(id).unwrap_err().kind(),
        bed.containers.top(id).unwrap_err().kind(),
    ];
    assert_eq!(kinds, [ErrorKind::State; 5]);
    bed.containers.start(id, StartMode::Detached).unwrap();
    wait_for_status(&bed, &record, InstanceStatus::Running);
    let error = bed.containers.remove(id, RemoveOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State);
    assert_eq!(bed.containers.resume(id).unwrap_err().kind(), ErrorKind::State);
    assert_eq!(bed.containers.signal(id, 99).unwrap_err().kind(), ErrorKind::Invalid);
    let output = bed.command(&["test-start", "idle"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("runs already"));
    bed.containers.remove(id, FORCE).unwrap();
    assert_eq!(bed.traces(&record), [""; 0]);
}
