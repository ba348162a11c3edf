//! Guest, host and world.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream as Pair;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use kiln_net::Policy;
use kiln_net::usernet::{Gateway, GatewayLimits, GatewayOptions};
use kiln_usernet::Open;
use kiln_usernet::guest::{self, Tun, TunConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use crate::lab::{Container, Lab, ip, wait_for};

pub const PATIENCE: Duration = Duration::from_secs(20);
/// The host's addresses on the wire, and the world's.
pub const HOST: &str = "10.77.0.1";
pub const FAR: &str = "10.77.0.2";
pub const FAR6: &str = "fd77::2";
pub const GATEWAY: &str = "192.0.0.1";
pub const GATEWAY6: &str = "fd6b:696c:6e00::1";

/// A stream of the link: a pair of sockets, and what a socket pair does not tell: that its other end was dropped.
pub struct Stream {
    inner: UnixStream,
    shut: bool,
    dropped: Arc<AtomicBool>,
    other_dropped: Arc<AtomicBool>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.shut {
            self.dropped.store(true, Ordering::SeqCst);
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        if matches!(read, Poll::Ready(Ok(())))
            && buf.filled().len() == before
            && self.other_dropped.load(Ordering::SeqCst)
        {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        read
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// The far end of a stream, on its way to another runtime.
pub struct Far {
    service: u16,
    socket: Pair,
    dropped: Arc<AtomicBool>,
    other_dropped: Arc<AtomicBool>,
}

impl Far {
    fn arrive(self) -> (u16, Stream) {
        let inner = UnixStream::from_std(self.socket).unwrap();
        let Self { dropped, other_dropped, .. } = self;
        (self.service, Stream { inner, shut: false, dropped, other_dropped })
    }
}

/// One end of a link.
#[derive(Clone)]
pub struct Link(mpsc::UnboundedSender<Far>);

impl Open for Link {
    type Stream = Stream;

    async fn open(&self, service: u16) -> io::Result<Stream> {
        let (near, far) = Pair::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let (dropped, other_dropped) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let far = Far {
            service,
            socket: far,
            dropped: Arc::clone(&other_dropped),
            other_dropped: Arc::clone(&dropped),
        };
        self.0.send(far).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(Stream { inner: UnixStream::from_std(near)?, shut: false, dropped, other_dropped })
    }
}

pub struct World {
    pub guest: Container,
    pub far: Container,
    pub gateway: Arc<Gateway>,
    /// From the guest to the host, as a hostile guest could use it.
    pub link: Link,
    /// From the host to the guest.
    pub inward: watch::Receiver<Arc<Link>>,
    /// What the guest's half opens streams with.
    sessions: Option<watch::Sender<Arc<Link>>>,
    threads: Vec<JoinHandle<()>>,
    _lab: Lab,
}

pub fn options(rules: &[&str]) -> GatewayOptions {
    GatewayOptions {
        guest: "test".into(),
        policy: rules.iter().map(|rule| rule.parse::<kiln_net::Rule>().unwrap()).collect::<Policy>(),
        limits: GatewayLimits { connections: 4096, flows: 256, queries: 64 },
        ..GatewayOptions::default()
    }
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

impl World {
    /// `None` after a skip.
    pub fn start(options: GatewayOptions) -> Option<Self> {
        Self::start_with(options, TunConfig::default())
    }

    pub fn start_with(options: GatewayOptions, config: TunConfig) -> Option<Self> {
        let lab = Lab::enter()?;
        let (guest, far) = (Container::start(), Container::start());
        ip(&format!("link add far0 type veth peer name eth0 netns {}", far.pid()));
        ip(&format!("addr add {HOST}/24 dev far0"));
        ip("addr add fd77::1/64 dev far0 nodad");
        ip("link set far0 up");
        for line in [
            "link set lo up",
            "addr add 10.77.0.2/24 dev eth0",
            "addr add fd77::2/64 dev eth0 nodad",
            "link set eth0 up",
        ] {
            far.run(&format!("ip {line}")).unwrap();
        }
        guest.run("ip link set lo up").unwrap();
        far.inside(|| {
            // What is sent beyond it is lost without a word. (New namespaces begin with what the machine has.)
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
            // A kernel reports no more than a few failures a second to the same host.
            std::fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0").unwrap();
            std::fs::write("/proc/sys/net/ipv6/icmp/ratelimit", "0").unwrap();
        });
        // The kernel takes up to a second to notice that both ends of the wire are up, and loses what is sent before.
        for far in [SocketAddr::new(address(FAR), 1), SocketAddr::new(address(FAR6), 1)] {
            wait_for("the wire", || {
                let answer = TcpStream::connect_timeout(&far, Duration::from_secs(3));
                answer.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            });
        }

        let gateway = Arc::new(Gateway::new(options));
        let (link, mut to_host) = mpsc::unbounded_channel();
        let link = Link(link);
        let serving = Arc::clone(&gateway);
        // Threads are born in the namespace of the one that starts them: this is the host.
        let host = std::thread::spawn(move || {
            runtime().block_on(async move {
                while let Some(far) = to_host.recv().await {
                    let (service, stream) = Far::arrive(far);
                    let gateway = Arc::clone(&serving);
                    match service {
                        kiln_usernet::TCP => drop(tokio::spawn(async move {
                            gateway.serve_tcp(stream).await;
                        })),
                        kiln_usernet::UDP => drop(tokio::spawn(async move {
                            gateway.serve_udp(stream).await;
                        })),
                        other => panic!("service {other}"),
                    }
                }
            });
        });
        let (sessions, opener) = watch::channel(Arc::new(link.clone()));
        let (to_guest, mut from_host) = mpsc::unbounded_channel();
        let (_, inward) = watch::channel(Arc::new(Link(to_guest)));
        let tun = guest.inside(|| Tun::create(&config).unwrap());
        let namespace = std::fs::File::open(guest.namespace()).unwrap();
        let inside = std::thread::spawn(move || {
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&namespace),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .unwrap();
            runtime().block_on(async move {
                let config = Arc::new(config);
                let serve = async {
                    while let Some(far) = from_host.recv().await {
                        let (service, stream) = Far::arrive(far);
                        let config = Arc::clone(&config);
                        match service {
                            kiln_usernet::TCP => drop(tokio::spawn(async move {
                                guest::serve_tcp(stream, &config).await;
                            })),
                            kiln_usernet::UDP => drop(tokio::spawn(async move {
                                guest::serve_udp(stream, &config).await;
                            })),
                            other => panic!("service {other}"),
                        }
                    }
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    ended = guest::run(tun, opener) => ended.unwrap(),
                    () = serve => {}
                }
            });
        });
        let threads = vec![host, inside];
        Some(Self { guest, far, gateway, link, inward, sessions: Some(sessions), threads, _lab: lab })
    }

    /// Another session of the link.
    pub fn renew(&self) {
        self.sessions.as_ref().unwrap().send(Arc::new(self.link.clone())).unwrap();
    }

    /// Connects from inside the guest.
    pub fn connect(&self, to: &str) -> io::Result<TcpStream> {
        let to: SocketAddr = to.parse().unwrap();
        let stream = self.guest.inside(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Ok(stream)
    }

    /// A UDP socket in the guest, connected.
    pub fn datagrams(&self, to: &str) -> UdpSocket {
        let to: SocketAddr = to.parse().unwrap();
        let socket = self.guest.inside(|| {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            socket.connect(to).unwrap();
            socket
        });
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Answers every connection to `at` in the world with what it was sent, once the client has sent all, and every datagram
    /// at once.
    pub fn serve_far(&self, at: &str) {
        serve_echo(&self.far, at);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.sessions.take();
        self.inward = watch::channel(Arc::new(Link(mpsc::unbounded_channel().0))).1;
        let unused = Link(mpsc::unbounded_channel().0);
        drop(std::mem::replace(&mut self.link, unused));
        for thread in self.threads.drain(..) {
            if thread.join().is_err() && !std::thread::panicking() {
                panic!("one half failed");
            }
        }
    }
}

pub fn serve_echo(container: &Container, at: &str) {
    let at: SocketAddr = at.parse().unwrap();
    let (tcp, udp) = container.inside(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap()));
    serve_sockets(tcp, udp);
}

pub fn serve_sockets(tcp: TcpListener, udp: UdpSocket) {
    std::thread::spawn(move || {
        for connection in tcp.incoming() {
            let Ok(mut connection) = connection else { return };
            std::thread::spawn(move || {
                let mut asked = Vec::new();
                if connection.read_to_end(&mut asked).is_ok() {
                    let _ = connection.write_all(&asked);
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut asked = vec![0; 65_536];
        while let Ok((length, client)) = udp.recv_from(&mut asked) {
            let _ = udp.send_to(&asked[..length], client);
        }
    });
}

/// Sends all, says that this is all, and gives back all that came.
pub fn exchange(mut stream: &TcpStream, all: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(all)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// What a connected UDP socket gets as an answer. Asks again: on a machine that is busy, fragments are lost.
pub fn ask(socket: &UdpSocket, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; 65_536];
    let patience = socket.read_timeout()?.unwrap_or(PATIENCE);
    socket.set_read_timeout(Some(patience / 10))?;
    let mut result = Err(ErrorKind::WouldBlock.into());
    for _ in 0..10 {
        socket.send(question)?;
        result = socket.recv(&mut answer);
        if !matches!(&result, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            break;
        }
    }
    socket.set_read_timeout(Some(patience))?;
    answer.truncate(result?);
    Ok(answer)
}

pub fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}
