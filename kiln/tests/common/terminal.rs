//! A terminal of this host, for commands that are typed at.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A terminal of this host: its near side, and what is on it.
pub(crate) struct Terminal {
    near: OwnedFd,
    far: File,
    /// All that was shown on it so far.
    pub(crate) seen: String,
}

impl Terminal {
    pub(crate) fn open(rows: u16, columns: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let near = ioctl_tiocgptpeer(&master, flags).unwrap();
        let terminal = Self { near, far: master.into(), seen: String::new() };
        terminal.resize(rows, columns);
        terminal
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.near, size).unwrap();
    }

    /// Starts a command on it.
    pub(crate) fn start(&self, mut command: Command) -> Child {
        let end = || Stdio::from(self.near.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap()
    }

    pub(crate) fn type_in(&mut self, words: &str) {
        self.far.write_all(words.as_bytes()).unwrap();
    }

    /// Waits for words; those that were seen before count too.
    #[track_caller]
    pub(crate) fn expect(&mut self, words: &str) {
        let begun = Instant::now();
        let mut buffer = [0; 4096];
        while !self.seen.contains(words) {
            let mut waited = [PollFd::new(&self.far, PollFlags::IN)];
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            if poll(&mut waited, Some(&second)).unwrap() == 0 {
                assert!(begun.elapsed() < Duration::from_secs(60), "no `{words}` in {}", self.seen);
                continue;
            }
            let count = self.far.read(&mut buffer).unwrap();
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }
}
