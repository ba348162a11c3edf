//! Serving a share over an asynchronous stream, for callers whose streams are those of a multiplexer.
//!
//! Requests are read in the caller's task and done on the runtime's threads for blocking work, one thread each; replies
//! are written in the caller's task again. A request and its reply live in a slot; there are as many slots as requests may be
//! served at once, and while none is free nothing is read.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::session::Session;
use crate::wire::{Reply, rflush};
use crate::{Share, ShareError};

const READ_AHEAD: usize = 8192;

/// A request and its reply.
#[derive(Debug, Default)]
struct Slot {
    buffer: Vec<u8>,
    length: usize,
    reply: Reply,
}

/// A reply to be written, and the flushes to be answered behind it.
#[derive(Debug)]
struct Answered {
    slot: Slot,
    flushes: Vec<u16>,
}

/// Lets nothing wait for the guest's sake once nobody serves it.
struct Abandoned(Arc<Session>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.requests.cancel_all();
    }
}

impl Share {
    /// Serves one connection until the guest closes it. `reader` and `writer` are the two halves of the stream
    /// (`tokio::io::split`). To end it from outside, drop the future: requests that have begun are finished, and not answered.
    ///
    /// # Errors
    /// The stream broke, or what came over it is not 9P. A guest that leaves between two messages is no error.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn serve_async(
        &self,
        reader: impl AsyncRead + Unpin,
        writer: impl AsyncWrite + Unpin,
    ) -> Result<(), ShareError> {
        let session = Arc::new(Session::new(Arc::clone(&self.tree)));
        let _abandoned = Abandoned(Arc::clone(&session));
        let (free, mut slots) = unbounded_channel();
        for _ in 0..self.tree.options.requests {
            // The receiver is right here.
            let _ = free.send(Slot::default());
        }
        let (answered, replies) = unbounded_channel();
        let reading = read_requests(&session, reader, &mut slots, &free, answered);
        let writing = write_replies(&session, writer, replies, &free);
        tokio::pin!(reading, writing);
        tokio::select! {
            // When everything is read, the last replies are still on their way.
            read = &mut reading => {
                session.requests.cancel_all();
                read.and(writing.await)
            }
            written = &mut writing => written,
        }
    }
}

async fn read_requests(
    session: &Arc<Session>,
    reader: impl AsyncRead + Unpin,
    slots: &mut UnboundedReceiver<Slot>,
    free: &UnboundedSender<Slot>,
    answered: UnboundedSender<Answered>,
) -> Result<(), ShareError> {
    let mut reader = BufReader::with_capacity(READ_AHEAD, reader);
    // Taking a request out of flight and queueing its reply must not be torn apart; see `Session::finish`.
    let output = Arc::new(Mutex::new(answered));
    let broken = |source| session.tree.broken("reading a request", source);
    while let Some(mut slot) = slots.recv().await {
        let mut size = [0; 4];
        match reader.read(&mut size).await.map_err(broken)? {
            0 => return Ok(()),
            read => reader.read_exact(&mut size[read..]).await.map_err(broken)?,
        };
        let frame = session.frame_space(size, &mut slot.buffer)?;
        reader.read_exact(&mut frame[4..]).await.map_err(broken)?;
        slot.length = frame.len();
        // `Tversion` waits for all others, and what comes behind it for the size that it agrees on.
        let admitted = if Session::blocks(frame) {
            let session = Arc::clone(session);
            let waiting = tokio::task::spawn_blocking(move || {
                let admitted = session.admit(&slot.buffer[..slot.length]);
                (slot, admitted)
            });
            let (back, admitted) = waiting.await.map_err(|error| broken(error.into()))?;
            slot = back;
            admitted
        } else {
            session.admit(frame)
        };
        let (session, output, free) = (Arc::clone(session), Arc::clone(&output), free.clone());
        tokio::task::spawn_blocking(move || {
            if !session.answer(&admitted, &slot.buffer[..slot.length], &mut slot.reply) {
                let _ = free.send(slot);
                return;
            }
            let output = output.lock().unwrap_or_else(PoisonError::into_inner);
            let flushes = session.finish(&admitted);
            // If nobody writes any more, nobody waits for it either.
            let _ = output.send(Answered { slot, flushes });
        });
    }
    Ok(())
}

async fn write_replies(
    session: &Session,
    mut writer: impl AsyncWrite + Unpin,
    mut replies: UnboundedReceiver<Answered>,
    free: &UnboundedSender<Slot>,
) -> Result<(), ShareError> {
    let broken = |source| session.tree.broken("writing a reply", source);
    while let Some(Answered { slot, flushes }) = replies.recv().await {
        writer.write_all(slot.reply.frame()).await.map_err(broken)?;
        for tag in flushes {
            writer.write_all(&rflush(tag)).await.map_err(broken)?;
        }
        writer.flush().await.map_err(broken)?;
        let _ = free.send(slot);
    }
    Ok(())
}
