//! Channels (RFC 4254 §5): the end that whoever serves one holds.
//!
//! What the client sends waits here until it is taken, and only then may the client send more: a process that does not read
//! makes its writer wait, and nobody else.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::message;
use crate::wire::Put as _;

/// Bytes that a client may send before what it sent is taken.
pub(crate) const WINDOW: u32 = 1 << 20;
/// The longest piece of data in one message.
pub(crate) const LONGEST_DATA: u32 = 32 << 10;
/// Requests that may wait on one channel: a client sends one for each variable, without a wait.
const MOST_REQUESTS: usize = 1024;
/// Bytes of their words.
const MOST_WORDS: usize = 256 << 10;
/// Pieces of data of all channels that may wait to be sent.
pub(crate) const PIECES: usize = 16;

/// What a client wants of a session (RFC 4254 §6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// A terminal.
    Terminal {
        /// `$TERM`.
        name: String,
        /// Its size.
        size: Size,
    },
    /// The terminal has another size.
    Resize(Size),
    /// A variable for the command.
    Variable {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
    },
    /// The user's shell.
    Shell,
    /// A command, for the user's shell.
    Command(String),
    /// A subsystem by name.
    Subsystem(String),
    /// A signal by its name without `SIG`.
    Signal(String),
    /// Anything else, or one of these with words that no command line has: its kind.
    Other(String),
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Characters in a line.
    pub columns: u32,
    /// Lines.
    pub rows: u32,
}

/// What comes from the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A request; if the flag is set, it is to be answered by [`Channel::answer`].
    Request(Request, bool),
    /// Data.
    Data(Vec<u8>),
    /// No more data.
    End,
    /// The client has closed the channel, or has gone.
    Closed,
}

/// The client has closed the channel, or has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the channel is closed")]
pub struct Closed;

/// What a channel asks of the connection.
pub(crate) enum Order {
    Send(Vec<u8>, Option<OwnedSemaphorePermit>),
    Taken { channel: u32, bytes: u32 },
    Refuse { channel: u32 },
    Close { channel: u32 },
    Open { kind: &'static str, details: Vec<u8>, opened: oneshot::Sender<Channel> },
}

/// How channels reach their connection.
#[derive(Clone)]
pub(crate) struct Outlet {
    pub(crate) orders: mpsc::UnboundedSender<Order>,
    pub(crate) pieces: Arc<Semaphore>,
}

/// What is between a channel's two ends.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something came from the client.
    came: Notify,
    /// The client takes more.
    room: Notify,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) data: Vec<u8>,
    requests: VecDeque<(Request, bool)>,
    /// Bytes of words in them.
    words: usize,
    pub(crate) ended: bool,
    told_end: bool,
    pub(crate) closed: bool,
    /// Bytes that the client takes.
    pub(crate) window: u32,
}

impl Request {
    /// Bytes of its words.
    fn words(&self) -> usize {
        match self {
            Self::Variable { name, value } => name.len() + value.len(),
            Self::Resize(_) | Self::Shell => 0,
            Self::Terminal { name: words, .. }
            | Self::Command(words)
            | Self::Subsystem(words)
            | Self::Signal(words)
            | Self::Other(words) => words.len(),
        }
    }
}

impl State {
    /// Notes a request; false if too much waits already.
    pub(crate) fn ask(&mut self, request: Request, wants_answer: bool) -> bool {
        self.words += request.words();
        self.requests.push_back((request, wants_answer));
        self.requests.len() <= MOST_REQUESTS && self.words <= MOST_WORDS
    }
}

impl Shared {
    /// The lock, whoever held it last.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what came from the client.
    pub(crate) fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.came.notify_one();
        self.room.notify_one();
    }
}

/// A channel. Dropping it closes it.
pub struct Channel {
    pub(crate) number: u32,
    pub(crate) theirs: u32,
    pub(crate) longest: u32,
    pub(crate) shared: Arc<Shared>,
    pub(crate) outlet: Outlet,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Channel {
    /// The next thing that comes; data and its end only if they are wanted. May be dropped at any time: nothing is lost.
    pub async fn next(&self, data: bool) -> Event {
        loop {
            let came = self.shared.came.notified();
            {
                let mut state = self.shared.state();
                if let Some((request, answer)) = state.requests.pop_front() {
                    state.words -= request.words();
                    return Event::Request(request, answer);
                }
                if data && !state.data.is_empty() {
                    let taken = std::mem::take(&mut state.data);
                    let bytes = u32::try_from(taken.len()).unwrap_or(u32::MAX);
                    self.order(Order::Taken { channel: self.number, bytes });
                    return Event::Data(taken);
                }
                if data && state.ended && !state.told_end {
                    state.told_end = true;
                    return Event::End;
                }
                if state.closed {
                    return Event::Closed;
                }
            }
            came.await;
        }
    }

    /// Sends data, as fast as the client takes it.
    ///
    /// # Errors
    /// If the client has closed the channel.
    pub async fn send(&self, data: &[u8]) -> Result<(), Closed> {
        self.pieces(data, |payload, theirs| {
            payload.put_byte(message::CHANNEL_DATA).put_number(theirs);
        })
        .await
    }

    /// Sends what the command wrote to standard error.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_error(&self, data: &[u8]) -> Result<(), Closed> {
        self.pieces(data, |payload, theirs| {
            payload.put_byte(message::CHANNEL_EXTENDED_DATA).put_number(theirs).put_number(1);
        })
        .await
    }

    async fn pieces(&self, mut data: &[u8], head: impl Fn(&mut Vec<u8>, u32)) -> Result<(), Closed> {
        while !data.is_empty() {
            let count = self.take_room(data.len()).await?;
            let (piece, left) = data.split_at(count);
            let permit = Arc::clone(&self.outlet.pieces).acquire_owned().await.map_err(|_| Closed)?;
            let mut payload = Vec::with_capacity(count + 16);
            head(&mut payload, self.theirs);
            payload.put_string(piece);
            self.order(Order::Send(payload, Some(permit)));
            data = left;
        }
        Ok(())
    }

    /// Waits until the client takes some of `wanted` bytes.
    async fn take_room(&self, wanted: usize) -> Result<usize, Closed> {
        loop {
            let room = self.shared.room.notified();
            {
                let mut state = self.shared.state();
                if state.closed {
                    return Err(Closed);
                }
                let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
                let count = wanted.min(state.window).min(self.longest);
                if count > 0 {
                    state.window -= count;
                    return Ok(count as usize);
                }
            }
            room.await;
        }
    }

    /// Says that no more data comes.
    pub fn end(&self) {
        self.say(message::CHANNEL_EOF, |_| {});
    }

    /// Answers a request that wants it.
    pub fn answer(&self, wanted: bool, good: bool) {
        if wanted {
            self.say(if good { message::CHANNEL_SUCCESS } else { message::CHANNEL_FAILURE }, |_| {});
        }
    }

    /// Says how the command ended.
    pub fn exited(&self, code: u8) {
        self.say(message::CHANNEL_REQUEST, |payload| {
            payload.put_string("exit-status").put_byte(0).put_number(code.into());
        });
    }

    /// Says that a signal ended the command; by its name without `SIG`.
    pub fn killed(&self, signal: &str, core_dumped: bool) {
        self.say(message::CHANNEL_REQUEST, |payload| {
            payload.put_string("exit-signal").put_byte(0).put_string(signal).put_byte(core_dumped.into());
            payload.put_string("").put_string("");
        });
    }

    pub(crate) fn confirm(&self) {
        self.say(message::CHANNEL_OPEN_CONFIRMATION, |payload| {
            payload.put_number(self.number).put_number(WINDOW).put_number(LONGEST_DATA);
        });
    }

    fn say(&self, number: u8, rest: impl FnOnce(&mut Vec<u8>)) {
        let mut payload = vec![number];
        payload.put_number(self.theirs);
        rest(&mut payload);
        self.order(Order::Send(payload, None));
    }

    fn order(&self, order: Order) {
        // A connection that has ended needs no more orders.
        let _ = self.outlet.orders.send(order);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.order(Order::Close { channel: self.number });
    }
}

/// A channel that the client wants and does not have yet. Dropping it refuses.
#[derive(Debug)]
pub struct Opening {
    channel: Option<Channel>,
}

impl Opening {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel: Some(channel) }
    }

    /// Lets the client have it.
    pub fn accept(mut self) -> Option<Channel> {
        let channel = self.channel.take()?;
        channel.confirm();
        Some(channel)
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(channel) = &self.channel {
            channel.order(Order::Refuse { channel: channel.number });
        }
    }
}

/// Opens channels to the client, for ports that it has forwarded (RFC 4254 §7.2).
#[derive(Clone)]
pub struct Opener {
    pub(crate) outlet: Outlet,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").finish_non_exhaustive()
    }
}

impl Opener {
    /// A channel for a connection from `origin` that came to `port` at `address`, as the client asked for them; `None` if it
    /// does not want it.
    pub async fn forwarded(&self, address: &str, port: u16, origin: std::net::SocketAddr) -> Option<Channel> {
        let mut details = Vec::new();
        details.put_string(address).put_number(port.into());
        details.put_string(origin.ip().to_string()).put_number(origin.port().into());
        let (opened, channel) = oneshot::channel();
        let order = Order::Open { kind: "forwarded-tcpip", details, opened };
        self.outlet.orders.send(order).ok()?;
        channel.await.ok()
    }
}
