//! TCP: what the guest asks for with SOCKS5 is dialled, if it may be.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use kiln_usernet::socks::{self, Reply};
use kiln_usernet::{RESOLVER, TCP, Target, splice};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::counters::Tally;
use super::gateway::{Gateway, HOST, Place};
use super::names::BoxStream;
use crate::dns::DOMAIN;
use crate::policy::Denied;

/// For the guest to say what it wants.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that a client may send before it was told that its connection is made.
const EARLY: usize = 4096;
/// Addresses of one name that are tried.
const MOST_ADDRESSES: usize = 16;

/// What was dialled.
enum Server {
    Tcp(TcpStream),
    Machine(BoxStream),
    Resolver,
}

/// Why not.
enum Failure {
    Denied(Denied),
    Failed(Reply, String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Failed(Reply::from(&error), error.to_string())
    }
}

impl From<Denied> for Failure {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

impl Gateway {
    /// Serves one stream of service [`TCP`] that the guest has opened, until it ends.
    pub async fn serve_tcp<S>(&self, mut stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Before anything is read: a guest that opens streams and says nothing has its limit too.
        let Some(_permit) = self.take_connection() else {
            let _ = socks::refuse(&mut stream, Reply::Failed).await;
            return;
        };
        let guest = self.options.guest.as_str();
        let target = match timeout(PATIENCE, socks::accept(&mut stream)).await {
            Ok(Ok(target)) => target,
            Ok(Err(error)) => return tracing::debug!(guest, %error, "a request was not understood"),
            Err(_) => return tracing::debug!(guest, "a stream was opened and nothing asked for"),
        };
        let mut early = Vec::new();
        let dialled = tokio::select! {
            dialled = self.dial(&target) => dialled,
            // The program has given up; there is nobody to dial for.
            () = end_of(&mut stream, &mut early) => return,
        };
        let server = match dialled {
            Ok(server) => server,
            Err(Failure::Denied(denied)) => {
                self.deny(&self.tally.denied_connections, "a connection", &target, denied);
                let _ = socks::refuse_request(&mut stream, Reply::NotAllowed).await;
                return;
            }
            Err(Failure::Failed(reply, error)) => {
                tracing::debug!(guest, %target, error, "a connection was not made");
                let _ = socks::refuse_request(&mut stream, reply).await;
                return;
            }
        };
        if socks::answer(&mut stream, Reply::Succeeded).await.is_err() {
            return;
        }
        Tally::add(&self.tally.connections, 1);
        let carried = match server {
            Server::Resolver => return self.serve_names(stream, early).await,
            Server::Tcp(mut server) => {
                let carried = carry(&mut stream, &early, &mut server).await;
                if carried.is_err() {
                    // The server is told that this was no orderly end.
                    let _ = server.set_zero_linger();
                }
                carried
            }
            Server::Machine(mut server) => carry(&mut stream, &early, &mut server).await,
        };
        match carried {
            Ok(carried) => {
                Tally::add(&self.tally.sent, carried.there);
                Tally::add(&self.tally.received, carried.back);
            }
            Err(error) => tracing::debug!(guest, %target, %error, "a connection ended early"),
        }
    }

    async fn dial(&self, target: &Target) -> Result<Server, Failure> {
        match target {
            Target::Name(name, 53) if name == RESOLVER => Ok(Server::Resolver),
            Target::Address(address) => self.dial_address(*address).await,
            Target::Name(name, port) => self.dial_name(name, *port).await,
        }
    }

    async fn dial_address(&self, address: SocketAddr) -> Result<Server, Failure> {
        let port = address.port();
        match self.place(address.ip(), Some(port))? {
            Place::Address(address) => connect(SocketAddr::new(address, port)).await,
            Place::Loopback => first_of(Self::loopback(port)).await,
            Place::Machine(machine) => {
                let mut stream = machine.open(TCP).await?;
                let target = Target::Address(SocketAddr::from(([127, 0, 0, 1], port)));
                match socks::connect(&mut stream, &target).await {
                    Ok(()) => Ok(Server::Machine(stream)),
                    Err(error) => Err(Failure::Failed(
                        error.reply().unwrap_or(Reply::HostUnreachable),
                        error.to_string(),
                    )),
                }
            }
        }
    }

    /// A client of its own may leave the resolving to us; the rules are the same.
    async fn dial_name(&self, name: &str, port: u16) -> Result<Server, Failure> {
        if self.policy().is_none() {
            return Err(Denied::NoRule.into());
        }
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let bare = name.strip_suffix(DOMAIN);
        if bare == Some(HOST) {
            self.policy().check_host_loopback(port)?;
            return first_of(Self::loopback(port)).await;
        }
        if let Some(addresses) = self.options.names.addresses(bare.unwrap_or(&name)) {
            return self.dial_each(addresses, port).await;
        }
        if bare.is_some() {
            return Err(Failure::Failed(Reply::HostUnreachable, "no such name on the network".into()));
        }
        let named = self.policy().ports_of(&name).any(|ports| ports.contain(Some(port)));
        if !named && !self.policy().is_open() {
            return Err(Denied::NoRule.into());
        }
        let found = tokio::net::lookup_host((name.as_str(), port))
            .await
            .map_err(|error| Failure::Failed(Reply::HostUnreachable, error.to_string()))?;
        let mut last = Failure::Failed(Reply::HostUnreachable, "the name has no address".into());
        for address in found.take(MOST_ADDRESSES) {
            let dialled = match self.check_outward(address.ip(), Some(port), named) {
                Ok(()) => connect(address).await,
                Err(denied) => Err(denied.into()),
            };
            match dialled {
                Ok(server) => return Ok(server),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    async fn dial_each(&self, addresses: Vec<IpAddr>, port: u16) -> Result<Server, Failure> {
        let mut last = Failure::Failed(Reply::HostUnreachable, "the name has no address".into());
        for address in addresses.into_iter().take(MOST_ADDRESSES) {
            match self.dial_address(SocketAddr::new(address, port)).await {
                Ok(server) => return Ok(server),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }
}

async fn connect(address: SocketAddr) -> Result<Server, Failure> {
    let stream = TcpStream::connect(address).await?;
    // The guest's kernel has gathered small writes, or was told not to.
    let _ = stream.set_nodelay(true);
    // A peer that vanished would hold its connection for ever: there is no other time-out.
    let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
    Ok(Server::Tcp(stream))
}

async fn first_of(addresses: [SocketAddr; 2]) -> Result<Server, Failure> {
    let [first, second] = addresses;
    match connect(first).await {
        Ok(server) => Ok(server),
        // What the first says counts, unless somebody listens at the second.
        Err(failure) => connect(second).await.map_err(|_| failure),
    }
}

/// Ends with the stream. What it carries before that is kept, up to a limit.
async fn end_of(stream: &mut (impl AsyncRead + Unpin), early: &mut Vec<u8>) {
    while early.len() < EARLY {
        let mut piece = [0; 512];
        match stream.read(&mut piece).await {
            Ok(0) | Err(_) => return,
            Ok(read) => early.extend_from_slice(&piece[..read]),
        }
    }
    std::future::pending::<()>().await;
}

async fn carry<A, B>(guest: &mut A, early: &[u8], server: &mut B) -> io::Result<kiln_usernet::Carried>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    server.write_all(early).await?;
    let mut carried = splice(guest, server).await?;
    carried.there += early.len() as u64;
    Ok(carried)
}
