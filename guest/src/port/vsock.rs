//! A vsock connection (`vsock(7)`): the host's end of the device connects to a port that the guest listens on.
//!
//! A connection does not outlive that the machine is saved: it is reset, and the host connects anew. The guest was parked then,
//! so nothing was under way, and who reads and writes here sees nothing of it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::task::{Context, Poll, ready};

use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, listen, socket_with};
use tokio::io::ReadBuf;
use tokio::io::unix::AsyncFd;

use super::watched;
use crate::failure::{Doing as _, Failure, failed};

/// Connections that wait while there is one. The host has one at a time, and may be ahead of the end of the one before.
const BACKLOG: i32 = 2;

/// A port that is listened on.
#[derive(Debug)]
pub(super) struct Port {
    listener: AsyncFd<File>,
    connection: Option<AsyncFd<File>>,
    /// How often what is waited for was replaced.
    pub(super) changes: u64,
}

impl Port {
    /// Listens on the port `number`, for whatever address the machine has.
    pub(super) fn open(number: u32) -> Result<Self, Failure> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)
            .doing("make a vsock socket for the link")?;
        // SAFETY: all zeros are an address of no family.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = number;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the pointer leads to an address of that length.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
            return Err(failed(format_args!("bind the vsock port {number}"), io::Error::last_os_error()));
        }
        listen(&socket, BACKLOG).doing("listen for the host")?;
        Ok(Self {
            listener: watched(File::from(socket)).doing("watch the link")?,
            connection: None,
            changes: 0,
        })
    }

    /// The connection, once there is one.
    fn poll_here(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&AsyncFd<File>>> {
        while self.connection.is_none() {
            let mut guard = ready!(self.listener.poll_read_ready(context))?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match guard.try_io(|listener| Ok(accept_with(listener.get_ref(), flags)?)) {
                Ok(Ok(socket)) => {
                    self.connection = Some(watched(File::from(socket))?);
                    self.changes += 1;
                }
                // It went before it was here.
                Ok(Err(error)) if is_gone(&error) => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
        match &self.connection {
            Some(connection) => Poll::Ready(Ok(connection)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn host_has_gone(&mut self) {
        self.connection = None;
        self.changes += 1;
    }
}

/// Whether a connection has ended, rather than that something is wrong here.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::TimedOut
    )
}

impl Port {
    /// As [`tokio::io::AsyncRead::poll_read`].
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let connection = ready!(self.poll_here(context))?;
            let mut guard = ready!(connection.poll_read_ready(context))?;
            match guard.try_io(|connection| connection.get_ref().read(buffer.initialize_unfilled())) {
                Ok(Ok(0)) => self.host_has_gone(),
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if is_gone(&error) => self.host_has_gone(),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }

    /// As [`tokio::io::AsyncWrite::poll_write`].
    pub(super) fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let connection = ready!(self.poll_here(context))?;
            let mut guard = ready!(connection.poll_write_ready(context))?;
            match guard.try_io(|connection| connection.get_ref().write(bytes)) {
                Ok(Err(error)) if is_gone(&error) => self.host_has_gone(),
                Ok(written) => return Poll::Ready(written),
                Err(_) => {}
            }
        }
    }
}
