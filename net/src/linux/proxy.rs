//! The user-space half of published ports: what comes to the host's sockets is carried to the container.
//!
//! One thread, one `poll(2)` loop, no matter how many ports and connections; started only if there are ports.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use super::worker::{Stop, Worker};
use crate::ports::{BoundPort, Held};

/// More connections wait in the sockets' queues. Each takes two descriptors, and a process usually has 1024: clients
/// from outside must not take them all from the supervisor. (Most traffic never comes here: the rules carry it.)
const MOST_CONNECTIONS: usize = 256;
/// More UDP clients take the places of the longest idle ones. Each takes a descriptor.
const MOST_FLOWS: usize = 128;
/// After which a UDP client is forgotten (conntrack's time for streams).
const IDLE: Duration = Duration::from_secs(120);
const BUFFER: usize = 32 << 10;
const LARGEST_DATAGRAM: usize = 65_536;

/// Serves until dropped.
#[derive(Debug)]
pub(super) struct Proxy {
    _worker: Worker,
}

impl Proxy {
    pub(super) fn start(ports: Vec<BoundPort>, container: IpAddr) -> io::Result<Self> {
        let mut serving = Serving::default();
        for port in ports {
            let to = SocketAddr::new(container, port.spec.container_port);
            for socket in port.sockets {
                match socket {
                    Held::Tcp(listener) => serving.listeners.push((listener, to)),
                    Held::Udp(socket) => serving.sockets.push((socket, to)),
                }
            }
        }
        let worker = Worker::start("kiln-proxy", move |stop| serving.run(stop))?;
        Ok(Self { _worker: worker })
    }
}

#[derive(Debug, Default)]
struct Serving {
    listeners: Vec<(TcpListener, SocketAddr)>,
    sockets: Vec<(UdpSocket, SocketAddr)>,
    connections: Vec<Connection>,
    /// By the index of the socket and the client's address.
    flows: HashMap<(usize, SocketAddr), Flow>,
    /// Room for the largest datagram, made with the first one.
    datagram: Vec<u8>,
}

#[derive(Debug)]
struct Flow {
    socket: UdpSocket,
    used: Instant,
}

#[derive(Debug, Clone, Copy)]
enum Ready {
    Stop,
    Listener(usize),
    Socket(usize),
    Connection(usize),
    Flow((usize, SocketAddr)),
}

impl Serving {
    fn run(mut self, stop: &Stop) {
        loop {
            let ready = match self.wait(stop) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return tracing::error!(%error, "waiting for published ports"),
            };
            for event in ready {
                match event {
                    Ready::Stop => return,
                    Ready::Listener(index) => self.accept(index),
                    Ready::Socket(index) => self.carry_to_container(index),
                    Ready::Connection(index) => self.connections[index].carry(),
                    Ready::Flow(key) => self.carry_to_client(key),
                }
            }
            self.connections.retain(|connection| !connection.over);
            self.flows.retain(|_, flow| flow.used.elapsed() < IDLE);
        }
    }

    fn wait(&self, stop: &Stop) -> rustix::io::Result<Vec<Ready>> {
        let mut what = vec![Ready::Stop];
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        if self.connections.len() < MOST_CONNECTIONS {
            for (index, (listener, _)) in self.listeners.iter().enumerate() {
                watch(&mut what, &mut fds, Ready::Listener(index), listener.as_fd(), PollFlags::IN);
            }
        }
        for (index, (socket, _)) in self.sockets.iter().enumerate() {
            watch(&mut what, &mut fds, Ready::Socket(index), socket.as_fd(), PollFlags::IN);
        }
        for (index, connection) in self.connections.iter().enumerate() {
            let (client, server) = connection.interest();
            watch(&mut what, &mut fds, Ready::Connection(index), connection.client.as_fd(), client);
            watch(&mut what, &mut fds, Ready::Connection(index), connection.server.as_fd(), server);
        }
        for (key, flow) in &self.flows {
            watch(&mut what, &mut fds, Ready::Flow(*key), flow.socket.as_fd(), PollFlags::IN);
        }
        let sweep = Timespec { tv_sec: 10, tv_nsec: 0 };
        poll(&mut fds, (!self.flows.is_empty()).then_some(&sweep))?;
        Ok(fds.iter().zip(what).filter(|(fd, _)| !fd.revents().is_empty()).map(|(_, what)| what).collect())
    }

    fn accept(&mut self, index: usize) {
        let (listener, to) = &self.listeners[index];
        match listener.accept().and_then(|(client, _)| Connection::open(client, *to)) {
            Ok(connection) => self.connections.push(connection),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of descriptors, most likely: the queue keeps the client until some are free again.
                tracing::debug!(%error, "a connection to a published port could not be taken");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn carry_to_container(&mut self, index: usize) {
        let (socket, to) = &self.sockets[index];
        self.datagram.resize(LARGEST_DATAGRAM, 0);
        // Not for ever: others want to be served too.
        for _ in 0..64 {
            let Ok((length, client)) = socket.recv_from(&mut self.datagram) else { return };
            let key = (index, client);
            if !self.flows.contains_key(&key) {
                if self.flows.len() >= MOST_FLOWS
                    && let Some(oldest) =
                        self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(key, _)| *key)
                {
                    self.flows.remove(&oldest);
                }
                match Flow::open(*to) {
                    Ok(flow) => drop(self.flows.insert(key, flow)),
                    Err(error) => return tracing::debug!(%error, "a datagram could not be carried"),
                }
            }
            if let Some(flow) = self.flows.get_mut(&key) {
                flow.used = Instant::now();
                // Datagrams may be lost: a full queue or a closed port is the sender's to notice.
                let _ = flow.socket.send(&self.datagram[..length]);
            }
        }
    }

    fn carry_to_client(&mut self, key: (usize, SocketAddr)) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        self.datagram.resize(LARGEST_DATAGRAM, 0);
        for _ in 0..64 {
            let Ok(length) = flow.socket.recv(&mut self.datagram) else { return };
            flow.used = Instant::now();
            let _ = self.sockets[key.0].0.send_to(&self.datagram[..length], key.1);
        }
    }
}

/// A descriptor without interest is left out: it would wake us for ever once its peer has gone.
fn watch<'a>(
    what: &mut Vec<Ready>,
    fds: &mut Vec<PollFd<'a>>,
    ready: Ready,
    fd: BorrowedFd<'a>,
    flags: PollFlags,
) {
    if !flags.is_empty() {
        what.push(ready);
        fds.push(PollFd::from_borrowed_fd(fd, flags));
    }
}

impl Flow {
    fn open(to: SocketAddr) -> io::Result<Self> {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, used: Instant::now() })
    }
}

#[derive(Debug)]
struct Connection {
    client: TcpStream,
    server: TcpStream,
    connecting: bool,
    up: Stream,
    down: Stream,
    over: bool,
}

impl Connection {
    fn open(client: TcpStream, to: SocketAddr) -> io::Result<Self> {
        client.set_nonblocking(true)?;
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let server = socket_with(family, SocketType::STREAM, flags, None)?;
        match connect(&server, &to) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let server = TcpStream::from(server);
        // Small writes were gathered by whoever made them; waiting again would only add time.
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (up, down) = (Stream::default(), Stream::default());
        Ok(Self { client, server, connecting: true, up, down, over: false })
    }

    /// What to wait for at the client's and at the container's end.
    fn interest(&self) -> (PollFlags, PollFlags) {
        if self.connecting {
            return (PollFlags::empty(), PollFlags::OUT);
        }
        let flags = |from: &Stream, to: &Stream| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, from.is_empty() && !from.finished);
            flags.set(PollFlags::OUT, !to.is_empty());
            flags
        };
        (flags(&self.up, &self.down), flags(&self.down, &self.up))
    }

    fn carry(&mut self) {
        if self.connecting {
            match self.server.take_error() {
                Ok(None) => self.connecting = false,
                Ok(Some(_)) | Err(_) => {
                    self.over = true;
                    return;
                }
            }
        }
        let up = self.up.carry(&self.client, &self.server);
        let down = self.down.carry(&self.server, &self.client);
        self.over = up.is_err() || down.is_err() || (self.up.closed && self.down.closed);
    }
}

/// One direction of a connection.
#[derive(Debug, Default)]
struct Stream {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The sender sends no more.
    finished: bool,
    /// The receiver was told so.
    closed: bool,
}

impl Stream {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn carry(&mut self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        if self.buffer.is_empty() {
            self.buffer.resize(BUFFER, 0);
        }
        // A few rounds, so that one fast connection does not starve the others.
        for _ in 0..16 {
            let step = if !self.is_empty() {
                to.write(&self.buffer[self.start..self.end]).map(|written| self.start += written)
            } else if self.finished {
                break;
            } else {
                from.read(&mut self.buffer).map(|read| {
                    (self.start, self.end) = (0, read);
                    self.finished = read == 0;
                })
            };
            match step {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // Also after the last round: nothing of this direction is waited for any more.
        if self.finished && self.is_empty() && !self.closed {
            self.closed = true;
            // The other end may be gone altogether, which is what we wanted to say.
            let _ = to.shutdown(Shutdown::Write);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_in_whichever_round_it_comes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = || {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            (near, far)
        };
        for length in 0..20 {
            let ((mut sender, from), (to, mut receiver)) = (pair(), pair());
            sender.write_all(&vec![7; length]).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
            // A byte is still to be written, and each is a round of its own.
            let mut stream = Stream { buffer: vec![7], end: 1, ..Stream::default() };
            while !stream.closed {
                stream.carry(&from, &to).unwrap();
                assert!(
                    stream.closed || !stream.finished || !stream.is_empty(),
                    "{length}: nobody would wake it"
                );
            }
            let mut received = Vec::new();
            receiver.read_to_end(&mut received).unwrap();
            assert_eq!(received.len(), length + 1);
        }
    }
}
