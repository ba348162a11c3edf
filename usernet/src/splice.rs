//! Carries the bytes of two streams to each other.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most that is read at once.
const PIECE: usize = 64 << 10;
/// Pieces carried before others have their turn.
const ROUNDS: usize = 16;

thread_local! {
    /// What was read is written at once, so one piece serves all streams of a thread; only what a receiver does not
    /// take at once is copied aside. Thousands of idle connections hold no buffer.
    static PIECE_OF_THREAD: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Lends a buffer of 64 KiB, which holds the longest datagram.
pub(crate) fn with_piece<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut piece = PIECE_OF_THREAD.take();
    piece.resize(PIECE, 0);
    let result = work(&mut piece);
    PIECE_OF_THREAD.set(piece);
    result
}

/// Bytes carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the first stream to the second.
    pub there: u64,
    /// From the second to the first.
    pub back: u64,
}

/// Carries bytes both ways until both directions have ended. The end of one is passed on (by shutting down the
/// other stream's writer) while the other goes on.
///
/// # Errors
/// The first failure of either stream; then neither was shut down, so that dropping both tells each that it failed.
pub async fn splice<A, B>(a: &mut A, b: &mut B) -> io::Result<Carried>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Direction::default(), Direction::default());
    poll_fn(|cx| {
        let first = there.poll(cx, Pin::new(&mut *a), Pin::new(&mut *b))?;
        let second = back.poll(cx, Pin::new(&mut *b), Pin::new(&mut *a))?;
        if first.is_ready() && second.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
    .map(|()| Carried { there: there.carried, back: back.carried })
}

#[derive(Debug, Default)]
struct Direction {
    /// What the receiver has not taken yet, from `start`.
    left: Vec<u8>,
    start: usize,
    carried: u64,
    /// The sender sends no more.
    finished: bool,
    /// The receiver was told so.
    closed: bool,
}

impl Direction {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut from: Pin<&mut impl AsyncRead>,
        mut to: Pin<&mut impl AsyncWrite>,
    ) -> Poll<io::Result<()>> {
        if self.closed {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..ROUNDS {
            while self.start < self.left.len() {
                let written = ready!(to.as_mut().poll_write(cx, &self.left[self.start..]))?;
                self.note(written)?;
                self.start += written;
            }
            self.left = Vec::new();
            self.start = 0;
            if self.finished {
                ready!(to.as_mut().poll_shutdown(cx))?;
                self.closed = true;
                return Poll::Ready(Ok(()));
            }
            if with_piece(|piece| self.carry(cx, from.as_mut(), to.as_mut(), piece))?.is_pending() {
                // Whoever sent this much and now waits for an answer would wait for ever otherwise.
                let _ = to.as_mut().poll_flush(cx)?;
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn carry(
        &mut self,
        cx: &mut Context<'_>,
        from: Pin<&mut impl AsyncRead>,
        to: Pin<&mut impl AsyncWrite>,
        piece: &mut [u8],
    ) -> io::Result<Poll<()>> {
        let mut read = ReadBuf::new(piece);
        if from.poll_read(cx, &mut read)?.is_pending() {
            return Ok(Poll::Pending);
        }
        let read = read.filled();
        if read.is_empty() {
            self.finished = true;
            return Ok(Poll::Ready(()));
        }
        let taken = match to.poll_write(cx, read)? {
            Poll::Ready(taken) => {
                self.note(taken)?;
                taken
            }
            Poll::Pending => 0,
        };
        self.left = read[taken..].to_vec();
        Ok(Poll::Ready(()))
    }

    fn note(&mut self, written: usize) -> io::Result<()> {
        self.carried += written as u64;
        if written == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test]
    async fn one_direction_may_end_long_before_the_other() {
        let (mut client, mut a) = duplex(100);
        let (mut b, mut server) = duplex(100);
        let carrying = tokio::spawn(async move { splice(&mut a, &mut b).await });
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut asked = String::new();
        server.read_to_string(&mut asked).await.unwrap();
        assert_eq!(asked, "question");
        let answer = vec![7; 1_000_000];
        let sending = tokio::spawn(async move {
            server.write_all(&vec![7; 1_000_000]).await.unwrap();
            server.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, answer);
        sending.await.unwrap();
        assert_eq!(carrying.await.unwrap().unwrap(), Carried { there: 8, back: 1_000_000 });
    }

    #[tokio::test]
    async fn a_stream_that_fails_ends_both_without_a_shutdown() {
        let (client, mut a) = duplex(100);
        let (mut b, mut server) = duplex(100);
        let carrying = tokio::spawn(async move { splice(&mut a, &mut b).await });
        server.write_all(b"nobody reads this").await.unwrap();
        drop(client);
        let error = carrying.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
