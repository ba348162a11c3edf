//! The multiplexer's own wire, which breaks where the multiplexer would only complain.
//!
//! When the other end breaks yamux's rules (a stream beyond the bound, more bytes than a window has), yamux answers each time
//! with a frame that says *go away*, and goes on. An end that is not trusted is not asked to go: its session ends.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// Bytes of a header: version, type, flags (2), stream (4), length (4), big-endian.
const HEADER: usize = 12;
/// The type of a frame with a body.
const DATA: u8 = 0;
/// The type of a frame that says *go away*.
const GO_AWAY: u8 = 3;

/// A wire whose writer sees the headers that pass.
#[derive(Debug)]
pub(crate) struct Wire {
    inner: DuplexStream,
    header: [u8; HEADER],
    /// Bytes of the header that have passed.
    seen: usize,
    /// Bytes of the body that have not.
    body: usize,
}

impl Wire {
    pub(crate) fn new(inner: DuplexStream) -> Self {
        Self { inner, header: [0; HEADER], seen: 0, body: 0 }
    }

    /// Follows what was written; an error if the multiplexer has given the other end up.
    fn follow(&mut self, mut written: &[u8]) -> io::Result<()> {
        while !written.is_empty() {
            if self.body > 0 {
                let count = self.body.min(written.len());
                self.body -= count;
                written = &written[count..];
                continue;
            }
            let count = (HEADER - self.seen).min(written.len());
            self.header[self.seen..self.seen + count].copy_from_slice(&written[..count]);
            self.seen += count;
            written = &written[count..];
            if self.seen == HEADER {
                self.seen = 0;
                let [_, kind, _, _, _, _, _, _, length @ ..] = self.header;
                match kind {
                    DATA => self.body = u32::from_be_bytes(length) as usize,
                    GO_AWAY => return Err(io::Error::other("the other end broke the multiplexer's rules")),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.inner).poll_write(context, bytes))?;
        self.follow(&bytes[..count])?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u8, length: u32) -> Vec<u8> {
        let mut bytes = vec![0, kind, 0, 0, 0, 0, 0, 1];
        bytes.extend(length.to_be_bytes());
        bytes
    }

    #[test]
    fn only_a_header_that_says_go_away_breaks_the_wire_however_it_is_cut() {
        // A body that looks like one; a window update, whose length is none of a body; then one.
        let mut bytes = header(DATA, 12);
        bytes.extend(header(GO_AWAY, 1));
        bytes.extend(header(1, 1 << 20));
        let sound = bytes.len();
        bytes.extend(header(GO_AWAY, 1));
        for piece in [1, 5, 12, 13, 100] {
            let mut wire = Wire::new(tokio::io::duplex(1).0);
            let broke = bytes.chunks(piece).position(|part| wire.follow(part).is_err()).unwrap();
            assert_eq!(broke, (sound + HEADER - 1) / piece, "in pieces of {piece}");
        }
    }
}
