//! A command that shows a workload's streams: the client of [`crate::control`].

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use kiln_contract::{BackendError, ExitStatus, Stdio};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::control::{self, Connection, Kind, Reply, Request};
use crate::keys::DetachKeys;
use crate::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};

/// What happens to the streams while attached.
#[derive(Debug)]
pub(crate) struct Manner {
    /// Where they go.
    pub(crate) stdio: Stdio,
    /// Send standard input.
    pub(crate) stdin: bool,
    /// The workload has a terminal.
    pub(crate) tty: bool,
    /// Keys that detach.
    pub(crate) keys: DetachKeys,
    /// Pass signals on, where the workload has no terminal.
    pub(crate) signal_proxy: bool,
}

/// How showing the streams ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The workload ended.
    Exited(ExitStatus),
    /// The user typed the detach keys.
    Detached,
    /// The supervisor went away without a word.
    Lost,
}

/// Signals that end the command, if they are not passed on.
const FATAL: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// Shows the streams over a connection that is attached, until that ends. The user's terminal is as it was when this
/// returns, and when a signal ends the process meanwhile.
pub(crate) fn show(mut connection: Connection, manner: Manner) -> Result<End, BackendError> {
    let fail =
        |error: io::Error| BackendError::caused("lost the connection to the workload's streams", error);
    let signals = Signals::take().map_err(fail)?;
    let Manner { stdio, stdin, tty, mut keys, signal_proxy } = manner;
    let raw = if tty && stdin { RawTerminal::enter(&stdio.stdin).map_err(fail)? } else { None };
    let mut input = stdin.then_some(stdio.stdin);
    let mut out = [Some(File::from(stdio.stdout)), Some(File::from(stdio.stderr))];
    // What waits to be sent: input is read only when nothing does.
    let mut unsent: Vec<u8> = Vec::new();
    loop {
        while let Some((kind, payload)) = connection.buffered().map_err(fail)? {
            match kind {
                Kind::Stdout | Kind::Stderr => {
                    if !write(&mut out[usize::from(kind == Kind::Stderr)], &payload) {
                        // The workload goes on: it is not this command's alone.
                        drop(raw);
                        drop(signals);
                        signals::die(libc::SIGPIPE);
                        return Ok(End::Detached);
                    }
                }
                Kind::Message => {
                    match control::parse(&payload).map_err(|error| fail(io::Error::other(error)))? {
                        Reply::Exited { status } => return Ok(End::Exited(status)),
                        Reply::Failed(failure) => return Err(failure.into()),
                        Reply::Done | Reply::Attached { .. } => {}
                    }
                }
                Kind::Stdin | Kind::StdinEnd => {}
            }
        }
        let mut fds = vec![
            PollFd::new(
                connection.socket(),
                if unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT },
            ),
            PollFd::from_borrowed_fd(signals.fd().as_fd(), PollFlags::IN),
        ];
        if let Some(input) = input.as_ref().filter(|_| unsent.is_empty()) {
            fds.push(PollFd::new(input, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(fail(error.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let readable = fds[0].revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        drop(fds);
        if ready[1] {
            while let Some(signal) = signals.next() {
                match signal {
                    libc::SIGCHLD => {}
                    libc::SIGWINCH if tty => {
                        let from =
                            input.iter().map(|fd| fd.as_fd()).chain(out.iter().flatten().map(AsFd::as_fd));
                        if let Some((rows, columns)) = terminal::size(from) {
                            unsent.extend(control::message(&Request::Resize { rows, columns }));
                        }
                    }
                    libc::SIGWINCH => {}
                    _ if signal_proxy && !tty => {
                        unsent.extend(control::message(&Request::Signal { signal }));
                    }
                    _ if FATAL.contains(&signal) => {
                        drop(raw);
                        drop(signals);
                        signals::die(signal);
                        return Ok(End::Detached);
                    }
                    _ => {}
                }
            }
        }
        if ready.get(2) == Some(&true)
            && let Some(fd) = &input
        {
            let mut buffer = [0; 16 << 10];
            match rustix::io::read(fd, &mut buffer) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok(read) if read > 0 => {
                    let (typed, detach) =
                        if tty { keys.filter(&buffer[..read]) } else { (buffer[..read].to_vec(), false) };
                    if !typed.is_empty() {
                        control::append(&mut unsent, Kind::Stdin, &typed);
                    }
                    if detach {
                        let _ = connection.send_bytes(&unsent);
                        return Ok(End::Detached);
                    }
                }
                _ => {
                    input = None;
                    control::append(&mut unsent, Kind::StdinEnd, b"");
                }
            }
        }
        if !unsent.is_empty() {
            match crate::socket::send(connection.socket(), &unsent, false) {
                Ok(sent) => {
                    unsent.drain(..sent);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                // It ended: what it still had to say is read below.
                Err(_) => {
                    unsent.clear();
                    input = None;
                }
            }
        }
        if readable && !connection.fill().map_err(fail)? {
            return Ok(End::Lost);
        }
    }
}

/// `false` if nobody reads it any more. What cannot be written for another reason (a full disk) is left out from then on.
fn write(to: &mut Option<File>, bytes: &[u8]) -> bool {
    let Some(Err(error)) = to.as_mut().map(|file| file.write_all(bytes)) else { return true };
    *to = None;
    error.kind() != io::ErrorKind::BrokenPipe
}
