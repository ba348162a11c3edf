//! Those who are connected to a supervisor: over its control socket, or the terminal that it was started from.

use std::io;
use std::os::fd::OwnedFd;

use kiln_contract::{ExitStatus, LogStream, Stdio};
use rustix::io::Errno;
use serde::Serialize;

use crate::control::{self, Attach, ControlError, Frames, Kind};
use crate::streams::Backlog;

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// It may ask for anything.
    Asking,
    /// It sees the workload's streams.
    Attached(Attach),
    /// It waits until the workload has ended.
    Waiting {
        /// Because it asked for that end: answered with `Done`, not with the exit status.
        stopping: bool,
    },
}

/// One connection.
#[derive(Debug)]
pub(super) struct Client {
    socket: OwnedFd,
    frames: Frames,
    output: Backlog,
    pub(super) role: Role,
    /// Cut off as soon as it has what it is to get.
    closing: bool,
    dead: bool,
}

impl Client {
    /// A connection whose socket does not block.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            frames: Frames::default(),
            output: Backlog::default(),
            role: Role::Asking,
            closing: false,
            dead: false,
        }
    }

    /// To be polled.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether it is attached and sends its standard input.
    pub(super) fn gives_input(&self) -> bool {
        matches!(&self.role, Role::Attached(attach) if attach.stdin)
    }

    /// Whether it takes too long to read what it is sent.
    pub(super) fn is_slow(&self) -> bool {
        self.output.is_full()
    }

    /// Whether something waits to be sent.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether it is to be forgotten.
    pub(super) fn is_gone(&self) -> bool {
        self.dead || (self.closing && self.output.is_empty())
    }

    /// Takes in what it sent.
    pub(super) fn read(&mut self) {
        let mut buffer = [0; 16 << 10];
        match rustix::io::read(&self.socket, &mut buffer) {
            Ok(0) => self.dead = true,
            Ok(read) => self.frames.push(&buffer[..read]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.dead = true,
        }
    }

    /// What it said, frame by frame.
    pub(super) fn next(&mut self) -> Result<Option<(Kind, Vec<u8>)>, ControlError> {
        if self.closing { Ok(None) } else { self.frames.next() }
    }

    /// Tells it something.
    pub(super) fn tell<T: Serialize>(&mut self, message: &T) {
        self.output.push(&control::message(message));
        self.write();
    }

    /// Tells it something, and no more after that.
    pub(super) fn dismiss<T: Serialize>(&mut self, message: &T) {
        self.tell(message);
        self.closing = true;
    }

    /// Shows it what the workload wrote.
    pub(super) fn show(&mut self, stream: LogStream, bytes: &[u8]) {
        let kind = match stream {
            LogStream::Stdout => Kind::Stdout,
            LogStream::Stderr => Kind::Stderr,
        };
        let mut frame = Vec::with_capacity(bytes.len() + 8);
        control::append(&mut frame, kind, bytes);
        self.output.push(&frame);
        self.write();
    }

    /// Sends what waits, as much as it takes now.
    pub(super) fn write(&mut self) {
        while !self.output.is_empty() && !self.dead {
            match self.output.send_to(&self.socket) {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => self.dead = true,
            }
        }
    }
}

/// The streams of the command that supervises in the foreground.
#[derive(Debug)]
pub(super) struct Console {
    /// Until its end.
    pub(super) stdin: Option<OwnedFd>,
    out: [(OwnedFd, Backlog); 2],
}

impl Console {
    /// Of these streams; standard input only if the workload reads it.
    pub(super) fn new(stdio: Stdio, reads: bool) -> Self {
        Self {
            stdin: reads.then_some(stdio.stdin),
            out: [(stdio.stdout, Backlog::default()), (stdio.stderr, Backlog::default())],
        }
    }

    /// Shows what the workload wrote, as soon as it can be.
    pub(super) fn show(&mut self, stream: LogStream, bytes: &[u8]) {
        self.out[stream as usize].1.push(bytes);
    }

    /// Whether so much waits that the workload should not write more.
    pub(super) fn is_slow(&self) -> bool {
        self.out.iter().any(|(_, waiting)| waiting.is_full())
    }

    /// Where something waits to be written.
    pub(super) fn waiting(&self) -> impl Iterator<Item = (LogStream, &OwnedFd)> {
        [LogStream::Stdout, LogStream::Stderr]
            .into_iter()
            .zip(&self.out)
            .filter(|(_, (_, waiting))| !waiting.is_empty())
            .map(|(stream, (fd, _))| (stream, fd))
    }

    /// Writes to a stream that is ready. `false` if nobody reads it any more.
    pub(super) fn write(&mut self, stream: LogStream) -> bool {
        let (fd, waiting) = &mut self.out[stream as usize];
        match waiting.write_to(fd) {
            Ok(()) => true,
            Err(error) => {
                // A full disk, say: the workload goes on unseen.
                waiting.clear();
                error.kind() != io::ErrorKind::BrokenPipe
            }
        }
    }

    /// Writes all that is left, however long it takes.
    pub(super) fn finish(&mut self) {
        use rustix::event::{PollFd, PollFlags, poll};
        for (fd, waiting) in &mut self.out {
            while !waiting.is_empty() {
                // A descriptor that somebody made non-blocking would be asked over and over otherwise.
                let ready = poll(&mut [PollFd::new(fd, PollFlags::OUT)], None);
                if matches!(ready, Err(error) if error != Errno::INTR) || waiting.write_to(fd).is_err() {
                    waiting.clear();
                }
            }
        }
    }
}

impl Backlog {
    /// Sends once to a socket that does not block. `false` if it takes nothing now.
    fn send_to(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        match crate::socket::send(socket, self.front(), false) {
            Ok(sent) => {
                self.taken(sent);
                Ok(true)
            }
            Err(Errno::AGAIN) => Ok(false),
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

/// How the end of a workload is told to one who waits for it.
pub(super) fn farewell(role: &Role, status: &ExitStatus) -> control::Reply {
    match role {
        Role::Waiting { stopping: true } => control::Reply::Done,
        _ => control::Reply::Exited { status: status.clone() },
    }
}
