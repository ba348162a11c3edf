//! Published ports: what comes to a port of the host's is carried to the guest.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_contract::PublishSpec;
use kiln_usernet::datagram::{Content, Frame, Frames};
use kiln_usernet::socks;
use kiln_usernet::{Open, TCP, Target, UDP, splice};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::NetError;
use crate::ports::{self, BoundPort, Held};

/// More connections wait in the sockets' queues. Each takes a descriptor: clients from outside must not take them all.
const MOST_CONNECTIONS: usize = 256;
/// UDP clients of one port. A new one takes the place of the longest idle.
const MOST_CLIENTS: usize = 128;
/// After which a UDP client is forgotten (conntrack's time for streams).
const IDLE: Duration = Duration::from_secs(120);
/// Datagrams of one client that wait for the link.
const QUEUE: usize = 64;
const LARGEST: usize = 65_536;

/// Ports of the host's that lead into a guest. They are free again when this is dropped.
#[derive(Debug)]
pub struct Published {
    specs: Vec<PublishSpec>,
    /// Sockets that are held, but not served yet.
    bound: Vec<BoundPort>,
    tasks: JoinSet<()>,
    connections: Arc<Semaphore>,
}

impl Published {
    /// Takes all ports, or none. Nothing is served yet, but nobody else can take them any more: a guest takes a
    /// moment to start.
    ///
    /// # Errors
    /// [`NetError::PortTaken`] and [`NetError::PortFailed`].
    pub fn bind(ports: &[PublishSpec]) -> Result<Self, NetError> {
        let bound = ports::bind(ports)?;
        let specs = bound.iter().map(|port| port.spec.clone()).collect();
        let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        Ok(Self { specs, bound, tasks: JoinSet::new(), connections })
    }

    /// The ports as they were published, with the host's chosen.
    pub fn ports(&self) -> &[PublishSpec] {
        &self.specs
    }

    /// Serves them, on the runtime of the caller. `sessions` holds what opens streams to the guest; another value stands for
    /// another session of the link, and only new connections use it.
    ///
    /// # Errors
    /// [`NetError::PortFailed`] where a socket cannot be waited for.
    pub fn serve<O: Open>(&mut self, sessions: &watch::Receiver<Arc<O>>) -> Result<(), NetError> {
        for port in self.bound.drain(..) {
            let failed = |source| NetError::PortFailed { port: port.spec.clone(), source };
            let inside = SocketAddr::from(([127, 0, 0, 1], port.spec.container_port));
            for socket in port.sockets {
                let sessions = sessions.clone();
                match socket {
                    Held::Tcp(listener) => {
                        let listener = TcpListener::from_std(listener).map_err(failed)?;
                        let connections = Arc::clone(&self.connections);
                        self.tasks.spawn(accept(listener, inside, sessions, connections));
                    }
                    Held::Udp(socket) => {
                        let socket = Arc::new(UdpSocket::from_std(socket).map_err(failed)?);
                        self.tasks.spawn(receive(socket, inside, sessions));
                    }
                }
            }
        }
        Ok(())
    }
}

async fn accept<O: Open>(
    listener: TcpListener,
    inside: SocketAddr,
    sessions: watch::Receiver<Arc<O>>,
    connections: Arc<Semaphore>,
) {
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                // Out of descriptors, most likely: the queue keeps the client until some are free again.
                tracing::debug!(%error, "a connection to a published port could not be taken");
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let opener = Arc::clone(&sessions.borrow());
        tasks.spawn(async move {
            let _permit = permit;
            carry(client, inside, &*opener).await;
        });
    }
}

async fn carry<O: Open>(mut client: TcpStream, inside: SocketAddr, opener: &O) {
    let _ = client.set_nodelay(true);
    let carried = async {
        let mut stream = opener.open(TCP).await?;
        socks::connect(&mut stream, &Target::Address(inside)).await.map_err(io::Error::other)?;
        splice(&mut client, &mut stream).await
    };
    if let Err(error) = carried.await {
        // The client has been answered by our kernel already; a reset is all that can still be said.
        let _ = client.set_zero_linger();
        tracing::debug!(%inside, %error, "a connection to a published port ended early");
    }
}

/// The clients of one UDP port, each with its own stream.
type Clients = HashMap<SocketAddr, Client>;

#[derive(Debug)]
struct Client {
    queue: mpsc::Sender<Vec<u8>>,
    used: Instant,
    task: tokio::task::AbortHandle,
    number: u64,
}

async fn receive<O: Open>(socket: Arc<UdpSocket>, inside: SocketAddr, sessions: watch::Receiver<Arc<O>>) {
    let mut tasks = JoinSet::new();
    let clients = Arc::new(Mutex::new(Clients::new()));
    let mut datagram = vec![0; LARGEST];
    for number in 0.. {
        while tasks.try_join_next().is_some() {}
        let (length, client) = match socket.recv_from(&mut datagram).await {
            Ok(received) => received,
            Err(error) => {
                // What a client's host said about an answer; the socket is as good as before.
                tracing::debug!(%error, "a datagram to a published port could not be taken");
                continue;
            }
        };
        let payload = datagram[..length].to_vec();
        let mut known = clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = known.get_mut(&client) {
            client.used = Instant::now();
            // A queue that is full loses what comes, as a socket's buffer does.
            let _ = client.queue.try_send(payload);
            continue;
        }
        if known.len() >= MOST_CLIENTS
            && let Some(oldest) = known.iter().min_by_key(|(_, client)| client.used).map(|(key, _)| *key)
            && let Some(gone) = known.remove(&oldest)
        {
            gone.task.abort();
        }
        let (queue, from_client) = mpsc::channel(QUEUE);
        let _ = queue.try_send(payload);
        let (socket, opener) = (Arc::clone(&socket), Arc::clone(&sessions.borrow()));
        let leaving = Arc::clone(&clients);
        let task = tasks.spawn(async move {
            if let Err(error) = exchange(&socket, client, inside, from_client, &*opener).await {
                tracing::debug!(%inside, %error, "a client of a published UDP port was lost");
            }
            let mut clients = leaving.lock().unwrap_or_else(PoisonError::into_inner);
            if clients.get(&client).is_some_and(|client| client.number == number) {
                clients.remove(&client);
            }
        });
        known.insert(client, Client { queue, used: Instant::now(), task, number });
    }
}

async fn exchange<O: Open>(
    socket: &UdpSocket,
    client: SocketAddr,
    inside: SocketAddr,
    mut from_client: mpsc::Receiver<Vec<u8>>,
    opener: &O,
) -> io::Result<()> {
    let mut frames = Frames::new(opener.open(UDP).await?);
    let mut deadline = Instant::now() + IDLE;
    loop {
        tokio::select! {
            payload = from_client.recv() => match payload {
                Some(payload) => drop(frames.push(&Frame::datagram(inside, payload))),
                None => return Ok(()),
            },
            frame = frames.next() => match frame?.map(|frame| frame.content) {
                Some(Content::Datagram(payload)) => drop(socket.try_send_to(&payload, client)),
                // That nobody listens is not told to clients by any proxy: the port itself is open.
                Some(_) => {}
                None => return Ok(()),
            },
            () = sleep_until(deadline) => return Ok(()),
        }
        deadline = Instant::now() + IDLE;
    }
}
