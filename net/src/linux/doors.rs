//! Takes in what is sent to a machine's address on a bridge.
//!
//! A rule in the machine's namespace hands every packet to it, whatever its port, to two sockets of the monitor's (`tproxy`:
//! nothing of the packet is changed). Each connection then says itself which port it is for, and is carried to that port of
//! the guest over a stream. For UDP the first datagram of each client does so; a socket that is connected to the client takes
//! the rest. (In the host's own namespace that would not do: packets that have come over a bridge lose their socket where
//! `br_netfilter` looks at them.)

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_usernet::datagram::{Content, Frame, Frames};
use kiln_usernet::{Open, TCP, Target, UDP, socks, splice};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, setsockopt,
    sockopt::{IpTransparent, Ipv4OrigDstAddr, ReuseAddr},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, listen, socket_with};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::namespace::Namespace;
use super::nft;
use crate::NetError;

/// More connections wait in the socket's queue. Each takes a descriptor.
const MOST_CONNECTIONS: usize = 512;
/// UDP clients at once: what comes from more is lost. Each takes a descriptor.
const MOST_CLIENTS: usize = 256;
/// After which a UDP client is forgotten (conntrack's time for streams).
const IDLE: Duration = Duration::from_secs(120);
/// Datagrams of one client that wait for the link.
const QUEUE: usize = 64;
const LARGEST: usize = 65_536;

/// The two sockets, and what serves them until this is dropped.
#[derive(Debug)]
pub(super) struct Reception {
    namespace: Arc<Namespace>,
    sockets: Option<(std::net::TcpListener, std::net::UdpSocket)>,
    tasks: JoinSet<()>,
}

fn transparent(kind: SocketType, address: SocketAddrV4) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, kind, flags, None)?;
    setsockopt(&socket, ReuseAddr, &true)?;
    setsockopt(&socket, IpTransparent, &true)?;
    bind(&socket, &address)?;
    Ok(socket)
}

impl Reception {
    /// Opens the sockets in a namespace that has the machine's address, and has everything handed to them.
    pub(super) fn open(namespace: Namespace) -> Result<Self, NetError> {
        let sockets = namespace.enter(|| {
            let open = || -> io::Result<_> {
                let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
                let tcp = transparent(SocketType::STREAM, any)?;
                listen(&tcp, 1024)?;
                let udp = transparent(SocketType::DGRAM, any)?;
                setsockopt(&udp, Ipv4OrigDstAddr, &true)?;
                let (tcp, udp) = (std::net::TcpListener::from(tcp), std::net::UdpSocket::from(udp));
                let ports = (tcp.local_addr()?.port(), udp.local_addr()?.port());
                Ok((tcp, udp, ports))
            };
            let (tcp, udp, (tcp_port, udp_port)) =
                open().map_err(NetError::doing("opening the sockets of a machine's address"))?;
            nft::here(&format!(
                "table ip kiln {{ chain doors {{
                   type filter hook prerouting priority mangle; policy accept;
                   fib daddr type != local accept
                   meta l4proto tcp tproxy to :{tcp_port} accept
                   meta l4proto udp tproxy to :{udp_port} accept
                 }}
               }}\n"
            ))?;
            Ok((tcp, udp))
        })?;
        Ok(Self { namespace: Arc::new(namespace), sockets: Some(sockets), tasks: JoinSet::new() })
    }

    /// Serves what comes.
    pub(super) fn serve<O: Open>(&mut self, sessions: &watch::Receiver<Arc<O>>) -> io::Result<()> {
        let Some((tcp, udp)) = self.sockets.take() else { return Ok(()) };
        self.tasks.spawn(accept(TcpListener::from_std(tcp)?, sessions.clone()));
        let namespace = Arc::clone(&self.namespace);
        self.tasks.spawn(receive(UdpSocket::from_std(udp)?, namespace, sessions.clone()));
        Ok(())
    }
}

/// The port of the guest's.
fn inside(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

async fn accept<O: Open>(listener: TcpListener, sessions: watch::Receiver<Arc<O>>) {
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                // Out of descriptors, most likely: the queue keeps the client until some are free again.
                tracing::debug!(%error, "a connection from the network could not be taken");
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let Ok(port) = client.local_addr().map(|asked| asked.port()) else { continue };
        let opener = Arc::clone(&sessions.borrow());
        tasks.spawn(async move {
            let _permit = permit;
            carry(client, port, &*opener).await;
        });
    }
}

async fn carry<O: Open>(mut client: TcpStream, port: u16, opener: &O) {
    let _ = client.set_nodelay(true);
    let carried = async {
        let mut stream = opener.open(TCP).await?;
        socks::connect(&mut stream, &Target::Address(inside(port))).await.map_err(io::Error::other)?;
        splice(&mut client, &mut stream).await
    };
    if let Err(error) = carried.await {
        // The client has been answered by our kernel already; a reset is all that can still be said.
        let _ = client.set_zero_linger();
        tracing::debug!(port, %error, "a connection from the network ended early");
    }
}

/// Clients by where they are and what port they ask for.
type Clients = HashMap<(SocketAddrV4, u16), mpsc::Sender<Vec<u8>>>;

async fn receive<O: Open>(socket: UdpSocket, namespace: Arc<Namespace>, sessions: watch::Receiver<Arc<O>>) {
    let clients = Arc::new(Mutex::new(Clients::new()));
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        while tasks.try_join_next().is_some() {}
        if socket.readable().await.is_err() {
            return;
        }
        let received = socket.try_io(tokio::io::Interest::READABLE, || next(&socket, &mut buffer));
        let (length, client, asked) = match received {
            Ok(Some(received)) => received,
            Ok(None) | Err(_) => continue,
        };
        let key = (client, asked.port());
        let payload = buffer[..length].to_vec();
        let mut known = clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = known.get(&key) {
            // A queue that is full loses what comes, as a socket's buffer does.
            let _ = queue.try_send(payload);
            continue;
        }
        if known.len() >= MOST_CLIENTS {
            continue;
        }
        let (queue, first) = mpsc::channel(QUEUE);
        let _ = queue.try_send(payload);
        known.insert(key, queue);
        drop(known);
        let (opener, leaving) = (Arc::clone(&sessions.borrow()), Arc::clone(&clients));
        let namespace = Arc::clone(&namespace);
        tasks.spawn(async move {
            if let Err(error) = exchange(&namespace, client, asked, first, &*opener).await {
                tracing::debug!(%client, %asked, %error, "a client's datagrams ended early");
            }
            leaving.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        });
    }
}

/// The next datagram: its length, who sent it, and to where.
fn next(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddrV4, SocketAddrV4)>> {
    let mut control = nix::cmsg_space!(libc::sockaddr_in);
    let mut pieces = [IoSliceMut::new(buffer)];
    let received =
        recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let asked = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4OrigDstAddr(address) => Some(SocketAddrV4::from(SockaddrIn::from(address))),
        _ => None,
    });
    let client = received.address.map(SocketAddrV4::from);
    Ok(client.zip(asked).map(|(client, asked)| (received.bytes, client, asked)))
}

/// Carries the datagrams of one client.
async fn exchange<O: Open>(
    namespace: &Namespace,
    client: SocketAddrV4,
    asked: SocketAddrV4,
    mut first: mpsc::Receiver<Vec<u8>>,
    opener: &O,
) -> io::Result<()> {
    let connected = namespace.enter(|| {
        let open = || -> io::Result<OwnedFd> {
            let socket = transparent(SocketType::DGRAM, asked)?;
            connect(&socket, &client)?;
            Ok(socket)
        };
        open().map_err(NetError::doing("answering a client"))
    });
    let socket = connected.map_err(io::Error::other)?;
    let socket = UdpSocket::from_std(socket.into())?;
    let mut frames = Frames::new(opener.open(UDP).await?);
    let inside = inside(asked.port());
    let mut buffer = vec![0; LARGEST];
    let mut deadline = Instant::now() + IDLE;
    loop {
        tokio::select! {
            // Those that came before this one's own socket was there.
            Some(payload) = first.recv() => drop(frames.push(&Frame::datagram(inside, payload))),
            received = socket.recv(&mut buffer) => match received {
                Ok(length) => drop(frames.push(&Frame::datagram(inside, &buffer[..length]))),
                // What its host said about an answer; the socket is as good as before.
                Err(error) => tracing::debug!(%client, %error, "a client's host complains"),
            },
            frame = frames.next() => match frame?.map(|frame| frame.content) {
                Some(Content::Datagram(payload)) => drop(socket.try_send(&payload)),
                // That nobody listens is not told: to the network, the port is open.
                Some(_) => {}
                None => return Ok(()),
            },
            () = sleep_until(deadline) => return Ok(()),
        }
        deadline = Instant::now() + IDLE;
    }
}
