//! The multiplexer of one life of a machine.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};

use crate::LinkError;
use crate::wire::Wire;

/// Streams open at one time, both ends together. One more ends the session: nobody who means well has so many.
const MAX_STREAMS: usize = 1024;
/// What all streams together may keep unread, in bytes: yamux's least (256 KiB) for each, and 64 MiB for those that are fast.
const MAX_WINDOW: usize = MAX_STREAMS * (256 << 10) + (64 << 20);
/// Inbound streams that wait to be accepted.
const BACKLOG: usize = 64;
/// Bytes of one frame of the multiplexer, at most: bulk must not make small answers wait.
const SPLIT: usize = 32 << 10;

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Host,
    Guest,
}

type Opening = oneshot::Sender<Result<yamux::Stream, LinkError>>;

/// The streams of one life of a machine. Dropping it ends them all.
#[derive(Debug)]
pub struct Session {
    openings: mpsc::Sender<Opening>,
    inbound: Inbound,
}

/// The streams of a [`Session`] that the other end opens.
#[derive(Debug)]
pub struct Inbound(mpsc::Receiver<yamux::Stream>);

/// Opens streams of a [`Session`]; can be cloned and kept by who only opens.
#[derive(Debug, Clone)]
pub struct Opener {
    openings: mpsc::Sender<Opening>,
}

/// One stream to or from a service: ordered bytes both ways; shutting down the write half ends one direction.
#[derive(Debug)]
pub struct Stream(Compat<yamux::Stream>);

impl Session {
    /// A session over `wire`, driven by a task of its own until it is dropped, the wire ends, or the other end breaks the
    /// multiplexer's rules.
    pub(crate) fn start(wire: DuplexStream, end: End) -> Self {
        let mut config = yamux::Config::default();
        config.set_max_connection_receive_window(None);
        config.set_max_num_streams(MAX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_WINDOW));
        config.set_split_send_size(SPLIT);
        let mode = match end {
            End::Host => yamux::Mode::Client,
            End::Guest => yamux::Mode::Server,
        };
        let connection = yamux::Connection::new(Wire::new(wire).compat(), config, mode);
        let (openings, asked) = mpsc::channel(BACKLOG);
        let (arrived, inbound) = mpsc::channel(BACKLOG);
        tokio::spawn(drive(connection, asked, arrived));
        Self { openings, inbound: Inbound(inbound) }
    }

    /// Opens a stream to a [`service`](crate::service) of the other end.
    ///
    /// # Errors
    /// If the session has ended.
    pub async fn open(&self, service: u16) -> Result<Stream, LinkError> {
        self.opener().open(service).await
    }

    /// As [`Inbound::accept`].
    pub async fn accept(&mut self) -> Option<(u16, Stream)> {
        self.inbound.accept().await
    }

    /// Takes what accepts streams away, for another task. The session accepts none from then on.
    pub fn take_inbound(&mut self) -> Inbound {
        std::mem::replace(&mut self.inbound, Inbound(mpsc::channel(1).1))
    }

    /// What opens streams of this session.
    pub fn opener(&self) -> Opener {
        Opener { openings: self.openings.clone() }
    }
}

impl Inbound {
    /// The next stream that the other end opens, and the service that it wants; `None` when the session has ended.
    /// A stream that ends before it has named its service is passed over; one that says nothing keeps those behind it
    /// waiting, which harms nobody but the end that opened it.
    pub async fn accept(&mut self) -> Option<(u16, Stream)> {
        loop {
            let mut stream = Stream(self.0.recv().await?.compat());
            if let Ok(service) = stream.read_u16_le().await {
                return Some((service, stream));
            }
        }
    }
}

impl Opener {
    /// Opens a stream to a [`service`](crate::service) of the other end.
    ///
    /// # Errors
    /// If the session has ended.
    pub async fn open(&self, service: u16) -> Result<Stream, LinkError> {
        let (reply, opened) = oneshot::channel();
        self.openings.send(reply).await.map_err(|_| LinkError::Closed)?;
        let mut stream = Stream(opened.await.map_err(|_| LinkError::Closed)??.compat());
        stream.write_u16_le(service).await?;
        Ok(stream)
    }
}

/// Owns the connection: yamux makes progress only while it is polled.
async fn drive(
    mut connection: yamux::Connection<Compat<Wire>>,
    mut asked: mpsc::Receiver<Opening>,
    arrived: mpsc::Sender<yamux::Stream>,
) {
    let mut waiting: Option<Opening> = None;
    let mut asked_ended = false;
    poll_fn(|context| {
        loop {
            // Every stream and whoever could open one is gone: so is the session.
            if asked_ended && arrived.is_closed() && waiting.is_none() {
                return Poll::Ready(());
            }
            if waiting.is_none() && !asked_ended {
                match asked.poll_recv(context) {
                    Poll::Ready(Some(opening)) => waiting = Some(opening),
                    Poll::Ready(None) => {
                        asked_ended = true;
                        continue;
                    }
                    Poll::Pending => {}
                }
            }
            if let Some(opening) = waiting.take() {
                match connection.poll_new_outbound(context) {
                    Poll::Ready(stream) => {
                        let _ = opening.send(stream.map_err(|error| LinkError::Mux(error.to_string())));
                        continue;
                    }
                    Poll::Pending => waiting = Some(opening),
                }
            }
            match connection.poll_next_inbound(context) {
                Poll::Ready(Some(Ok(stream))) => {
                    // Beyond the backlog a stream is refused, so that nobody can make this end wait.
                    if let Err(error) = arrived.try_send(stream) {
                        tracing::debug!("a stream is refused: {error}");
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!("the multiplexer ends: {error}");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        // Woken when the last holder of the session goes.
        if !arrived.is_closed() {
            let mut closed = std::pin::pin!(arrived.closed());
            let _ = closed.poll_unpin(context);
        }
        Poll::Pending
    })
    .await;
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
