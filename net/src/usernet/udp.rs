//! UDP and echo requests: the frames of one source in the guest leave from sockets of its own.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kiln_usernet::datagram::{Content, Frame, Frames, Unreachable};
use kiln_usernet::{RESOLVER, Target, UDP};
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, consume_budget};
use tokio::time::{Instant, sleep_until};

use super::forward::Transport;
use super::gateway::{Gateway, Place};
use super::names::Machine;
use super::{echo, errors};
use crate::policy::canonical;

/// After which the guest's source is forgotten; the guest's half forgets it before.
const IDLE: Duration = Duration::from_secs(180);
/// Destinations of one source. Beyond, the longest unused is forgotten, and its answers are not let in any more.
const MOST_PEERS: usize = 256;
/// Name queries and neighbours of one source, at once.
const MOST_TASKS: usize = 32;
/// Datagrams that are received before the guest has its turn.
const BATCH: usize = 32;
const LARGEST: usize = 65_536;

impl Gateway {
    /// Serves one stream of service [`UDP`] that the guest has opened, until it ends or has been idle for three minutes.
    pub async fn serve_udp<S>(self: &Arc<Self>, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Some(_permit) = self.take_flow() else { return };
        let (answers, from_tasks) = mpsc::channel(MOST_TASKS);
        let relay = Relay {
            gateway: Arc::clone(self),
            frames: Frames::new(stream),
            sockets: [const { None }; 4],
            peers: Peers::default(),
            tasks: JoinSet::new(),
            neighbours: HashMap::new(),
            answers,
            from_tasks,
        };
        if let Err(error) = relay.run().await {
            tracing::debug!(guest = self.options.guest, %error, "a stream of datagrams ended early");
        }
    }
}

/// Which of the four sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Udp4,
    Udp6,
    Echo4,
    Echo6,
}

impl Kind {
    fn of(address: IpAddr, echo: bool) -> Self {
        match (address, echo) {
            (IpAddr::V4(_), false) => Self::Udp4,
            (IpAddr::V6(_), false) => Self::Udp6,
            (IpAddr::V4(_), true) => Self::Echo4,
            (IpAddr::V6(_), true) => Self::Echo6,
        }
    }

    fn is_echo(self) -> bool {
        matches!(self, Self::Echo4 | Self::Echo6)
    }

    fn open(self) -> io::Result<UdpSocket> {
        let any: IpAddr = match self {
            Self::Udp4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::Udp6 => Ipv6Addr::UNSPECIFIED.into(),
            Self::Echo4 => return echo::socket(true),
            Self::Echo6 => return echo::socket(false),
        };
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }
}

struct Relay<S> {
    gateway: Arc<Gateway>,
    frames: Frames<S>,
    /// In the order of [`Kind`], each opened when it is first needed.
    sockets: [Option<UdpSocket>; 4],
    peers: Peers,
    /// Name queries, and streams to neighbours.
    tasks: JoinSet<()>,
    neighbours: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>>,
    answers: mpsc::Sender<Frame>,
    from_tasks: mpsc::Receiver<Frame>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Relay<S> {
    async fn run(mut self) -> io::Result<()> {
        let mut deadline = Instant::now() + IDLE;
        loop {
            let [udp4, udp6, echo4, echo6] = &self.sockets;
            let kind = tokio::select! {
                frame = self.frames.next() => {
                    match frame? {
                        Some(frame) => self.send(frame),
                        None => return Ok(()),
                    }
                    None
                }
                Some(answer) = self.from_tasks.recv() => {
                    self.frames.push(&answer);
                    None
                }
                Some(_) = self.tasks.join_next() => None,
                () = news(udp4.as_ref()) => Some(Kind::Udp4),
                () = news(udp6.as_ref()) => Some(Kind::Udp6),
                () = news(echo4.as_ref()) => Some(Kind::Echo4),
                () = news(echo6.as_ref()) => Some(Kind::Echo6),
                () = sleep_until(deadline) => return Ok(()),
            };
            if let Some(kind) = kind {
                self.receive(kind);
            }
            deadline = Instant::now() + IDLE;
            // Sockets that always have something to tell count for nothing otherwise.
            consume_budget().await;
        }
    }

    fn send(&mut self, frame: Frame) {
        match (frame.peer, frame.content) {
            (Target::Name(name, port), Content::Datagram(query)) if name == RESOLVER => {
                self.resolve(Target::Name(name, port), query);
            }
            (Target::Address(peer), Content::Datagram(payload)) => self.send_to(peer, false, &payload),
            (Target::Address(peer), Content::Echo(data)) => self.send_to(peer, true, &data),
            // Names are for the resolver alone; and a guest has nothing to report.
            (Target::Name(..), _) | (_, Content::Unreachable(_)) => {}
        }
    }

    fn resolve(&mut self, peer: Target, query: Vec<u8>) {
        if self.tasks.len() >= MOST_TASKS {
            return;
        }
        let (gateway, answers) = (Arc::clone(&self.gateway), self.answers.clone());
        self.tasks.spawn(async move {
            if let Some(answer) = gateway.resolve(&query, Transport::Udp).await {
                let _ = answers.send(Frame::datagram(peer, answer)).await;
            }
        });
    }

    /// Sends to what the guest calls `peer`; for an echo request, its port is the sequence number.
    fn send_to(&mut self, peer: SocketAddr, echo: bool, payload: &[u8]) {
        let seen = SocketAddr::new(peer.ip(), if echo { 0 } else { peer.port() });
        let real = match self.peers.real(seen, echo) {
            Some(real) => real,
            None => match self.gateway.place(peer.ip(), (!echo).then_some(peer.port())) {
                Ok(Place::Address(address)) => SocketAddr::new(canonical(address), seen.port()),
                Ok(Place::Loopback) => Gateway::loopback(seen.port())[0],
                Ok(Place::Machine(machine)) if !echo => {
                    return self.send_to_neighbour(peer, &machine, payload);
                }
                // Neighbours are there, but have no address at which they would answer.
                Ok(Place::Machine(_)) => return self.refuse(peer, Unreachable::Prohibited),
                Err(denied) => {
                    let tally = &self.gateway.tally;
                    self.gateway.deny(&tally.denied_datagrams, "a datagram", peer, denied);
                    return self.refuse(peer, Unreachable::Prohibited);
                }
            },
        };
        self.peers.note(seen, real, echo, peer.port());
        let kind = Kind::of(real.ip(), echo);
        // Not by way of the runtime, which does not know yet that a new socket can send.
        let send = |socket: &UdpSocket, payload: &[u8]| {
            rustix::net::sendto(socket, payload, rustix::net::SendFlags::DONTWAIT, &real)
                .map_err(io::Error::from)
        };
        let sent = self.socket(kind).and_then(|socket| {
            if echo {
                send(socket, &echo::request(real.ip(), peer.port(), payload))
            } else {
                send(socket, payload)
            }
        });
        match sent {
            Ok(_) => {}
            // The socket's queue is full: the datagram is lost, as on any network.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::debug!(guest = self.gateway.options.guest, %peer, %error, "a datagram was not sent");
                if let Some(why) = errors::meaning(&error) {
                    self.refuse(peer, why);
                }
            }
        }
    }

    fn refuse(&mut self, peer: SocketAddr, why: Unreachable) {
        self.frames.push(&Frame::unreachable(peer, why));
    }

    fn socket(&mut self, kind: Kind) -> io::Result<&UdpSocket> {
        let place = &mut self.sockets[kind as usize];
        match place {
            Some(socket) => Ok(socket),
            None => {
                let socket = kind.open()?;
                errors::keep(&socket);
                Ok(place.insert(socket))
            }
        }
    }

    /// Takes what has come to a socket.
    fn receive(&mut self, kind: Kind) {
        let Some(socket) = &self.sockets[kind as usize] else { return };
        let mut piece = [0; LARGEST];
        for _ in 0..BATCH {
            let mut receive = || {
                if let Some(error) = errors::next(socket) {
                    return Ok(Err(error));
                }
                let (length, _, peer) =
                    rustix::net::recvfrom(socket, piece.as_mut_slice(), rustix::net::RecvFlags::DONTWAIT)?;
                Ok(Ok((length, peer.and_then(|peer| SocketAddr::try_from(peer).ok()))))
            };
            // The runtime looks for one kind of readiness at a time.
            let received = match socket.try_io(Interest::READABLE, &mut receive) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.try_io(Interest::ERROR, receive)
                }
                other => other,
            };
            match received {
                Ok(Ok((length, Some(peer)))) => {
                    self.peers.answered(kind, peer, &piece[..length], &mut self.frames);
                }
                Ok(Ok((_, None))) => {}
                Ok(Err((why, peer))) => {
                    if let Some(seen) = self.peers.seen(peer, kind.is_echo()) {
                        self.frames.push(&Frame::unreachable(seen, why));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An error that the queue has told already, or will: the next turn goes on behind it.
                Err(_) => {}
            }
        }
    }

    fn send_to_neighbour(&mut self, peer: SocketAddr, machine: &Machine, payload: &[u8]) {
        self.neighbours.retain(|_, queue| !queue.is_closed());
        if let Some(queue) = self.neighbours.get(&peer) {
            // Full: lost.
            let _ = queue.try_send(payload.to_vec());
            return;
        }
        if self.tasks.len() >= MOST_TASKS {
            return;
        }
        let (queue, receiver) = mpsc::channel(MOST_TASKS);
        let _ = queue.try_send(payload.to_vec());
        self.neighbours.insert(peer, queue);
        let (machine, answers) = (machine.clone(), self.answers.clone());
        self.tasks.spawn(async move {
            if let Err(error) = speak_to(&machine, peer, receiver, &answers).await {
                tracing::debug!(%peer, %error, "datagrams to a neighbour ended early");
                let _ = answers.send(Frame::unreachable(peer, Unreachable::Host)).await;
            }
        });
    }
}

/// Carries datagrams between a guest and its neighbour, both of which have only streams.
async fn speak_to(
    machine: &Machine,
    peer: SocketAddr,
    mut queue: mpsc::Receiver<Vec<u8>>,
    answers: &mpsc::Sender<Frame>,
) -> io::Result<()> {
    let mut frames = Frames::new(machine.open(UDP).await?);
    let inside = SocketAddr::from(([127, 0, 0, 1], peer.port()));
    let mut deadline = Instant::now() + IDLE;
    loop {
        tokio::select! {
            payload = queue.recv() => match payload {
                Some(payload) => drop(frames.push(&Frame::datagram(inside, payload))),
                None => return Ok(()),
            },
            frame = frames.next() => match frame? {
                Some(Frame { content, .. }) => drop(answers.try_send(Frame { peer: peer.into(), content })),
                None => return Ok(()),
            },
            () = sleep_until(deadline) => return Ok(()),
        }
        deadline = Instant::now() + IDLE;
    }
}

/// Waits until a socket has something to tell.
async fn news(socket: Option<&UdpSocket>) {
    match socket {
        Some(socket) => drop(socket.ready(Interest::READABLE | Interest::ERROR).await),
        None => std::future::pending().await,
    }
}

/// The destinations of a source, by what the guest calls them and by what they are. Nobody else's datagrams are let in.
#[derive(Debug, Default)]
struct Peers {
    by_seen: HashMap<(SocketAddr, bool), SocketAddr>,
    by_real: HashMap<(SocketAddr, bool), Peer>,
}

#[derive(Debug)]
struct Peer {
    seen: SocketAddr,
    used: Instant,
    /// The last sequence number, for echo.
    sequence: u16,
}

impl Peers {
    fn real(&self, seen: SocketAddr, echo: bool) -> Option<SocketAddr> {
        self.by_seen.get(&(seen, echo)).copied()
    }

    fn note(&mut self, seen: SocketAddr, real: SocketAddr, echo: bool, sequence: u16) {
        if let Some(peer) = self.by_real.get_mut(&(real, echo)).filter(|peer| peer.seen == seen) {
            (peer.used, peer.sequence) = (Instant::now(), sequence);
            return;
        }
        if self.by_real.len() >= MOST_PEERS
            && !self.by_real.contains_key(&(real, echo))
            && let Some(oldest) = self.by_real.iter().min_by_key(|(_, peer)| peer.used).map(|(key, _)| *key)
        {
            self.by_real.remove(&oldest);
            self.by_seen.retain(|(_, echo), real| (*real, *echo) != oldest);
        }
        // Two ways to the same place (the gateway's two addresses): answers take the last.
        self.by_seen.insert((seen, echo), real);
        self.by_real.insert((real, echo), Peer { seen, used: Instant::now(), sequence });
        if self.by_seen.len() > MOST_PEERS * 2 {
            self.by_seen.clear();
            self.by_seen.insert((seen, echo), real);
        }
    }

    /// What the guest calls the one that an error is about.
    fn seen(&self, real: SocketAddr, echo: bool) -> Option<SocketAddr> {
        let real = SocketAddr::new(real.ip(), if echo { 0 } else { real.port() });
        let peer = self.by_real.get(&(real, echo))?;
        Some(if echo { SocketAddr::new(peer.seen.ip(), peer.sequence) } else { peer.seen })
    }

    fn answered<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        kind: Kind,
        from: SocketAddr,
        message: &[u8],
        frames: &mut Frames<S>,
    ) {
        // Flow labels and scopes are not part of who it is.
        let echo = kind.is_echo();
        let real = SocketAddr::new(from.ip(), if echo { 0 } else { from.port() });
        let Some(peer) = self.by_real.get_mut(&(real, echo)) else { return };
        peer.used = Instant::now();
        if !echo {
            frames.push(&Frame::datagram(peer.seen, message));
        } else if let Some((sequence, data)) = echo::reply(from.ip(), message) {
            frames.push(&Frame::echo(SocketAddr::new(peer.seen.ip(), sequence), data));
        }
    }
}
