//! UDP and echo: each source of the guest's has a stream to the host, over which its datagrams travel as frames.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::packet;
use super::tun::Tun;
use crate::datagram::{Content, Frame, Frames, Unreachable};
use crate::{Open, RESOLVER, Target, UDP};

/// What waits for the stream of one source; more is dropped.
const QUEUE: usize = 256;
/// How long a source is remembered after its last datagram (RFC 4787 §4.3 asks for two minutes at least) …
const IDLE: Duration = Duration::from_secs(120);
/// … and one that only asked for names, which programs do from a new port each time.
const IDLE_RESOLVER: Duration = Duration::from_secs(10);
pub(super) const DNS: u16 = 53;

/// Where datagrams come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// A UDP port.
    Port(SocketAddr),
    /// An address and an identifier of its echo requests.
    Echo(IpAddr, u16),
}

impl Source {
    fn address(self) -> IpAddr {
        match self {
            Self::Port(address) => address.ip(),
            Self::Echo(address, _) => address,
        }
    }
}

/// All sources that are being served.
#[derive(Debug)]
pub(super) struct Flows {
    tun: Arc<Tun>,
    flows: HashMap<Source, Flow>,
    waiting: Arc<AtomicUsize>,
    /// Tells a flow from a later one of the same source.
    count: u64,
    /// Those that have ended by themselves.
    ended: Arc<Mutex<Vec<(Source, u64)>>>,
}

#[derive(Debug)]
struct Flow {
    number: u64,
    queue: mpsc::Sender<Waiting>,
    used: Instant,
    task: AbortHandle,
}

/// A frame, and the room that it takes of what may wait.
#[derive(Debug)]
struct Waiting {
    frame: Frame,
    bytes: usize,
    waiting: Arc<AtomicUsize>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Flows {
    pub(super) fn new(tun: &Arc<Tun>) -> Self {
        Self {
            tun: Arc::clone(tun),
            flows: HashMap::new(),
            waiting: Arc::default(),
            count: 0,
            ended: Arc::default(),
        }
    }

    /// Sends a frame for a source, or loses it.
    pub(super) fn send<O: Open>(
        &mut self,
        source: Source,
        frame: Frame,
        opener: &Arc<O>,
        tasks: &mut JoinSet<()>,
    ) {
        for (source, number) in self.ended.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if self.flows.get(&source).is_some_and(|flow| flow.number == number) {
                self.flows.remove(&source);
            }
        }
        let bytes = match &frame.content {
            Content::Datagram(bytes) | Content::Echo(bytes) => bytes.len() + size_of::<Waiting>(),
            Content::Unreachable(_) => size_of::<Waiting>(),
        };
        let limits = self.tun.config().limits;
        if self.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes > limits.waiting {
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
            return;
        }
        let waiting = Waiting { frame, bytes, waiting: Arc::clone(&self.waiting) };
        let flow = match self.flows.get_mut(&source) {
            Some(flow) => flow,
            None => {
                self.make_room(limits.flows);
                let flow = self.start(source, opener, tasks);
                self.flows.entry(source).or_insert(flow)
            }
        };
        flow.used = Instant::now();
        // A queue that is full loses what comes, as a socket's buffer does.
        let _ = flow.queue.try_send(waiting);
    }

    /// Ends all, for another session of the link.
    pub(super) fn reset(&mut self) {
        for (_, flow) in self.flows.drain() {
            flow.task.abort();
        }
    }

    /// The longest idle gives way to a new one.
    fn make_room(&mut self, most: usize) {
        if self.flows.len() >= most.max(1)
            && let Some(oldest) =
                self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(source, _)| *source)
            && let Some(flow) = self.flows.remove(&oldest)
        {
            flow.task.abort();
        }
    }

    fn start<O: Open>(&mut self, source: Source, opener: &Arc<O>, tasks: &mut JoinSet<()>) -> Flow {
        self.count += 1;
        let number = self.count;
        let (queue, receiver) = mpsc::channel(QUEUE);
        let (tun, opener, ended) = (Arc::clone(&self.tun), Arc::clone(opener), Arc::clone(&self.ended));
        let task = tasks.spawn(async move {
            if let Err(error) = serve(source, receiver, &tun, &*opener).await {
                tracing::debug!(%error, ?source, "the stream of a datagram socket ended early");
            }
            ended.lock().unwrap_or_else(PoisonError::into_inner).push((source, number));
        });
        Flow { number, queue, used: Instant::now(), task }
    }
}

async fn serve<O: Open>(
    source: Source,
    mut queue: mpsc::Receiver<Waiting>,
    tun: &Tun,
    opener: &O,
) -> std::io::Result<()> {
    let mut frames = Frames::new(opener.open(UDP).await?);
    let mut idle = IDLE_RESOLVER;
    let mut deadline = Instant::now() + idle;
    loop {
        tokio::select! {
            waiting = queue.recv() => {
                let Some(mut waiting) = waiting else { return Ok(()) };
                loop {
                    if matches!(waiting.frame.peer, Target::Address(_)) {
                        idle = IDLE;
                    }
                    frames.push(&waiting.frame);
                    match queue.try_recv() {
                        Ok(next) => waiting = next,
                        Err(_) => break,
                    }
                }
            }
            frame = frames.next() => match frame? {
                Some(frame) => deliver(source, &frame, tun),
                None => return Ok(()),
            },
            () = sleep_until(deadline) => return Ok(()),
        }
        deadline = Instant::now() + idle;
    }
}

/// Gives the program what the host sent.
fn deliver(source: Source, frame: &Frame, tun: &Tun) {
    let Some(gateway) = tun.config().gateway_beside(source.address()) else { return };
    let peer = match &frame.peer {
        Target::Address(address) => *address,
        Target::Name(name, port) if name == RESOLVER => SocketAddr::new(gateway, *port),
        Target::Name(..) => return,
    };
    if peer.is_ipv4() != source.address().is_ipv4() {
        return;
    }
    match (source, &frame.content) {
        (Source::Port(program), Content::Datagram(payload)) => packet::send_udp(tun, peer, program, payload),
        (Source::Port(program), Content::Unreachable(why)) => {
            packet::send_unreachable(
                tun,
                reporter(*why, peer, gateway),
                &packet::udp_start(program, peer),
                *why,
            );
        }
        (Source::Echo(program, identifier), Content::Echo(data)) => {
            packet::send_echo(tun, peer.ip(), program, identifier, peer.port(), data);
        }
        (Source::Echo(program, identifier), Content::Unreachable(why)) => {
            let about = packet::echo_start(program, peer.ip(), identifier, peer.port());
            packet::send_unreachable(tun, gateway, &about, *why);
        }
        _ => {}
    }
}

/// That nobody listens is said by the host itself, all else by a router.
fn reporter(why: Unreachable, peer: SocketAddr, gateway: IpAddr) -> IpAddr {
    if why == Unreachable::Port { peer.ip() } else { gateway }
}
