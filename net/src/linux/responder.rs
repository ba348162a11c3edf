//! The name responder of a container: `127.0.0.11:53` inside its network namespace.
//!
//! The sockets were made inside; the thread runs on the host's side, so that what is forwarded leaves like any other
//! query of the host, and a resolver on the host's own loopback (systemd-resolved) works too. UDP queries are
//! multiplexed in one `poll(2)` loop; the rare TCP ones get a short-lived thread each.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::worker::{Stop, Worker};
use super::zone::Reply;
pub(super) use super::zone::Zone;
use crate::dns::{host_name_servers, refusal};

/// Each takes a descriptor of the supervisor's.
const MOST_PENDING: usize = 64;
const MOST_CONNECTIONS: usize = 8;
/// How long one name server has for an answer (`resolv.conf(5)` gives 5 s to all of them).
const PATIENCE: Duration = Duration::from_millis(2000);

/// Serves until dropped.
#[derive(Debug)]
pub(super) struct Responder {
    _worker: Worker,
}

impl Responder {
    /// `upstreams` are asked in turn for what the zone does not know.
    pub(super) fn start(
        udp: UdpSocket,
        tcp: TcpListener,
        zone: Zone,
        upstreams: Upstreams,
    ) -> io::Result<Self> {
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        let shared = Arc::new(Shared { zone: Mutex::new(zone), upstreams, connections: AtomicUsize::new(0) });
        let serving = Serving { udp, tcp, shared, pending: Vec::new() };
        let worker = Worker::start("kiln-names", move |stop| serving.run(stop))?;
        Ok(Self { _worker: worker })
    }
}

/// Who is asked for names that are not the network's.
#[derive(Debug)]
pub(super) enum Upstreams {
    /// Nobody: such names do not exist.
    Nobody,
    /// These.
    These(Vec<IpAddr>),
    /// The host's name servers as they are at that moment: a laptop changes them with its place.
    OfHost,
}

impl Upstreams {
    fn now(&self) -> Vec<IpAddr> {
        match self {
            Self::Nobody => Vec::new(),
            Self::These(servers) => servers.clone(),
            Self::OfHost => host_name_servers(),
        }
    }
}

#[derive(Debug)]
struct Shared {
    zone: Mutex<Zone>,
    upstreams: Upstreams,
    connections: AtomicUsize,
}

impl Shared {
    /// The answer, or `None` if the query must be forwarded; an empty one is not sent.
    fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let reply = self.zone.lock().unwrap_or_else(PoisonError::into_inner).reply(query);
        match reply {
            Reply::Answer(answer) => Some(answer),
            Reply::Ignore => Some(Vec::new()),
            Reply::Forward if matches!(self.upstreams, Upstreams::Nobody) => {
                Some(refusal(query, ResponseCode::NXDomain).unwrap_or_default())
            }
            Reply::Forward => None,
        }
    }
}

/// A query that was forwarded.
#[derive(Debug)]
struct Pending {
    client: SocketAddr,
    query: Vec<u8>,
    upstreams: Vec<IpAddr>,
    /// Connected to a name server; a new one for each query, so that its port is hard to guess.
    socket: UdpSocket,
    tried: usize,
    deadline: Instant,
    over: bool,
}

struct Serving {
    udp: UdpSocket,
    tcp: TcpListener,
    shared: Arc<Shared>,
    pending: Vec<Pending>,
}

impl Serving {
    fn run(mut self, stop: &Stop) {
        loop {
            let mut fds = vec![
                PollFd::new(stop, PollFlags::IN),
                PollFd::new(&self.udp, PollFlags::IN),
                PollFd::new(&self.tcp, PollFlags::IN),
            ];
            fds.extend(self.pending.iter().map(|pending| PollFd::new(&pending.socket, PollFlags::IN)));
            let timeout = self.pending.iter().map(|pending| pending.deadline).min().map(|deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                Timespec { tv_sec: left.as_secs() as _, tv_nsec: i64::from(left.subsec_nanos()) as _ }
            });
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return tracing::error!(%error, "waiting for name queries"),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready[0] {
                return;
            }
            let now = Instant::now();
            for (pending, ready) in self.pending.iter_mut().zip(&ready[3..]) {
                if *ready {
                    pending.receive(&self.udp);
                } else if pending.deadline <= now {
                    pending.ask_next(&self.udp);
                }
            }
            self.pending.retain(|pending| !pending.over);
            if ready[1] {
                self.take_queries();
            }
            if ready[2] {
                self.take_connection();
            }
        }
    }

    fn take_queries(&mut self) {
        let mut query = [0; 4096];
        for _ in 0..64 {
            let Ok((length, client)) = self.udp.recv_from(&mut query) else { return };
            let query = &query[..length];
            match self.shared.answer(query) {
                Some(answer) if answer.is_empty() => {}
                Some(answer) => drop(self.udp.send_to(&answer, client)),
                None if self.pending.len() >= MOST_PENDING => {
                    drop(refusal(query, ResponseCode::ServFail).map(|no| self.udp.send_to(&no, client)));
                }
                None => {
                    if let Some(pending) =
                        Pending::ask(client, query.to_vec(), &self.udp, self.shared.upstreams.now())
                    {
                        self.pending.push(pending);
                    }
                }
            }
        }
    }

    fn take_connection(&self) {
        let Ok((client, _)) = self.tcp.accept() else { return };
        if self.shared.connections.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("kiln-names-tcp".into()).stack_size(192 << 10);
        let started = thread.spawn(move || {
            if let Err(error) = serve_connection(client, &shared) {
                tracing::debug!(%error, "a name query over TCP ended early");
            }
            shared.connections.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Pending {
    fn ask(client: SocketAddr, query: Vec<u8>, udp: &UdpSocket, upstreams: Vec<IpAddr>) -> Option<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        let deadline = Instant::now();
        let mut pending = Self { client, query, upstreams, socket, tried: 0, deadline, over: false };
        pending.ask_next(udp);
        (!pending.over).then_some(pending)
    }

    /// Asks the next name server; after each had two turns, says that it failed.
    fn ask_next(&mut self, udp: &UdpSocket) {
        while self.tried < self.upstreams.len() * 2 {
            let upstream = self.upstreams[self.tried % self.upstreams.len()];
            self.tried += 1;
            match ask(&self.query, upstream) {
                Ok(socket) => {
                    self.socket = socket;
                    self.deadline = Instant::now() + PATIENCE;
                    return;
                }
                Err(error) => tracing::debug!(%error, %upstream, "a name server cannot be asked"),
            }
        }
        self.over = true;
        if let Some(no) = refusal(&self.query, ResponseCode::ServFail) {
            let _ = udp.send_to(&no, self.client);
        }
    }

    fn receive(&mut self, udp: &UdpSocket) {
        // More than resolvers send: fragments are lost too easily (RFC 9715).
        let mut answer = [0; 8192];
        match self.socket.recv(&mut answer) {
            // The same number and it is an answer: anything else on this port is not for us.
            Ok(length) if length >= 12 && answer[..2] == self.query[..2] && answer[2] & 0x80 != 0 => {
                let _ = udp.send_to(&answer[..length], self.client);
                self.over = true;
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.ask_next(udp),
        }
    }
}

fn ask(query: &[u8], upstream: IpAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match upstream {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect((upstream, 53))?;
    socket.send(query)?;
    Ok(socket)
}

/// RFC 1035 §4.2.2: each message is preceded by its length in two bytes.
fn serve_connection(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    loop {
        let query = match read_message(&mut client) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        let answer = match shared.answer(&query) {
            Some(answer) => answer,
            None => shared
                .upstreams
                .now()
                .into_iter()
                .find_map(|upstream| ask_over_tcp(&query, upstream).ok())
                .or_else(|| refusal(&query, ResponseCode::ServFail))
                .unwrap_or_default(),
        };
        if answer.is_empty() {
            return Ok(());
        }
        write_message(&mut client, &answer)?;
    }
}

fn ask_over_tcp(query: &[u8], upstream: IpAddr) -> io::Result<Vec<u8>> {
    let mut server = TcpStream::connect_timeout(&SocketAddr::new(upstream, 53), PATIENCE)?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.set_write_timeout(Some(PATIENCE))?;
    write_message(&mut server, query)?;
    read_message(&mut server)
}

fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed)
}
