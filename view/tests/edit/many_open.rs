//! More files open at once than anybody has descriptors for.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdout, Command, Stdio};

use crate::ground::{ALL, Backend, Edited, with_ground_of_many};

/// How many files are to be open at once.
const OPEN: usize = 100_000;
/// How many different ones they are.
const DIFFERENT: usize = 1000;
/// How many descriptors a server may have meanwhile: those of the objects that were read last, and some of its own. It is fewer
/// than these and as many as have the same file open.
const DESCRIPTORS: usize = 140;

/// Opens files to read, and waits. What they hold is theirs alone.
const OPEN_MANY: &str = r#"
import sys
top, first, count, different = sys.argv[1], *map(int, sys.argv[2:])
numbers = [number % different for number in range(first, first + count)]
files = [open(f"{top}/many/{number}", "rb", buffering=0) for number in numbers]
print("open", flush=True)
sys.stdin.readline()
for number, file in list(zip(numbers, files))[::7]:
    assert file.read() == b"%d\n" % number * 40, number
print("read", flush=True)
"#;

#[test]
fn a_hundred_thousand_files_are_open_at_once_in_a_view_that_is_not_edited() {
    many_are_open(Backend::Fuse, false);
}

#[test]
fn a_hundred_thousand_files_are_open_at_once_in_an_editable_view_whose_server_has_few_descriptors() {
    ALL.into_iter().for_each(|backend| many_are_open(backend, true));
}

fn many_are_open(backend: Backend, editable: bool) {
    let Some(python) = kiln_fixtures::require("python3") else { return };
    with_ground_of_many(backend, DIFFERENT, move |ground| {
        let mounted = if editable { ground.edit() } else { Edited::Fuse(ground.serve(None)) };
        let server = mounted.server();
        // Nobody may have all of them: who may not raise limits has several processes.
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let each = usize::try_from(most).unwrap_or(usize::MAX).min(OPEN + 100) - 100;
        let mut processes = Vec::new();
        for first in (0..OPEN).step_by(each) {
            let mut child = Command::new(&python)
                .args(["-c", OPEN_MANY])
                .arg(ground.at("view"))
                .args([first, each.min(OPEN - first), DIFFERENT].map(|number| number.to_string()))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let said = BufReader::new(child.stdout.take().unwrap());
            processes.push((child, said));
        }
        let hear = |said: &mut BufReader<ChildStdout>, word: &str| {
            let mut line = String::new();
            said.read_line(&mut line).unwrap();
            assert_eq!(line.trim_end(), word);
        };
        processes.iter_mut().for_each(|(_, said)| hear(said, "open"));
        if editable {
            // Who has a file open reads on when it is copied up, and when it is removed.
            drop(fs::File::options().append(true).open(ground.at("view/many/5")).unwrap());
            fs::remove_file(ground.at("view/many/6")).unwrap();
        }
        if let Some(server) = server {
            let few = fs::read_dir(format!("/proc/{server}/fd")).unwrap().count();
            assert!(few < DESCRIPTORS, "{backend:?}: {few} descriptors for {OPEN} files");
        }
        for (child, said) in &mut processes {
            child.stdin.take().unwrap().write_all(b"go\n").unwrap();
            hear(said, "read");
            assert!(child.wait().unwrap().success());
        }
        mounted.unmount().unwrap();
    });
}
