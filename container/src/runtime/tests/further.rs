//! Further processes, terminals, and joining a network.

use std::fs::File;
use std::io::{Read, Write};

use kiln_contract::{ExecSpec, RuntimeChoice};

use super::bed::{Bed, own, pipes, runtimes, wait};
use crate::runtime::{NetworkNamespace, RuntimeError, Streams, choose};

#[test]
fn further_processes_are_in_the_container() {
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["sleep", "60"]) else { return };
        bed.record.spec.process.env = own(&["A=1", "B=1"]);
        bed.record.spec.hostname = Some("box".into());
        let (streams, _ours) = pipes();
        bed.launch(streams).unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
        type Change = fn(&mut ExecSpec);
        let cases: [(&str, Change, &str); 6] = [
            ("hostname; cat /proc/1/comm", |_| {}, "box\nsleep"),
            ("echo $A $B $C", |exec| exec.env = own(&["B=2", "C=3"]), "1 2 3"),
            (
                "id -u; id -G; pwd",
                |exec| {
                    exec.user = Some("app".into());
                    exec.cwd = Some("/var/www".into());
                },
                "1000\n1000 50\n/var/www",
            ),
            (
                "sed -n 's/^\\(CapEff\\|NoNewPrivs\\|Seccomp\\):\\t0*/\\1 /p' /proc/self/status",
                |_| {},
                "CapEff a80425fb\nNoNewPrivs 1\nSeccomp 2",
            ),
            (
                "test $(sed -n 's/^CapEff:\\t0*//p' /proc/self/status) != a80425fb && echo more",
                |exec| exec.privileged = true,
                "more",
            ),
            ("ls /proc/self/fd | wc -l", |_| {}, "4"),
        ];
        for (script, change, expected) in cases {
            let outcome = bed
                .exec(&["sh", "-c", script], change)
                .unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
            assert_eq!(outcome.stdout.trim_end(), expected, "{script} by {runtime:?}: {outcome:?}");
        }
        assert_eq!(bed.exec(&["sh", "-c", "exit 9"], |_| {}).unwrap().code, 9, "{runtime:?}");
        let lost = bed.exec(&["true"], |exec| exec.cwd = Some("/no/such".into())).map(|outcome| outcome.code);
        assert!(!matches!(lost, Ok(0)) && !bed.root.join("no").exists(), "{runtime:?}: {lost:?}");
        if let Some(cgroup) = bed.cgroup() {
            let (streams, _ours) = pipes();
            let spec = ExecSpec { args: own(&["sleep", "60"]), ..ExecSpec::default() };
            let executed = choose(&runtime).unwrap().exec(&bed.record, &bed.dir, &spec, streams).unwrap();
            assert!(cgroup.processes().unwrap().contains(&executed.process.pid), "{runtime:?}");
            cgroup.kill().unwrap();
            assert_eq!(wait(executed.process), 137, "{runtime:?}");
        }
    }
}

#[test]
fn further_commands_that_are_not_there_are_told() {
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["sleep", "60"]) else { return };
        let (streams, _ours) = pipes();
        bed.launch(streams).unwrap();
        let missing = bed.exec(&["nope"], |_| {});
        assert!(matches!(missing, Err(RuntimeError::CommandNotFound { .. })), "{runtime:?}: {missing:?}");
        let refused = bed.exec(&["/etc/passwd"], |_| {});
        assert!(
            matches!(refused, Err(RuntimeError::CommandNotExecutable { .. })),
            "{runtime:?}: {refused:?}"
        );
    }
}

#[test]
fn nothing_runs_in_a_container_that_has_ended() {
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["true"]) else { return };
        bed.run().unwrap();
        assert!(bed.exec(&["true"], |_| {}).is_err(), "{runtime:?}");
    }
}

#[test]
fn a_terminal_is_the_containers_and_has_the_size_that_is_asked_for() {
    for runtime in runtimes() {
        let script =
            "tty; stty size; echo $TERM; test -w /dev/console && echo console; read line; echo got $line";
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        bed.record.spec.process.tty = true;
        let created = bed.launch(Streams::Terminal { size: Some((33, 77)) }).unwrap();
        let mut terminal = File::from(created.terminal.unwrap());
        terminal.write_all(b"hello\n").unwrap();
        let text = read_terminal(&mut terminal);
        assert_eq!(wait(created.process), 0, "{runtime:?}: {text}");
        bed.record.process = None;
        for part in ["/dev/pts/0\r\n", "33 77\r\n", "xterm\r\n", "console\r\n", "got hello\r\n"] {
            assert!(text.contains(part), "{runtime:?}: {text}");
        }
    }
}

#[test]
fn a_further_process_has_a_terminal_of_its_own() {
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["sleep", "60"]) else { return };
        let (streams, _ours) = pipes();
        bed.launch(streams).unwrap();
        let script = "stty size; tty; echo mine >/dev/tty; stat -c %u $(tty)";
        let spec = ExecSpec {
            args: own(&["sh", "-c", script]),
            tty: true,
            user: Some("app".into()),
            ..ExecSpec::default()
        };
        let runtime_value = choose(&runtime).unwrap();
        let streams = Streams::Terminal { size: Some((20, 60)) };
        let executed = runtime_value.exec(&bed.record, &bed.dir, &spec, streams).unwrap();
        let text = read_terminal(&mut File::from(executed.terminal.unwrap()));
        wait(executed.process);
        // crun leaves it to root.
        let owner = if runtime == RuntimeChoice::Native { "1000\r\n" } else { "" };
        for part in ["/dev/pts/0\r\n", "mine\r\n", owner] {
            assert!(text.contains(part), "{runtime:?}: {text}");
        }
    }
}

/// Everything until the other side is closed, which terminals tell by an error.
fn read_terminal(terminal: &mut File) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = terminal.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_container_can_join_another_ones_network() {
    for runtime in runtimes() {
        let Some(mut first) = Bed::new(&runtime, &["sleep", "60"]) else { return };
        let (streams, _ours) = pipes();
        first.launch(streams).unwrap();
        let Some(mut second) = Bed::new(&runtime, &["readlink", "/proc/self/ns/net"]) else { return };
        let path = format!("/proc/{}/ns/net", first.record.process.unwrap().pid);
        second.network = NetworkNamespace::Join(path.clone().into());
        let seen = second.run().unwrap().stdout;
        assert_eq!(seen.trim(), std::fs::read_link(path).unwrap().to_str().unwrap(), "{runtime:?}");
    }
}

#[test]
fn a_container_can_have_the_hosts_network() {
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["readlink", "/proc/self/ns/net"]) else { return };
        bed.network = NetworkNamespace::Host;
        let seen = bed.run().unwrap().stdout;
        assert_eq!(
            seen.trim(),
            std::fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap(),
            "{runtime:?}"
        );
    }
}
