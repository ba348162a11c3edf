//! Output, input and logs, without a terminal.

use std::io::{BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::process::Stdio;
use std::thread;

use kiln_contract::{LogQuery, LogStream, RuntimeBackend};

use crate::bed::{Bed, Test};

pub(crate) const TESTS: &[Test] = &[
    ("every byte of both streams is in the log, whatever it is", logs_keep_bytes),
    ("a log that is followed ends with its container", following),
    ("input reaches the workload to its last byte, and so does the output that it makes", through),
    ("an attached command sees what is written from then on, and how it ends", attaching),
    ("two that are attached see the same", two_attached),
    (
        "output that nobody reads any more ends who writes it in the foreground, and who shows it",
        nobody_reads,
    ),
    ("a further process has its own streams and exit code", exec),
];

fn logs_keep_bytes() {
    let bed = Bed::new();
    let script = r"printf 'one\ntwo\n'; printf '\377\000x\n' >&2; printf unfinished";
    let record = bed.run(&bed.spec("writer", &["sh", "-c", script]));
    bed.containers.wait(&record.id).unwrap();
    let mut streams = [Vec::new(), Vec::new()];
    let mut each = |line: kiln_contract::LogLine| {
        streams[usize::from(line.stream == LogStream::Stderr)].push(line.bytes);
        ControlFlow::Continue(())
    };
    bed.containers.logs(&record.id, &LogQuery::default(), &mut each).unwrap();
    assert_eq!(streams[0], [&b"one\n"[..], b"two\n", b"unfinished"]);
    assert_eq!(streams[1], [b"\xff\0x\n"]);
    let query = LogQuery { tail: Some(0), ..LogQuery::default() };
    bed.containers.logs(&record.id, &query, &mut |line| panic!("{line:?}")).unwrap();
}

fn following() {
    let bed = Bed::new();
    let mut spec = bed.spec("counter", &["sh", "-c", "read go; for i in $(seq 200); do echo $i; done"]);
    spec.process.stdin = true;
    let record = bed.run(&spec);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut lines = Vec::new();
            let query = LogQuery { follow: true, ..LogQuery::default() };
            bed.containers
                .logs(&record.id, &query, &mut |line| {
                    lines.push(String::from_utf8(line.bytes).unwrap());
                    ControlFlow::Continue(())
                })
                .unwrap();
            lines
        });
        let mut attached = bed
            .command(&["test-attach", "counter"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        attached.stdin.take().unwrap().write_all(b"go\n").unwrap();
        assert!(attached.wait().unwrap().success());
        let expected: Vec<String> = (1..=200).map(|n| format!("{n}\n")).collect();
        assert_eq!(reader.join().unwrap(), expected);
    });
}

fn through() {
    let bed = Bed::new();
    // More than all the pipes and buffers on the way can hold, of all byte values.
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for remove in [false, true] {
        let mut spec = bed.spec(if remove { "direct" } else { "pumped" }, &["cat"]);
        spec.process.stdin = true;
        spec.remove = remove;
        bed.containers.create(&spec).unwrap();
        let mut child = bed
            .command(&["test-start", &spec.name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut got = Vec::new();
        thread::scope(|scope| {
            let sent = &sent;
            scope.spawn(move || stdin.write_all(sent).unwrap());
            child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
        });
        assert!(child.wait().unwrap().success(), "{}", spec.name);
        assert!(got == sent, "{}: {} bytes of {}", spec.name, got.len(), sent.len());
    }
}

fn attaching() {
    let bed = Bed::new();
    let mut spec = bed.spec(
        "echo",
        &["sh", "-c", "echo before; while read line; do echo got $line; test $line = end && exit 6; done"],
    );
    spec.process.stdin = true;
    let record = bed.run(&spec);
    bed.wait_for_log(&record, "before");
    for (input, code) in [("one\n", None), ("two\nend\n", Some(6))] {
        let mut child = bed
            .command(&["test-attach", "echo"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        let mut stdout = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        let first = stdout.next().unwrap().unwrap();
        assert_eq!(first, format!("got {}", input.lines().next().unwrap()));
        match code {
            // The command goes, the container stays: its input is not closed with the command's.
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
            }
            Some(code) => assert_eq!(child.wait().unwrap().code(), Some(code)),
        }
    }
    assert_eq!(bed.containers.wait(&record.id).unwrap().code, 6);
    assert_eq!(bed.log(&record), "before\ngot one\ngot two\ngot end\n");
}

fn two_attached() {
    let bed = Bed::new();
    let script = "while read word; do echo $word; [ $word = end ] && break; done; echo oops >&2";
    let mut spec = bed.spec("both", &["sh", "-c", script]);
    spec.process.stdin = true;
    bed.run(&spec);
    let attach = || {
        bed.command(&["test-attach", "both"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut children = [attach(), attach()];
    let mut outputs = children.each_mut().map(|child| BufReader::new(child.stdout.take().unwrap()));
    let mut typist = children[1].stdin.take().unwrap();
    // Whoever attaches sees what comes from then on: each is attached once it has seen something. The second types, so it
    // is asked first.
    for output in outputs.iter_mut().rev() {
        let (seen, wait) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut line = String::new();
                output.read_line(&mut line).unwrap();
                seen.send(line).unwrap();
            });
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) =
                wait.recv_timeout(std::time::Duration::from_millis(50))
            {
                typist.write_all(b"ping\n").unwrap();
            }
        });
    }
    typist.write_all(b"end\n").unwrap();
    for (child, mut output) in children.into_iter().zip(outputs) {
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!(rest.trim_start_matches("ping\n"), "end\n");
        assert_eq!(child.wait_with_output().unwrap().stderr, b"oops\n");
    }
}

fn nobody_reads() {
    use std::os::unix::process::ExitStatusExt as _;
    let bed = Bed::new();
    let first_line = |words: &[&str]| {
        let mut command = bed.command(words);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut byte = [0];
        child.stdout.take().unwrap().read_exact(&mut byte).unwrap();
        let mut status = None;
        crate::bed::wait_until("the command ends", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    };
    // Not removed at its end, so that its output passes through the command. `yes` says why, and fails.
    let record = bed.containers.create(&bed.spec("yes", &["yes"])).unwrap();
    assert_eq!(first_line(&["test-start", "yes"]).code(), Some(1));
    assert_eq!(bed.look(&record).exit.unwrap().code, 1);

    let record = bed.run(&bed.spec("ticks", &["sh", "-c", "while true; do echo tick; sleep 0.01; done"]));
    assert_eq!(first_line(&["test-attach", "ticks"]).signal(), Some(13));
    assert_eq!(bed.look(&record).status, kiln_contract::InstanceStatus::Running);
}

fn exec() {
    let bed = Bed::new();
    bed.run(&bed.spec("base", &["sleep", "1000"]));
    let table: [(&[&str], Option<i32>, &str); 4] = [
        (&["echo", "hi"], Some(0), "hi\n"),
        (&["sh", "-c", "cat; exit 9"], Some(9), "input"),
        (&["sh", "-c", "kill -9 $$"], Some(137), ""),
        (&["no-such-command"], Some(127), ""),
    ];
    for (args, code, said) in table {
        let words = [&["test-exec", "base"], args].concat();
        let mut child = bed
            .command(&words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Those that do not read it may have ended already.
        let _ = child.stdin.take().unwrap().write_all(b"input");
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), code, "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), said, "{args:?}");
    }
}
