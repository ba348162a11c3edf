//! The byte stream to the host: a virtio-serial port, or a vsock connection where the host says so.

mod serial;
mod vsock;

use std::fs::File;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::failure::{Failure, invalid};
use crate::told::told;

/// An open port. Hosts may come and go behind it: whoever reads waits for the next.
#[derive(Debug)]
pub(crate) struct Port {
    kind: Kind,
    /// Who reads and who writes are woken by what they wait for, and that is replaced when one of them finds that the host
    /// has gone or has come. So the other is woken too.
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Debug)]
enum Kind {
    Serial(serial::Port),
    Vsock(vsock::Port),
}

impl Kind {
    /// How often what is waited for was replaced.
    fn changes(&self) -> u64 {
        match self {
            Self::Serial(port) => port.changes,
            Self::Vsock(port) => port.changes,
        }
    }
}

impl From<Kind> for Port {
    fn from(kind: Kind) -> Self {
        Self { kind, reader: None, writer: None }
    }
}

impl Port {
    /// Opens what the host has at its other end.
    pub(crate) fn open() -> Result<Self, Failure> {
        let Some(said) = told("link") else {
            return serial::Port::open().map(|port| Kind::Serial(port).into());
        };
        let number = said.strip_prefix("vsock:").and_then(|number| number.parse().ok());
        let number = number.ok_or_else(|| invalid(format!("`kiln.link={said}` is no link")))?;
        vsock::Port::open(number).map(|port| Kind::Vsock(port).into())
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
        let Self { kind, reader, writer } = self.get_mut();
        let changes = kind.changes();
        let read = match kind {
            Kind::Serial(port) => port.poll_read(context, buffer),
            Kind::Vsock(port) => port.poll_read(context, buffer),
        };
        *reader = read.is_pending().then(|| context.waker().clone());
        if kind.changes() != changes
            && let Some(writer) = writer.take()
        {
            writer.wake();
        }
        read
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Self { kind, reader, writer } = self.get_mut();
        let changes = kind.changes();
        let written = match kind {
            Kind::Serial(port) => port.poll_write(context, bytes),
            Kind::Vsock(port) => port.poll_write(context, bytes),
        };
        *writer = written.is_pending().then(|| context.waker().clone());
        if kind.changes() != changes
            && let Some(reader) = reader.take()
        {
            reader.wake();
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is held back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // It has no end: the next host comes.
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::time::Duration;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn who_reads_hears_of_the_next_host_although_who_writes_waited_for_it_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let port = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let port = Port::from(Kind::Serial(serial::Port::of(port)));
        // A pipe whose writers have gone hangs up, as a port does.
        std::fs::write(&path, "").unwrap();
        let (mut reader, mut writer) = tokio::io::split(port);
        let reads = tokio::spawn(async move { reader.read_u8().await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        let writes = tokio::spawn(async move { writer.write_all(b"w").await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!reads.is_finished() && !writes.is_finished(), "there is no host");
        let mut host = OpenOptions::new().write(true).open(&path).unwrap();
        std::io::Write::write_all(&mut host, b"r").unwrap();
        let read = tokio::time::timeout(Duration::from_secs(20), reads).await.expect("it is woken");
        assert_eq!(read.unwrap().unwrap(), b'r');
        // This end of a pipe takes nothing.
        writes.abort();
    }
}
