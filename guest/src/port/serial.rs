//! A virtio-serial port.
//!
//! A port whose host has gone reads as if it had ended and says that it hung up, until another host comes; for a machine that
//! was restored, that is the ordinary course of things. tokio never forgets that a descriptor hung up, so while no host is
//! there the port is taken out of its hands and looked at now and then.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use tokio::io::ReadBuf;
use tokio::io::unix::AsyncFd;
use tokio::time::Sleep;

use super::watched;
use crate::failure::{Doing as _, Failure, failed};

/// The name that the host gave the port.
const NAME: &str = "kiln.link";
/// Between two looks for a host.
const LOOK: Duration = Duration::from_millis(1);
/// How long the driver may take to find the port.
const PATIENCE: Duration = Duration::from_secs(10);

/// An open port.
#[derive(Debug)]
pub(super) struct Port {
    state: State,
    /// How often what is waited for was replaced.
    pub(super) changes: u64,
}

#[derive(Debug)]
enum State {
    Here(AsyncFd<File>),
    Away(File, Pin<Box<Sleep>>),
    /// Only while one becomes the other.
    Between,
}

impl Port {
    /// Finds the port by its name (its number depends on what other devices there are) and opens it.
    pub(super) fn open() -> Result<Self, Failure> {
        let begun = std::time::Instant::now();
        let path = loop {
            if let Some(path) = find() {
                break path;
            }
            if begun.elapsed() > PATIENCE {
                return Err(failed("find the link", format_args!("no port is named {NAME}")));
            }
            std::thread::sleep(LOOK);
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .doing(format_args!("open {path}"))?;
        Ok(Self::of(file))
    }

    /// A port that is open, and must not block.
    pub(super) fn of(file: File) -> Self {
        Self { state: State::Away(file, Box::pin(tokio::time::sleep(Duration::ZERO))), changes: 0 }
    }

    /// The port, once there is a host.
    fn poll_here(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&AsyncFd<File>>> {
        while let State::Away(file, sleep) = &mut self.state {
            ready!(sleep.as_mut().poll(context));
            // A timer knows one who waits for it.
            self.changes += 1;
            let hung_up = {
                let mut looked = [PollFd::new(file, PollFlags::IN)];
                poll(&mut looked, Some(&rustix::event::Timespec::default()))?;
                looked[0].revents().contains(PollFlags::HUP)
            };
            if hung_up {
                sleep.as_mut().reset(tokio::time::Instant::now() + LOOK);
                continue;
            }
            let State::Away(file, _) = std::mem::replace(&mut self.state, State::Between) else { continue };
            self.state = State::Here(watched(file)?);
        }
        match &self.state {
            State::Here(port) => Poll::Ready(Ok(port)),
            _ => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn host_has_gone(&mut self) {
        if let State::Here(port) = std::mem::replace(&mut self.state, State::Between) {
            self.state = State::Away(port.into_inner(), Box::pin(tokio::time::sleep(LOOK)));
            self.changes += 1;
        }
    }
}

fn find() -> Option<String> {
    for entry in std::fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == NAME {
            return Some(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    None
}

impl Port {
    /// As [`tokio::io::AsyncRead::poll_read`].
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let port = ready!(self.poll_here(context))?;
            let mut guard = ready!(port.poll_read_ready(context))?;
            let hung_up = guard.ready().is_read_closed();
            match guard.try_io(|port| port.get_ref().read(buffer.initialize_unfilled())) {
                Ok(Ok(0)) => self.host_has_gone(),
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // It was away and is back already; tokio would ask for ever.
                Err(_) if hung_up => self.host_has_gone(),
                Err(_) => {}
            }
        }
    }

    /// As [`tokio::io::AsyncWrite::poll_write`].
    pub(super) fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let port = ready!(self.poll_here(context))?;
            let mut guard = ready!(port.poll_write_ready(context))?;
            let hung_up = guard.ready().is_write_closed();
            match guard.try_io(|port| port.get_ref().write(bytes)) {
                Ok(written) => return Poll::Ready(written),
                Err(_) if hung_up => self.host_has_gone(),
                Err(_) => {}
            }
        }
    }
}
