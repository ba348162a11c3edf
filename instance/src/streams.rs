//! The two sides of a workload's standard streams: what it is given, and the supervisor's ends.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use kiln_contract::{LogStream, ProcessSpec};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// While this much waits to be taken by somebody, no more is read from who gives it.
pub const BACKLOG: usize = 256 << 10;
/// A pipe that is ready to be written to takes this much without blocking (`PIPE_BUF`).
const ATOMIC: usize = 4096;

/// The workload's ends of its standard streams.
#[derive(Debug)]
pub enum Streams {
    /// These; `/dev/null` for what is not wanted.
    Pipes {
        /// Read by the workload.
        stdin: OwnedFd,
        /// Written by the workload.
        stdout: OwnedFd,
        /// Written by the workload.
        stderr: OwnedFd,
    },
    /// A new terminal of this many rows and columns; its master comes back.
    Terminal {
        /// Rows and columns, if they are known yet.
        size: Option<(u16, u16)>,
    },
}

/// What the workload's streams are to be.
#[derive(Debug)]
pub enum Wiring {
    /// These themselves: nothing passes through the supervisor, and nothing is logged.
    Direct {
        /// Taken as they are.
        stdin: OwnedFd,
        /// Taken as they are.
        stdout: OwnedFd,
        /// Taken as they are.
        stderr: OwnedFd,
    },
    /// Pipes, or a terminal of this size, as the specification says.
    Pumped {
        /// Rows and columns.
        size: Option<(u16, u16)>,
    },
}

impl Wiring {
    /// Makes the streams of a workload: its ends, and ours. The master of a terminal is still to come to ours, from who
    /// makes it.
    ///
    /// # Errors
    /// If there can be no more descriptors.
    pub fn connect(self, spec: &ProcessSpec) -> io::Result<(Streams, Ends)> {
        match self {
            Self::Direct { stdin, stdout, stderr } => {
                let stdin = if spec.stdin { stdin } else { null()? };
                Ok((Streams::Pipes { stdin, stdout, stderr }, Ends::default()))
            }
            Self::Pumped { size } if spec.tty => Ok((Streams::Terminal { size }, Ends::default())),
            Self::Pumped { .. } => {
                let (stdin, our_stdin) = if spec.stdin {
                    let (read, write) = pipe()?;
                    set_nonblocking(&write)?;
                    (read, Some(write))
                } else {
                    (null()?, None)
                };
                let (our_stdout, stdout) = pipe()?;
                let (our_stderr, stderr) = pipe()?;
                set_nonblocking(&our_stdout)?;
                set_nonblocking(&our_stderr)?;
                let ends = Ends {
                    stdin: our_stdin,
                    stdout: Some(our_stdout),
                    stderr: Some(our_stderr),
                    ..Ends::default()
                };
                Ok((Streams::Pipes { stdin, stdout, stderr }, ends))
            }
        }
    }
}

/// Bytes that wait for a file descriptor to take them.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: VecDeque<u8>,
}

impl Backlog {
    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether so much waits that no more should come.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= BACKLOG
    }

    /// What is to be written next.
    pub(crate) fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// So much of it was.
    pub(crate) fn taken(&mut self, count: usize) {
        self.bytes.drain(..count);
        if self.bytes.is_empty() {
            // A burst must not keep its memory for the life of a supervisor.
            self.bytes.shrink_to(ATOMIC);
        }
    }

    /// Writes once, at most so much that a descriptor that is ready takes it even if it is not non-blocking.
    pub fn write_to(&mut self, to: &OwnedFd) -> io::Result<()> {
        let front = self.front();
        match rustix::io::write(to, &front[..front.len().min(ATOMIC)]) {
            Ok(written) => {
                self.taken(written);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets what waits.
    pub fn clear(&mut self) {
        self.bytes = VecDeque::new();
    }
}

/// Our ends, by what the workload was given.
#[derive(Debug, Default)]
pub struct Ends {
    /// A terminal's master: input and output.
    pub terminal: Option<OwnedFd>,
    /// Written by us.
    pub stdin: Option<OwnedFd>,
    /// Read by us.
    pub stdout: Option<OwnedFd>,
    /// Read by us.
    pub stderr: Option<OwnedFd>,
    /// What waits for the workload to read it.
    pub input: Backlog,
    /// No more input will come: close it when all is written.
    pub input_ended: bool,
}

impl Ends {
    /// Where its input goes, while it is open.
    pub fn input(&self) -> Option<&OwnedFd> {
        self.terminal.as_ref().or(self.stdin.as_ref())
    }

    /// Where one of its output streams comes from, while it is open. All of a terminal's is standard output.
    pub fn output(&self, stream: LogStream) -> Option<&OwnedFd> {
        match stream {
            LogStream::Stdout => self.terminal.as_ref().or(self.stdout.as_ref()),
            LogStream::Stderr => self.stderr.as_ref(),
        }
    }

    /// Writes what waits for the workload, as much as it takes now.
    pub fn write_input(&mut self) {
        if !self.input.is_empty() {
            let Self { terminal, stdin, input, .. } = self;
            let done = match terminal.as_ref().or(stdin.as_ref()) {
                Some(to) => input.write_to(to),
                None => Err(Errno::PIPE.into()),
            };
            if done.is_err() {
                // It does not read any more; a terminal's master stays for what it writes.
                self.input.clear();
                self.input_ended = true;
            }
        }
        if self.input_ended && self.input.is_empty() {
            self.stdin = None;
        }
    }

    /// Reads once from an output stream; `None` if nothing is there now. A stream that has ended is closed.
    pub fn read<'b>(&mut self, stream: LogStream, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
        let from = self.output(stream)?;
        match rustix::io::read(from, &mut *buffer) {
            Ok(0) => {}
            Ok(read) => return Some(&buffer[..read]),
            Err(Errno::AGAIN | Errno::INTR) => return None,
            // A terminal whose last other side was closed gives EIO.
            Err(_) => {}
        }
        match stream {
            LogStream::Stdout if self.terminal.is_some() => self.terminal = None,
            LogStream::Stdout => self.stdout = None,
            LogStream::Stderr => self.stderr = None,
        }
        None
    }
}

/// Reads and writes of this descriptor (and all that share its description) do not wait any more.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl_getfl(fd)?;
    Ok(fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// A pipe: what is read, what is written.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    #[cfg(target_os = "linux")]
    return Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?);
    // A process that another thread starts in between inherits it: there is no one call for both here.
    #[cfg(not(target_os = "linux"))]
    {
        let (read, write) = rustix::pipe::pipe()?;
        for end in [&read, &write] {
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
        }
        Ok((read, write))
    }
}

/// Gives the end of input, and swallows output.
pub fn null() -> io::Result<OwnedFd> {
    Ok(std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_closed_after_its_last_byte_not_before() {
        let (read, write) = pipe().unwrap();
        set_nonblocking(&write).unwrap();
        let mut ends = Ends { stdin: Some(write), ..Ends::default() };
        let sent = vec![3; 200_000];
        ends.input.push(&sent);
        ends.input_ended = true;
        let mut got = Vec::new();
        let mut buffer = [0; 5000];
        loop {
            ends.write_input();
            if ends.stdin.is_none() {
                io::Read::read_to_end(&mut std::fs::File::from(read), &mut got).unwrap();
                break;
            }
            let read = rustix::io::read(&read, &mut buffer).unwrap();
            got.extend_from_slice(&buffer[..read]);
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_workload_that_does_not_read_costs_no_memory() {
        let (read, write) = pipe().unwrap();
        let mut ends = Ends { stdin: Some(write), ..Ends::default() };
        drop(read);
        ends.input.push(b"for nobody");
        ends.write_input();
        assert!(ends.stdin.is_none() && ends.input.is_empty());
    }
}
