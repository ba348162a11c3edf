//! Published ports, at the guest's end: the host opens a stream, and this connects it to a server in the guest.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::consume_budget;
use tokio::time::{Instant, sleep_until, timeout};

use super::TunConfig;
use crate::datagram::{Content, Frame, Frames, Unreachable};
use crate::socks::{self, Reply};
use crate::splice::with_piece;
use crate::{Target, splice};

/// For the host to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// After which a UDP client is forgotten.
const IDLE: Duration = Duration::from_secs(120);
const BATCH: usize = 32;
/// A port at which nobody listens is reported as an error, and is no reason to be readable.
const NEWS: Interest = Interest::READABLE.add(Interest::ERROR);

/// Serves one stream of service [`TCP`](crate::TCP) that the host has opened: SOCKS5 `CONNECT` to a port of `127.0.0.1`.
/// A server that does not listen there is looked for on the guest's other addresses. Ends with the connection.
pub async fn serve_tcp<S>(mut stream: S, config: &TunConfig)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let target = match timeout(PATIENCE, socks::accept(&mut stream)).await {
        Ok(Ok(target)) => target,
        Ok(Err(error)) => return tracing::debug!(%error, "the host's request was not understood"),
        Err(_) => return tracing::debug!("the host asked for nothing"),
    };
    let mut server = match connect(&target, config).await {
        Ok(server) => server,
        Err(error) => {
            let _ = socks::refuse_request(&mut stream, Reply::from(&error)).await;
            return;
        }
    };
    if socks::answer(&mut stream, Reply::Succeeded).await.is_err() {
        return;
    }
    if let Err(error) = splice(&mut stream, &mut server).await {
        // The server is told that this was no orderly end.
        let _ = server.set_zero_linger();
        tracing::debug!(%error, %target, "a connection to a published port ended early");
    }
}

async fn connect(target: &Target, config: &TunConfig) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::PermissionDenied);
    for address in places(target, config) {
        match TcpStream::connect(address).await {
            Ok(server) => {
                let _ = server.set_nodelay(true);
                return Ok(server);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Where a server may listen that is asked for at a loopback address; nothing else can be asked for.
fn places(target: &Target, config: &TunConfig) -> Vec<SocketAddr> {
    let Target::Address(address) = target else { return Vec::new() };
    if !address.ip().is_loopback() {
        return Vec::new();
    }
    let mut places: Vec<IpAddr> = vec![Ipv4Addr::LOCALHOST.into()];
    places.extend(config.ipv4.map(|v4| IpAddr::V4(v4.address)));
    places.push(Ipv6Addr::LOCALHOST.into());
    places.extend(config.ipv6.map(|v6| IpAddr::V6(v6.address)));
    places.into_iter().map(|place| SocketAddr::new(place, address.port())).collect()
}

/// Serves one stream of service [`UDP`](crate::UDP) that the host has opened for one client of a published port. Ends
/// when the client has been silent for two minutes, or the host has ended the stream.
pub async fn serve_udp<S>(stream: S, config: &TunConfig)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if let Err(error) = relay(Frames::new(stream), config).await {
        tracing::debug!(%error, "serving a client of a published UDP port ended early");
    }
}

async fn relay<S>(mut frames: Frames<S>, config: &TunConfig) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut server: Option<Server> = None;
    let mut deadline = Instant::now() + IDLE;
    loop {
        let readable = async {
            match &server {
                Some(server) => server.socket.ready(NEWS).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            frame = frames.next() => {
                let Some(frame) = frame? else { return Ok(()) };
                let Content::Datagram(payload) = &frame.content else { continue };
                if server.as_ref().is_none_or(|server| server.target != frame.peer) {
                    server = Server::open(&frame.peer, config).await?;
                }
                let Some(server) = &mut server else {
                    frames.push(&Frame::unreachable(frame.peer, Unreachable::Prohibited));
                    continue;
                };
                server.last.clone_from(payload);
                server.send();
            }
            ready = readable => {
                ready?;
                if let Some(server) = &mut server {
                    server.answer(&mut frames).await?;
                }
            }
            () = sleep_until(deadline) => return Ok(()),
        }
        deadline = Instant::now() + IDLE;
        // Sockets that always have something to tell count for nothing otherwise.
        consume_budget().await;
    }
}

/// The server that a client speaks to.
struct Server {
    target: Target,
    /// Where it may listen: at least one place.
    places: Vec<SocketAddr>,
    /// Where it was not looked for yet.
    further: std::vec::IntoIter<SocketAddr>,
    socket: UdpSocket,
    /// The last datagram of the client's, in case nobody was where it was sent to.
    last: Vec<u8>,
}

impl Server {
    async fn open(target: &Target, config: &TunConfig) -> io::Result<Option<Self>> {
        let places = places(target, config);
        let mut further = places.clone().into_iter();
        let Some(first) = further.next() else { return Ok(None) };
        let socket = connected(first).await?;
        Ok(Some(Self { target: target.clone(), places, further, socket, last: Vec::new() }))
    }

    /// Sends the client's last datagram. What the system says about it comes with the next answer.
    fn send(&self) {
        let _ = send(&self.socket, &self.last, SendFlags::DONTWAIT);
    }

    /// Sends the host what the server answered.
    async fn answer<S>(&mut self, frames: &mut Frames<S>) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        for _ in 0..BATCH {
            let received = with_piece(|piece| {
                let mut receive = || Ok(recv(&self.socket, &mut *piece, RecvFlags::DONTWAIT)?.0);
                // The runtime looks for one kind of readiness at a time.
                let received = self.socket.try_io(Interest::READABLE, &mut receive);
                let length = match received {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.socket.try_io(Interest::ERROR, receive)?
                    }
                    other => other?,
                };
                Ok::<_, io::Error>(piece[..length].to_vec())
            });
            match received {
                Ok(payload) => drop(frames.push(&Frame::datagram(self.target.clone(), payload))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return self.look_further(frames).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Nobody listened where the last datagram went.
    async fn look_further<S>(&mut self, frames: &mut Frames<S>) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Places of a family that the guest has not got cannot even be connected to.
        for place in self.further.by_ref() {
            if let Ok(socket) = connected(place).await {
                self.socket = socket;
                self.send();
                return Ok(());
            }
        }
        frames.push(&Frame::unreachable(self.target.clone(), Unreachable::Port));
        // It may only have been restarted.
        self.further = self.places.clone().into_iter();
        self.socket = connected(self.places[0]).await?;
        Ok(())
    }
}

async fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(to).await?;
    Ok(socket)
}
