//! Containers with a terminal, seen through a real one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use kiln_contract::{InstanceStatus, RuntimeBackend};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::bed::{Bed, Test, wait_until};

pub(crate) const TESTS: &[Test] = &[
    ("the detach keys leave a container running, and its terminal can be taken up again", detaching),
    ("the user's terminal is restored however an attachment ends", restored),
    ("a terminal has the size of the user's, and follows it", sizes),
    ("a further process with a terminal can be left running", exec_detached),
];

/// A user at a terminal, with one command running on it.
struct User {
    master: File,
    slave: OwnedFd,
    seen: Arc<Mutex<String>>,
    child: Child,
}

impl User {
    fn runs(bed: &Bed, words: &[&str], (rows, columns): (u16, u16)) -> Self {
        let master =
            rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let slave: OwnedFd =
            File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap().into();
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size).unwrap();
        let stream = || Stdio::from(slave.try_clone().unwrap());
        let mut command = bed.command(words);
        command.stdin(stream()).stdout(stream()).stderr(stream());
        let child = command.spawn().unwrap();
        let master = File::from(master);
        let seen = Arc::new(Mutex::new(String::new()));
        let (mut reader, shown) = (master.try_clone().unwrap(), Arc::clone(&seen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        Self { master, slave, seen, child }
    }

    fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn sees(&self, text: &str) {
        wait_until(&format!("{text:?} on the terminal, which shows {:?}", self.seen.lock().unwrap()), || {
            self.seen.lock().unwrap().contains(text)
        });
    }

    /// Whether what is typed is shown and waits for the end of its line, as terminals are when no program changed them.
    fn is_cooked(&self) -> bool {
        tcgetattr(self.slave.as_fd()).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    fn is_raw(&self) {
        wait_until("the terminal is raw", || !self.is_cooked());
    }

    fn ends(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

fn shell(bed: &Bed, name: &str) -> kiln_contract::InstanceRecord {
    let mut spec = bed.spec(name, &["sh"]);
    spec.process.tty = true;
    spec.process.stdin = true;
    bed.containers.create(&spec).unwrap()
}

fn detaching() {
    let bed = Bed::new();
    let record = shell(&bed, "shell");
    let mut user = User::runs(&bed, &["test-start", "shell"], (24, 80));
    user.is_raw();
    user.types("echo $((40+2)); tty\n");
    user.sees("42");
    user.types("\x10\x11");
    assert_eq!(user.ends(), Some(42), "detached");
    assert!(user.is_cooked());
    assert_eq!(bed.look(&record).status, InstanceStatus::Running);

    let mut user = User::runs(&bed, &["test-attach", "shell"], (24, 80));
    user.is_raw();
    // One key of the sequence alone is just that key.
    user.types("echo again $((1+1))\n");
    user.sees("again 2");
    user.types("exit 5\n");
    assert_eq!(user.ends(), Some(5));
    assert!(user.is_cooked());
    assert_eq!(bed.look(&record).exit.unwrap().code, 5);
    assert!(bed.log(&record).contains("again 2"));
}

fn restored() {
    let bed = Bed::new();
    let record = shell(&bed, "shell");
    // By a signal from outside.
    let mut user = User::runs(&bed, &["test-start", "shell"], (24, 80));
    user.is_raw();
    let pid = rustix::process::Pid::from_raw(user.child.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(user.ends(), None, "ended by the signal");
    assert!(user.is_cooked());
    assert_eq!(bed.look(&record).status, InstanceStatus::Running);
    // By the end of the supervisor.
    let mut user = User::runs(&bed, &["test-attach", "shell"], (24, 80));
    user.is_raw();
    crate::bed::kill(bed.look(&record).supervisor.unwrap());
    assert_eq!(user.ends(), Some(137));
    assert!(user.is_cooked());
}

fn sizes() {
    let bed = Bed::new();
    shell(&bed, "shell");
    let mut user = User::runs(&bed, &["test-start", "shell"], (31, 99));
    user.is_raw();
    user.types("stty size\n");
    user.sees("31 99");
    let size = Winsize { ws_row: 17, ws_col: 55, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&user.slave, size).unwrap();
    // The terminal is nobody's controlling terminal here, so that the kernel tells nobody.
    let pid = rustix::process::Pid::from_raw(user.child.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    user.types("sleep 0.1; stty size\n");
    user.sees("17 55");
    user.types("exit\n");
    assert_eq!(user.ends(), Some(0));
}

fn exec_detached() {
    let bed = Bed::new();
    let record = bed.run(&bed.spec("base", &["sleep", "1000"]));
    let mut user = User::runs(&bed, &["test-exec", "base", "sh"], (24, 80));
    user.is_raw();
    user.types("stty size; sleep 0.3; touch /still-here; exec sleep 999\n");
    user.sees("24 80");
    user.types("\x10\x11");
    assert_eq!(user.ends(), Some(42));
    assert!(user.is_cooked());
    wait_until("the process went on", || {
        bed.command(&["test-exec", "base", "test", "-e", "/still-here"]).status().unwrap().success()
    });
    // The file is there a moment before the shell becomes what it sleeps in.
    wait_until("the process is the last that was typed", || {
        let rows = bed.containers.top(&record.id).unwrap().rows;
        rows.iter().any(|row| row.last().unwrap() == "sleep 999")
    });

    let mut user = User::runs(&bed, &["test-exec", "base", "sh"], (24, 80));
    user.is_raw();
    user.types("exit 3\n");
    assert_eq!(user.ends(), Some(3));
}
