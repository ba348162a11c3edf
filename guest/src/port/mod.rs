//! The byte stream to the host: a virtio-serial port, or a vsock connection where the host says so.

mod serial;
mod vsock;

use std::fs::File;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::failure::{Failure, invalid};
use crate::told::told;

/// An open port. Hosts may come and go behind it: whoever reads waits for the next.
#[derive(Debug)]
pub(crate) enum Port {
    Serial(serial::Port),
    Vsock(vsock::Port),
}

impl Port {
    /// Opens what the host has at its other end.
    pub(crate) fn open() -> Result<Self, Failure> {
        let Some(said) = told("link") else { return serial::Port::open().map(Self::Serial) };
        let number = said.strip_prefix("vsock:").and_then(|number| number.parse().ok());
        let number = number.ok_or_else(|| invalid(format!("`kiln.link={said}` is no link")))?;
        vsock::Port::open(number).map(Self::Vsock)
    }
}

/// A file that tokio watches. It must not block.
pub(crate) fn watched(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` gives the same open descriptor for as long as it lives, and lives in the `AsyncFd`.
    unsafe { AsyncFd::register(file) }.map_err(io::Error::from)
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Serial(port) => Pin::new(port).poll_read(context, buffer),
            Self::Vsock(port) => Pin::new(port).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Serial(port) => Pin::new(port).poll_write(context, bytes),
            Self::Vsock(port) => Pin::new(port).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Serial(port) => Pin::new(port).poll_flush(context),
            Self::Vsock(port) => Pin::new(port).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Serial(port) => Pin::new(port).poll_shutdown(context),
            Self::Vsock(port) => Pin::new(port).poll_shutdown(context),
        }
    }
}
