//! Reads what the kernel sends, and finds whose it is.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smoltcp::wire::IpProtocol;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};

use super::GuestError;
use super::flows::{DNS, Flows, Source};
use super::fragments::Fragments;
use super::packet::{self, Body, Packet, Segment};
use super::tcp::{Buffers, Clock, Connection};
use super::tun::Tun;
use crate::datagram::{Frame, Unreachable};
use crate::socks::{self, Reply, SocksError};
use crate::{Open, RESOLVER, TCP, Target};

/// Packets that are read before connections have their turn.
const BATCH: usize = 64;
/// How often it is looked whether a program still waits for its connection.
const GLANCE: Duration = Duration::from_secs(3);

/// Carries the guest's network until `sessions` is dropped, which ends it in good order, or the device is gone.
///
/// `sessions` holds what opens streams to the host. After a machine was restored, forked, or lost its link, its owner sends
/// another: the connections of the former session are reset (their programs see `ECONNRESET`), and new ones are made with
/// the new session.
///
/// # Errors
/// [`GuestError::System`] if the device cannot be read any more.
pub async fn run<O: Open>(tun: Tun, mut sessions: watch::Receiver<Arc<O>>) -> Result<(), GuestError> {
    let device = Arc::new(tun);
    let failed =
        |source: io::Error| GuestError::System { doing: "reading from the TUN device".into(), source };
    // SAFETY: the `Arc` keeps the device, and with it its one descriptor, open and the same until after `readable` is gone.
    let readable = unsafe { AsyncFd::register_with_interest(Arc::clone(&device), Interest::READABLE) }
        .map_err(|error| failed(error.into()))?;
    let opener = Arc::clone(&sessions.borrow_and_update());
    let mut stack = Stack::new(&device, opener);
    let mut room = Tun::room();
    loop {
        tokio::select! {
            ready = readable.readable() => {
                let mut ready = ready.map_err(failed)?;
                for _ in 0..BATCH {
                    match device.receive(&mut room) {
                        Ok(packet) => stack.take(packet),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            ready.clear_ready();
                            break;
                        }
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(failed(error)),
                    }
                }
            }
            changed = sessions.changed() => {
                stack.reset();
                if changed.is_err() {
                    return Ok(());
                }
                stack.opener = Arc::clone(&sessions.borrow_and_update());
            }
            Some(ended) = stack.tasks.join_next() => report(ended),
        }
        while let Some(ended) = stack.tasks.try_join_next() {
            report(ended);
        }
        // The tasks that were woken, before more is read: one of them may have to send an acknowledgement.
        tokio::task::yield_now().await;
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "serving a connection failed");
    }
}

/// The program's end and the other end.
type Ends = (SocketAddr, SocketAddr);

/// All that is going on.
struct Stack<O> {
    device: Arc<Tun>,
    clock: Clock,
    opener: Arc<O>,
    tasks: JoinSet<()>,
    connections: Arc<Connections>,
    flows: Flows,
    fragments: Fragments,
    /// Bytes for buffers.
    buffers: Arc<AtomicUsize>,
    count: u64,
}

/// The TCP connections, also those that the host is still dialling.
#[derive(Default)]
struct Connections(Mutex<HashMap<Ends, Entry>>);

struct Entry {
    /// Tells it from a later one of the same ends.
    number: u64,
    state: Stage,
    task: Option<AbortHandle>,
}

enum Stage {
    /// The host dials; this is the SYN that will be answered.
    Dialling {
        syn: Vec<u8>,
        heard: Instant,
        times: u32,
    },
    Open(Arc<Connection>),
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, HashMap<Ends, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, ends: &Ends, number: u64, work: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.lock().get_mut(ends).filter(|entry| entry.number == number).map(work)
    }
}

/// Takes the connection out of the table, however its task ends.
struct Leave {
    connections: Arc<Connections>,
    ends: Ends,
    number: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        let mut connections = self.connections.lock();
        if connections.get(&self.ends).is_some_and(|entry| entry.number == self.number) {
            connections.remove(&self.ends);
        }
    }
}

impl<O: Open> Stack<O> {
    fn new(device: &Arc<Tun>, opener: Arc<O>) -> Self {
        Self {
            device: Arc::clone(device),
            clock: Clock::start(),
            opener,
            tasks: JoinSet::new(),
            connections: Arc::default(),
            flows: Flows::new(device),
            fragments: Fragments::default(),
            buffers: Arc::new(AtomicUsize::new(device.config().limits.buffers)),
            count: 0,
        }
    }

    /// Resets everything that goes through the present session.
    fn reset(&mut self) {
        let connections: Vec<Entry> = self.connections.lock().drain().map(|(_, entry)| entry).collect();
        for entry in connections {
            if let Some(task) = entry.task {
                task.abort();
            }
            match entry.state {
                Stage::Dialling { syn, .. } => packet::send_reset(&self.device, &syn),
                Stage::Open(connection) => connection.reset(),
            }
        }
        self.flows.reset();
    }

    fn take(&mut self, bytes: &[u8]) {
        // Broadcasts, neighbour solicitations and the like have no place to go.
        let Some(packet) = Packet::parse(bytes).filter(Packet::is_unicast) else { return };
        match packet.body {
            Body::Fragment(part) => {
                let now = std::time::Instant::now();
                if let Some((protocol, data)) = self.fragments.take(&packet, &part, now)
                    && let body @ (Body::Udp { .. } | Body::Echo { .. }) =
                        Body::parse(IpProtocol::from(protocol), &data)
                {
                    self.take_body(&packet, body);
                }
            }
            body => self.take_body(&packet, body),
        }
    }

    fn take_body(&mut self, packet: &Packet<'_>, body: Body<'_>) {
        let gateway = self.device.config().gateway_beside(packet.source);
        let at_gateway = gateway == Some(packet.destination);
        match body {
            Body::Tcp(segment) => self.take_segment(packet, segment),
            Body::Udp { from, to, payload } => {
                let peer = self.target(packet.destination, to);
                let source = Source::Port(SocketAddr::new(packet.source, from));
                self.flows.send(source, Frame::datagram(peer, payload), &self.opener, &mut self.tasks);
            }
            Body::Echo { identifier, sequence, data } if at_gateway => {
                packet::send_echo(
                    &self.device,
                    packet.destination,
                    packet.source,
                    identifier,
                    sequence,
                    data,
                );
            }
            Body::Echo { identifier, sequence, data } => {
                let peer = SocketAddr::new(packet.destination, sequence);
                let source = Source::Echo(packet.source, identifier);
                self.flows.send(source, Frame::echo(peer, data), &self.opener, &mut self.tasks);
            }
            Body::Fragment(_) | Body::Other => {}
        }
    }

    /// What the host is asked for.
    fn target(&self, address: IpAddr, port: u16) -> Target {
        if port == DNS && self.device.config().gateway_beside(address) == Some(address) {
            Target::Name(RESOLVER.into(), port)
        } else {
            Target::Address(SocketAddr::new(address, port))
        }
    }

    fn take_segment(&mut self, packet: &Packet<'_>, segment: Segment) {
        let remote = SocketAddr::new(packet.destination, segment.to);
        let ends = (SocketAddr::new(packet.source, segment.from), remote);
        let opening = segment.syn && !segment.ack && !segment.rst;
        {
            let mut connections = self.connections.lock();
            match connections.get_mut(&ends).map(|entry| &mut entry.state) {
                Some(Stage::Open(connection)) => return connection.receive(packet.bytes),
                Some(Stage::Dialling { syn, heard, times }) => {
                    if opening {
                        packet.bytes.clone_into(syn);
                        *heard = Instant::now();
                        *times += 1;
                        return;
                    }
                    if segment.rst
                        && let Some(task) = connections.remove(&ends).and_then(|entry| entry.task)
                    {
                        task.abort();
                    }
                }
                None => {}
            }
            // What belongs to a connection of the past is answered with RST; an RST is not answered.
            if !opening || connections.len() >= self.device.config().limits.connections {
                drop(connections);
                return packet::send_reset(&self.device, packet.bytes);
            }
        }
        self.count += 1;
        let number = self.count;
        let state = Stage::Dialling { syn: packet.bytes.to_vec(), heard: Instant::now(), times: 1 };
        self.connections.lock().insert(ends, Entry { number, state, task: None });
        let leave = Leave { connections: Arc::clone(&self.connections), ends, number };
        let dialling = Dialling {
            device: Arc::clone(&self.device),
            clock: self.clock,
            buffers: Arc::clone(&self.buffers),
            target: self.target(remote.ip(), remote.port()),
            leave,
        };
        let opener = Arc::clone(&self.opener);
        let task = self.tasks.spawn(async move { dialling.run(&*opener).await });
        self.connections.with(&ends, number, |entry| entry.task = Some(task));
    }
}

/// A connection that a program has asked for.
struct Dialling {
    device: Arc<Tun>,
    clock: Clock,
    buffers: Arc<AtomicUsize>,
    target: Target,
    leave: Leave,
}

impl Dialling {
    async fn run<O: Open>(self, opener: &O) {
        let dialled = tokio::select! {
            dialled = self.dial(opener) => dialled,
            () = self.abandoned() => return,
        };
        let Leave { connections, ends, number } = &self.leave;
        // With the table held: the program's answer to our SYN-ACK must find the connection there.
        let answered = connections.with(ends, *number, |entry| {
            let Stage::Dialling { syn, .. } = &entry.state else { return None };
            match &dialled {
                Err(error) => {
                    self.refuse(syn, error);
                    None
                }
                Ok(_) => {
                    let connection = self.answer(syn)?;
                    entry.state = Stage::Open(Arc::clone(&connection));
                    Some(connection)
                }
            }
        });
        if let (Some(Some(connection)), Ok(stream)) = (answered, dialled) {
            connection.carry(stream).await;
        }
    }

    fn answer(&self, syn: &[u8]) -> Option<Arc<Connection>> {
        let buffers = Buffers::take(&self.buffers, self.device.config().limits.buffer);
        let connection = Connection::answer(&self.device, self.clock, buffers, self.leave.ends.1, syn);
        if connection.is_none() {
            packet::send_reset(&self.device, syn);
        }
        connection.map(Arc::new)
    }

    async fn dial<O: Open>(&self, opener: &O) -> Result<O::Stream, SocksError> {
        let mut stream = opener.open(TCP).await?;
        socks::connect(&mut stream, &self.target).await?;
        Ok(stream)
    }

    /// Tells the program in the way of TCP what the host said.
    fn refuse(&self, syn: &[u8], error: &SocksError) {
        tracing::debug!(%error, target = %self.target, "a connection was not made");
        let gateway = self.device.config().gateway_beside(self.leave.ends.1.ip());
        let unreachable = |why| {
            if let Some(gateway) = gateway {
                packet::send_unreachable(&self.device, gateway, syn, why);
            }
        };
        match error.reply() {
            Some(Reply::NetworkUnreachable) | None => unreachable(Unreachable::Network),
            Some(Reply::HostUnreachable) => unreachable(Unreachable::Host),
            // The kernel has waited as long as the host's; it says so to the program itself.
            Some(Reply::TimedOut) => {}
            Some(_) => packet::send_reset(&self.device, syn),
        }
    }

    /// Ends when the program's kernel has not repeated its SYN for so long that the program must have given up:
    /// nothing else tells, and the host would go on dialling for minutes.
    async fn abandoned(&self) {
        loop {
            sleep(GLANCE).await;
            let Leave { connections, ends, number } = &self.leave;
            let given_up = connections.with(ends, *number, |entry| match &entry.state {
                // 1, 2, 4, … seconds lie between them, and never more than 120 (tcp(7), tcp_syn_retries).
                Stage::Dialling { heard, times, .. } => {
                    let next = Duration::from_secs(1 << (*times - 1).min(7));
                    heard.elapsed() > next * 2 + GLANCE
                }
                Stage::Open(_) => false,
            });
            if given_up.unwrap_or(true) {
                return;
            }
        }
    }
}
