//! Datagrams on a stream: what service [`UDP`](crate::UDP) carries.
//!
//! Each stream belongs to one source in the guest: a UDP port, or an identifier of echo requests. The other side has one
//! socket for it, from which the datagrams to all their destinations leave, so that every destination sees the same
//! source (RFC 4787 §4.1, endpoint-independent mapping).
//!
//! ```text
//!  | length u16 | kind u8 | ATYP, address, port (RFC 1928 §5) | body … |        length counts what follows it
//!
//!  kind 1  a UDP datagram to (or from) the address             body: its payload
//!  kind 2  an ICMP echo request to (or reply from) it          body: its data; the port is the sequence number
//!  kind 3  what was sent there cannot be delivered             body: one byte, see Unreachable
//! ```
//!
//! As on any network, datagrams may be lost: where a stream does not take them as fast as they come, they are.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{Target, WireError};

/// Bytes of frames that wait for the stream; more are dropped.
const MOST_QUEUED: usize = 256 << 10;
const FIRST_BUFFER: usize = 2 << 10;
/// Larger buffers are given back once they are empty.
const KEPT_BUFFER: usize = 16 << 10;

/// Why a datagram cannot be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Unreachable {
    /// There is no route.
    Network = 0,
    /// The host does not answer.
    Host = 1,
    /// Nobody listens at this port.
    Port = 2,
    /// The policy, or a firewall on the way, does not let it pass.
    Prohibited = 3,
}

/// What a frame carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The payload of a UDP datagram, at most 65,507 bytes.
    Datagram(Vec<u8>),
    /// The data of an ICMP echo request or reply; the peer's port is the sequence number.
    Echo(Vec<u8>),
    /// What was sent to the peer cannot be delivered.
    Unreachable(Unreachable),
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Where it goes, or where it comes from.
    pub peer: Target,
    /// What it carries.
    pub content: Content,
}

impl Frame {
    /// A UDP datagram.
    pub fn datagram(peer: impl Into<Target>, payload: impl Into<Vec<u8>>) -> Self {
        Self { peer: peer.into(), content: Content::Datagram(payload.into()) }
    }

    /// An echo request or reply.
    pub fn echo(peer: impl Into<Target>, data: impl Into<Vec<u8>>) -> Self {
        Self { peer: peer.into(), content: Content::Echo(data.into()) }
    }

    /// What was sent to `peer` cannot be delivered.
    pub fn unreachable(peer: impl Into<Target>, why: Unreachable) -> Self {
        Self { peer: peer.into(), content: Content::Unreachable(why) }
    }

    /// Appends the wire form, unless its length does not fit into its length field.
    fn encode(&self, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        let (kind, body): (u8, &[u8]) = match &self.content {
            Content::Datagram(payload) => (1, payload),
            Content::Echo(data) => (2, data),
            Content::Unreachable(why) => (3, &[*why as u8]),
        };
        out.extend_from_slice(&[0, 0, kind]);
        self.peer.encode(out);
        out.extend_from_slice(body);
        match u16::try_from(out.len() - start - 2) {
            Ok(length) => {
                out[start..start + 2].copy_from_slice(&length.to_be_bytes());
                true
            }
            Err(_) => {
                out.truncate(start);
                false
            }
        }
    }

    /// Takes a frame without its length field.
    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (kind, rest) = bytes.split_first().ok_or(WireError::Truncated(0))?;
        let (peer, body) = Target::decode(rest)?;
        let content = match kind {
            1 => Content::Datagram(body.to_vec()),
            2 => Content::Echo(body.to_vec()),
            3 => Content::Unreachable(match body.first() {
                Some(0) => Unreachable::Network,
                Some(2) => Unreachable::Port,
                Some(3) => Unreachable::Prohibited,
                Some(_) => Unreachable::Host,
                None => return Err(WireError::Truncated(bytes.len())),
            }),
            other => return Err(WireError::FrameKind(*other)),
        };
        Ok(Self { peer, content })
    }
}

/// Frames over a stream, both ways.
#[derive(Debug)]
pub struct Frames<S> {
    stream: S,
    /// Received bytes are at `start..end`.
    input: Vec<u8>,
    start: usize,
    end: usize,
    ended: bool,
    output: Vec<u8>,
    written: usize,
    flushed: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Frames<S> {
    /// Of a stream that carries nothing else.
    pub fn new(stream: S) -> Self {
        let (input, output) = (Vec::new(), Vec::new());
        Self { stream, input, start: 0, end: 0, ended: false, output, written: 0, flushed: true }
    }

    /// Queues a frame, which [`next`](Self::next) sends. `false`, and the frame is lost, where too much waits already
    /// or it is longer than a frame can be.
    pub fn push(&mut self, frame: &Frame) -> bool {
        if self.written == self.output.len() {
            self.output.clear();
            self.written = 0;
        }
        self.output.len() - self.written < MOST_QUEUED && frame.encode(&mut self.output)
    }

    /// Waits for a frame, and sends those that were queued while it waits. `None` is the end of the stream. It may be
    /// dropped and called again without loss.
    ///
    /// # Errors
    /// What the stream says, and [`io::ErrorKind::InvalidData`] with a [`WireError`] for what is no frame.
    pub async fn next(&mut self) -> io::Result<Option<Frame>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Frame>>> {
        self.poll_send(cx)?;
        loop {
            if let Some(frame) = self.take()? {
                return Poll::Ready(Ok(Some(frame)));
            }
            if self.ended {
                let cut = (self.start < self.end).then(|| io::ErrorKind::UnexpectedEof.into());
                return Poll::Ready(cut.map_or(Ok(None), Err));
            }
            self.make_room();
            let mut room = ReadBuf::new(&mut self.input[self.end..]);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut room))?;
            let read = room.filled().len();
            self.end += read;
            self.ended = read == 0;
        }
    }

    /// Sends as much as the stream takes now.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.written < self.output.len() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.output[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => self.written += written?,
                Poll::Pending => return Ok(()),
            }
            self.flushed = false;
        }
        if self.output.capacity() > KEPT_BUFFER {
            self.output = Vec::new();
            self.written = 0;
        }
        if !self.flushed && Pin::new(&mut self.stream).poll_flush(cx)?.is_ready() {
            self.flushed = true;
        }
        Ok(())
    }

    /// A frame that has been received whole.
    fn take(&mut self) -> io::Result<Option<Frame>> {
        let received = &self.input[self.start..self.end];
        let Some((length, rest)) = received.split_first_chunk::<2>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes(*length));
        let Some(frame) = rest.get(..length) else { return Ok(None) };
        let frame = Frame::decode(frame)?;
        self.start += 2 + length;
        Ok(Some(frame))
    }

    /// Makes room for the rest of the frame that has begun, and for at least one byte.
    fn make_room(&mut self) {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.end == 0 && self.input.len() > KEPT_BUFFER {
            self.input = Vec::new();
        }
        let frame = match self.input[..self.end] {
            [high, low, ..] => 2 + usize::from(u16::from_be_bytes([high, low])),
            _ => 0,
        };
        // What is announced is not believed: the buffer doubles as bytes come.
        let wanted = frame.min(self.end * 2).max(FIRST_BUFFER).max(self.end + 1);
        if self.input.len() < wanted {
            self.input.resize(wanted, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncWriteExt, duplex};

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    fn frames() -> Vec<Frame> {
        let peer = |text: &str| text.parse::<Target>().unwrap();
        vec![
            Frame::datagram(peer("192.0.2.1:53"), b"query"),
            Frame::datagram(peer("dns.kiln.internal:53"), vec![7; 65_507]),
            Frame::echo(peer("[2001:db8::1]:65535"), vec![]),
            Frame::unreachable(peer("192.0.2.1:9"), Unreachable::Port),
            Frame::unreachable(peer("192.0.2.1:9"), Unreachable::Prohibited),
            Frame::datagram(peer("[::1]:1"), vec![]),
        ]
    }

    /// What a reader makes of `bytes`, given in pieces.
    fn read(bytes: &[u8], piece: usize) -> (Vec<Frame>, Option<io::ErrorKind>) {
        block_on(async {
            let (near, mut far) = duplex(piece);
            let feed = async {
                let _ = far.write_all(bytes).await;
                let _ = far.shutdown().await;
            };
            let collect = async {
                let (mut frames, mut seen) = (Frames::new(near), Vec::new());
                loop {
                    match frames.next().await {
                        Ok(Some(frame)) => seen.push(frame),
                        Ok(None) => return (seen, None),
                        Err(error) => return (seen, Some(error.kind())),
                    }
                }
            };
            let (seen, ()) = tokio::join!(collect, feed);
            seen
        })
    }

    #[test]
    fn frames_arrive_as_they_were_sent_however_the_stream_cuts_them() {
        let mut bytes = Vec::new();
        assert!(frames().iter().all(|frame| frame.encode(&mut bytes)));
        for piece in [1, 2, 3, 1000, 1 << 20] {
            assert_eq!(read(&bytes, piece), (frames(), None), "{piece}");
        }
        let (seen, error) = read(&bytes[..bytes.len() - 1], 100);
        assert_eq!((seen.len(), error), (frames().len() - 1, Some(io::ErrorKind::UnexpectedEof)));
    }

    /// Guests of templates made by another version speak to this one: these bytes must not change.
    #[test]
    fn frames_are_the_bytes_that_they_were_at_first() {
        let v4: Target = "192.0.2.1:53".parse().unwrap();
        let v6: Target = "[2001:db8::1]:7".parse().unwrap();
        let samples: [(Frame, &[u8]); 4] = [
            (Frame::datagram(v4.clone(), b"q"), b"\x00\x09\x01\x01\xc0\x00\x02\x01\x00\x35q"),
            (Frame::datagram("a.b:1".parse::<Target>().unwrap(), b""), b"\x00\x08\x01\x03\x03a.b\x00\x01"),
            (
                Frame::echo(v6, b"data"),
                b"\x00\x18\x02\x04\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\x00\x07data",
            ),
            (Frame::unreachable(v4, Unreachable::Port), b"\x00\x09\x03\x01\xc0\x00\x02\x01\x00\x35\x02"),
        ];
        for (frame, bytes) in samples {
            let mut encoded = Vec::new();
            assert!(frame.encode(&mut encoded));
            assert_eq!(encoded, bytes, "{frame:?}");
            assert_eq!(read(bytes, 100), (vec![frame], None));
        }
    }

    #[test]
    fn two_ends_that_send_without_reading_do_not_wait_for_each_other_for_ever() {
        block_on(async {
            let (near, far) = duplex(1000);
            let (mut near, mut far) = (Frames::new(near), Frames::new(far));
            let large = Frame::datagram("192.0.2.1:1".parse::<Target>().unwrap(), vec![1; 60_000]);
            let mut queued = 0;
            while near.push(&large) {
                assert!(far.push(&large));
                queued += 1;
            }
            assert!((4..10).contains(&queued), "{queued}");
            for _ in 0..queued {
                let (a, b) = tokio::join!(near.next(), far.next());
                assert_eq!(a.unwrap().unwrap(), large);
                assert_eq!(b.unwrap().unwrap(), large);
            }
            assert!(near.push(&large), "there is room again");
        });
    }

    #[test]
    fn what_is_no_frame_is_an_error_and_announced_bytes_cost_nothing() {
        let table: [&[u8]; 7] = [
            b"\0\0",
            b"\0\x01\x01",
            b"\0\x07\x01\x01\x7f\0\0\x01\0",
            b"\0\x08\x09\x01\x7f\0\0\x01\0\x07",
            b"\0\x08\x01\x02\x7f\0\0\x01\0\x07",
            b"\0\x08\x03\x01\x7f\0\0\x01\0\x07",
            b"\0\x06\x01\x03\x01\n\0\x07",
        ];
        for bytes in table {
            let (seen, error) = read(bytes, 100);
            assert_eq!((seen.len(), error), (0, Some(io::ErrorKind::InvalidData)), "{bytes:?}");
        }
        block_on(async {
            let (near, mut far) = duplex(100);
            far.write_all(b"\xff\xff\x01").await.unwrap();
            let mut frames = Frames::new(near);
            let wait = std::time::Duration::from_millis(20);
            assert!(tokio::time::timeout(wait, frames.next()).await.is_err(), "the rest has not come");
            assert!(frames.input.capacity() <= FIRST_BUFFER);
        });
        let long = Frame::datagram("192.0.2.1:1".parse::<Target>().unwrap(), vec![0; 65_536]);
        assert!(!Frames::new(tokio::io::empty()).push(&long), "longer than a frame can be");
    }

    proptest! {
        #[test]
        fn garbage_ends_in_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = read(&bytes, 333);
        }
    }
}
