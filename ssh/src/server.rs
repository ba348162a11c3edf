//! One connection from its first byte to its last.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::auth::{Attempt, Entrance};
use crate::channel::{
    Channel, LONGEST_DATA, Opener, Opening, Order, Outlet, PIECES, Request, Shared, Size, WINDOW,
};
use crate::keys::{KeyPair, PublicKey};
use crate::transport::{Step, Transport};
use crate::wire::{Put as _, Reader};
use crate::{SshError, message};

/// Channels that one connection may have.
const MOST_CHANNELS: usize = 128;
/// What channels may want to say before the client is not listened to either, if it does not read.
const MOST_ORDERS: usize = 1024;
/// The longest name, value or command, in bytes.
const LONGEST_TEXT: usize = 48 << 10;

/// What a server does for whoever has entered. Its functions must not wait: they start tasks.
pub trait Handler {
    /// Whether there is such a user.
    fn knows(&mut self, user: &str) -> bool;
    /// Serves a session.
    fn session(&mut self, user: &str, channel: Channel);
    /// Connects to `host` and `port`, and then accepts, or refuses.
    fn connect(&mut self, host: &str, port: u16, opening: Opening);
    /// Listens at `address` and `port` (0: any) and opens a channel for each connection; the port. `None` if it cannot.
    fn listen(&mut self, address: &str, port: u16, opener: Opener) -> Option<u16>;
    /// Listens there no more; false if it did not.
    fn unlisten(&mut self, address: &str, port: u16) -> bool;
}

/// Who a server is, and who may enter.
#[derive(Debug)]
pub struct Identity {
    /// The host key.
    pub host_key: KeyPair,
    /// The keys of those who may enter, as any user.
    pub authorised: Vec<PublicKey>,
}

/// Serves a connection until the client leaves.
///
/// # Errors
/// [`SshError`] says what the client did wrong, or how the stream failed. Whatever was opened is closed.
pub async fn serve<S, H>(stream: S, identity: &Identity, handler: H) -> Result<(), SshError>
where
    S: AsyncRead + AsyncWrite,
    H: Handler,
{
    let (orders, mut ordered) = mpsc::unbounded_channel();
    let outlet = Outlet { orders, pieces: Arc::new(Semaphore::new(PIECES)) };
    let transport = Transport::begin(stream, &identity.host_key).await?;
    let mut server = Server {
        transport,
        handler,
        authorised: &identity.authorised,
        outlet,
        entrance: Entrance::default(),
        user: None,
        asks: false,
        enough: false,
        channels: HashMap::new(),
        next: 0,
    };
    let ended = loop {
        tokio::select! {
            step = server.transport.step(ordered.len() > MOST_ORDERS) => match step {
                Ok(Step::Message(payload)) => match server.hear(&payload) {
                    Ok(()) => {}
                    Err(error) => break Err(error),
                },
                Ok(Step::Moved) => {}
                Ok(Step::Ended) => break Ok(()),
                Err(error) => break Err(error),
            },
            // This function holds a sender itself, so the queue does not end.
            Some(order) = ordered.recv(), if server.transport.has_room() => server.obey(order),
        }
    };
    for entry in server.channels.values() {
        entry.shared.change(|state| state.closed = true);
    }
    server.outlet.pieces.close();
    if let Err(error) = &ended {
        let mut goodbye = vec![message::DISCONNECT];
        goodbye.put_number(2).put_string(error.to_string()).put_string("");
        server.transport.send(&goodbye);
    }
    // A client that has gone does not read it.
    let _ = server.transport.finish().await;
    ended
}

/// A channel, as the connection knows it.
struct Entry {
    shared: Arc<Shared>,
    theirs: u32,
    /// Bytes that the client may still send.
    granted: u32,
    /// Bytes that were taken and that the client has not been told of.
    taken: u32,
    /// Nobody serves it any more, and the client knows.
    closed: bool,
    /// Who waits for the client to say that it wants it.
    opened: Option<oneshot::Sender<Channel>>,
}

struct Server<'a, S, H> {
    transport: Transport<'a, S>,
    handler: H,
    authorised: &'a [PublicKey],
    outlet: Outlet,
    entrance: Entrance,
    /// The client has asked for the service that lets in.
    asks: bool,
    user: Option<String>,
    /// The client wants no more sessions: whoever gets hold of its end shall not have one.
    enough: bool,
    channels: HashMap<u32, Entry>,
    next: u32,
}

impl<S: AsyncRead + AsyncWrite, H: Handler> Server<'_, S, H> {
    fn hear(&mut self, payload: &[u8]) -> Result<(), SshError> {
        let mut fields = Reader::new(payload, "message");
        let number = fields.byte()?;
        match (number, &self.user) {
            (message::SERVICE_REQUEST, None) => {
                if fields.text()? != "ssh-userauth" {
                    return Err(SshError::Protocol("a service that is not there"));
                }
                let mut answer = vec![message::SERVICE_ACCEPT];
                answer.put_string("ssh-userauth");
                self.asks = true;
                self.transport.send(&answer);
            }
            (message::USERAUTH_REQUEST, None) if self.asks => {
                let session = self.transport.session().to_vec();
                let handler = &mut self.handler;
                match self.entrance.attempt(payload, &session, self.authorised, |user| handler.knows(user))? {
                    Attempt::Answer(answer) => self.transport.send(&answer),
                    Attempt::Entered(user) => {
                        self.user = Some(user);
                        self.transport.send(&[message::USERAUTH_SUCCESS]);
                    }
                }
            }
            // Attempts that were under way when one succeeded are passed over (RFC 4252 §5.3).
            (message::USERAUTH_REQUEST, Some(_)) => {}
            (_, None) => return Err(SshError::Protocol("a message of somebody who has not entered")),
            (message::GLOBAL_REQUEST, _) => self.global_request(fields)?,
            (message::CHANNEL_OPEN, _) => self.open(fields)?,
            (message::CHANNEL_OPEN_CONFIRMATION..=message::CHANNEL_FAILURE, _) => {
                let channel = fields.number()?;
                self.on_channel(number, channel, fields)?;
            }
            _ => {
                let mut answer = vec![message::UNIMPLEMENTED];
                answer.put_number(self.transport.heard());
                self.transport.send(&answer);
            }
        }
        Ok(())
    }

    fn global_request(&mut self, mut fields: Reader<'_>) -> Result<(), SshError> {
        let (name, wants_answer) = (fields.text()?, fields.boolean()?);
        let answer = match name {
            "tcpip-forward" => {
                let (address, port) = (fields.text()?, port(fields.number()?)?);
                let opener = Opener { outlet: self.outlet.clone() };
                self.handler.listen(address, port, opener).map(|chosen| {
                    let mut answer = vec![message::REQUEST_SUCCESS];
                    if port == 0 {
                        answer.put_number(chosen.into());
                    }
                    answer
                })
            }
            "cancel-tcpip-forward" => {
                let (address, port) = (fields.text()?, port(fields.number()?)?);
                self.handler.unlisten(address, port).then(|| vec![message::REQUEST_SUCCESS])
            }
            // `PROTOCOL` of OpenSSH, 2.2.
            "no-more-sessions@openssh.com" => {
                self.enough = true;
                Some(vec![message::REQUEST_SUCCESS])
            }
            _ => None,
        };
        if wants_answer {
            self.transport.send(&answer.unwrap_or_else(|| vec![message::REQUEST_FAILURE]));
        }
        Ok(())
    }

    fn open(&mut self, mut fields: Reader<'_>) -> Result<(), SshError> {
        let kind = fields.text()?;
        let (theirs, window, longest) = (fields.number()?, fields.number()?, fields.number()?);
        if self.channels.len() >= MOST_CHANNELS {
            self.refuse(theirs, 4, "there are too many channels");
            return Ok(());
        }
        match kind {
            "session" if self.enough => return Err(SshError::Protocol("a session after the last one")),
            "session" => {
                let channel = self.enter(theirs, window, longest);
                channel.confirm();
                let user = self.user.clone().unwrap_or_default();
                self.handler.session(&user, channel);
            }
            "direct-tcpip" => {
                let (host, port) = (fields.text()?, port(fields.number()?)?);
                let channel = self.enter(theirs, window, longest);
                self.handler.connect(host, port, Opening::new(channel));
            }
            _ => self.refuse(theirs, 3, "there is no such kind of channel"),
        }
        Ok(())
    }

    fn refuse(&mut self, theirs: u32, reason: u32, words: &str) {
        let mut answer = vec![message::CHANNEL_OPEN_FAILURE];
        answer.put_number(theirs).put_number(reason).put_string(words).put_string("");
        self.transport.send(&answer);
    }

    /// A number that no channel has.
    fn number(&mut self) -> u32 {
        loop {
            self.next = self.next.wrapping_add(1);
            if !self.channels.contains_key(&self.next) {
                return self.next;
            }
        }
    }

    fn enter(&mut self, theirs: u32, window: u32, longest: u32) -> Channel {
        let number = self.number();
        let shared = Arc::new(Shared::default());
        shared.change(|state| state.window = window);
        let entry = Entry {
            shared: Arc::clone(&shared),
            theirs,
            granted: WINDOW,
            taken: 0,
            closed: false,
            opened: None,
        };
        self.channels.insert(number, entry);
        Channel { number, theirs, longest: longest.min(LONGEST_DATA), shared, outlet: self.outlet.clone() }
    }

    fn on_channel(&mut self, number: u8, channel: u32, mut fields: Reader<'_>) -> Result<(), SshError> {
        let Some(entry) = self.channels.get_mut(&channel) else {
            return Err(SshError::Protocol("a message for a channel that is not there"));
        };
        let answers = matches!(number, message::CHANNEL_OPEN_CONFIRMATION | message::CHANNEL_OPEN_FAILURE);
        if answers != entry.opened.is_some() {
            return Err(SshError::Protocol("a channel that is not open, or was not asked for"));
        }
        match number {
            message::CHANNEL_OPEN_CONFIRMATION => {
                let (theirs, window, longest) = (fields.number()?, fields.number()?, fields.number()?);
                let Some(opened) = entry.opened.take() else { return Ok(()) };
                entry.theirs = theirs;
                entry.shared.change(|state| state.window = window);
                let shared = Arc::clone(&entry.shared);
                let longest = longest.min(LONGEST_DATA);
                // Who does not wait any more drops it, which closes it.
                let _ = opened.send(Channel {
                    number: channel,
                    theirs,
                    longest,
                    shared,
                    outlet: self.outlet.clone(),
                });
            }
            message::CHANNEL_OPEN_FAILURE => {
                self.channels.remove(&channel);
            }
            message::CHANNEL_WINDOW_ADJUST => {
                let more = fields.number()?;
                entry.shared.change(|state| state.window = state.window.saturating_add(more));
            }
            message::CHANNEL_DATA | message::CHANNEL_EXTENDED_DATA => {
                if number == message::CHANNEL_EXTENDED_DATA {
                    fields.number()?;
                }
                let data = fields.string()?;
                let bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
                entry.granted = entry
                    .granted
                    .checked_sub(bytes)
                    .ok_or(SshError::Protocol("more data than was granted"))?;
                if entry.closed {
                    // Nothing is granted after the end: the client may have given the channel's number to another.
                } else if number == message::CHANNEL_EXTENDED_DATA {
                    // No command takes it.
                    self.taken(channel, bytes);
                } else {
                    entry.shared.change(|state| state.data.extend_from_slice(data));
                }
            }
            message::CHANNEL_EOF => entry.shared.change(|state| state.ended = true),
            message::CHANNEL_CLOSE => {
                entry.shared.change(|state| state.closed = true);
                if entry.closed {
                    self.channels.remove(&channel);
                }
            }
            message::CHANNEL_REQUEST => {
                let (request, wants_answer) = request(&mut fields)?;
                let mut full = false;
                entry.shared.change(|state| full = !state.ask(request, wants_answer));
                if full {
                    return Err(SshError::Protocol("too many requests on one channel"));
                }
            }
            // Answers to requests, of which a server makes none that want any.
            _ => {}
        }
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Send(payload, permit) => {
                self.transport.send(&payload);
                drop(permit);
            }
            Order::Taken { channel, bytes } => self.taken(channel, bytes),
            Order::Refuse { channel } => {
                if let Some(entry) = self.channels.remove(&channel) {
                    self.refuse(entry.theirs, 2, "cannot connect");
                }
            }
            Order::Close { channel } => self.close(channel),
            Order::Open { kind, details, opened } => {
                if self.channels.len() >= MOST_CHANNELS {
                    return;
                }
                let number = self.number();
                let entry = Entry {
                    shared: Arc::default(),
                    theirs: 0,
                    granted: WINDOW,
                    taken: 0,
                    closed: false,
                    opened: Some(opened),
                };
                self.channels.insert(number, entry);
                let mut payload = vec![message::CHANNEL_OPEN];
                payload.put_string(kind).put_number(number).put_number(WINDOW).put_number(LONGEST_DATA);
                payload.extend_from_slice(&details);
                self.transport.send(&payload);
            }
        }
    }

    /// Bytes were taken: the client may send as many more, and is told so now and then.
    fn taken(&mut self, channel: u32, bytes: u32) {
        let Some(entry) = self.channels.get_mut(&channel) else { return };
        entry.taken += bytes;
        if entry.taken >= WINDOW / 2 {
            let mut payload = vec![message::CHANNEL_WINDOW_ADJUST];
            payload.put_number(entry.theirs).put_number(entry.taken);
            entry.granted += entry.taken;
            entry.taken = 0;
            self.transport.send(&payload);
        }
    }

    /// Nobody serves it any more.
    fn close(&mut self, channel: u32) {
        let Some(entry) = self.channels.get_mut(&channel) else { return };
        entry.closed = true;
        let mut payload = vec![message::CHANNEL_CLOSE];
        payload.put_number(entry.theirs);
        let both = {
            let mut state = entry.shared.state();
            state.data = Vec::new();
            state.closed
        };
        self.transport.send(&payload);
        if both {
            self.channels.remove(&channel);
        }
    }
}

fn port(number: u32) -> Result<u16, SshError> {
    u16::try_from(number).map_err(|_| SshError::Malformed("port"))
}

/// Reads what a client wants of a session.
fn request(fields: &mut Reader<'_>) -> Result<(Request, bool), SshError> {
    let name = fields.text()?.to_owned();
    let wants_answer = fields.boolean()?;
    // What no command line has is a request that is refused, and no reason to end what else the connection carries.
    let text = |fields: &mut Reader<'_>| {
        let bytes = fields.string()?;
        let text = std::str::from_utf8(bytes).ok();
        let text = text.filter(|text| text.len() <= LONGEST_TEXT && !text.contains('\0'));
        Ok::<_, SshError>(text.map(str::to_owned))
    };
    let size = |fields: &mut Reader<'_>| {
        let (columns, rows) = (fields.number()?, fields.number()?);
        // Pixels, which no terminal of ours has.
        let _ = (fields.number()?, fields.number()?);
        Ok::<_, SshError>(Size { columns, rows })
    };
    let request = match name.as_str() {
        "pty-req" => {
            let (name, size) = (text(fields)?, size(fields)?);
            name.map(|name| Request::Terminal { name, size })
        }
        "window-change" => Some(Request::Resize(size(fields)?)),
        "env" => {
            let (name, value) = (text(fields)?, text(fields)?);
            name.zip(value).map(|(name, value)| Request::Variable { name, value })
        }
        "shell" => Some(Request::Shell),
        "exec" => text(fields)?.map(Request::Command),
        "subsystem" => text(fields)?.map(Request::Subsystem),
        "signal" => text(fields)?.map(Request::Signal),
        _ => None,
    };
    let request = request.unwrap_or(Request::Other(name));
    Ok((request, wants_answer))
}

#[cfg(test)]
mod tests;
