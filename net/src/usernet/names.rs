//! The names of the guest's own network, and how what they lead to is reached.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};

use ipnet::IpNet;
use kiln_usernet::Open;
use tokio::io::{AsyncRead, AsyncWrite};

/// Tells what the names of a network are.
///
/// Methods are called for every query and connection: they must be quick, and must not block for long.
pub trait Names: Send + Sync {
    /// The addresses of a name, in lower case and without `.kiln.internal`. `None` if the network has no such
    /// name.
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>>;

    /// The names of an address of the network, the first one first, in lower case. None if it is none of the network's.
    fn names(&self, address: IpAddr) -> Vec<String>;

    /// How an address of the network is reached. `None` if it is none of the network's. Whether it may be is the policy's
    /// business, which counts names of the network as names.
    fn route(&self, address: IpAddr) -> Option<Route>;

    /// The range in which an address is that belongs to another network of this host: closed unless a rule names it.
    fn elsewhere(&self, _address: IpAddr) -> Option<IpNet> {
        None
    }
}

/// How a neighbour is reached.
#[derive(Debug, Clone)]
pub enum Route {
    /// The host has a way to this address: a container on a bridge.
    Address(IpAddr),
    /// By streams of the neighbour's own link.
    Machine(Machine),
}

pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

pub(super) type BoxStream = Box<dyn Duplex>;
type Opening<'a> = Pin<Box<dyn Future<Output = io::Result<BoxStream>> + Send + 'a>>;

/// A machine to which streams can be opened.
#[derive(Clone)]
pub struct Machine(Arc<dyn OpenAny>);

trait OpenAny: Send + Sync {
    fn open_any(&self, service: u16) -> Opening<'_>;
}

impl<O: Open> OpenAny for O {
    fn open_any(&self, service: u16) -> Opening<'_> {
        Box::pin(async move { Ok(Box::new(self.open(service).await?) as BoxStream) })
    }
}

impl Machine {
    /// The machine at the other end of a link.
    pub fn new<O: Open>(opener: Arc<O>) -> Self {
        Self(opener)
    }

    pub(super) async fn open(&self, service: u16) -> io::Result<BoxStream> {
        self.0.open_any(service).await
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Machine")
    }
}

/// Names in a table that can be changed while it is used.
#[derive(Debug, Default)]
pub struct NameTable(RwLock<Vec<Neighbour>>);

#[derive(Debug)]
struct Neighbour {
    address: IpAddr,
    names: Vec<String>,
    route: Route,
}

impl NameTable {
    /// Adds a neighbour, or replaces the one that has this address. The first of its names is what its address is
    /// called.
    pub fn insert<S: AsRef<str>>(&self, address: IpAddr, names: &[S], route: Route) {
        let names = names.iter().map(|name| name.as_ref().to_ascii_lowercase()).collect();
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        table.retain(|neighbour| neighbour.address != address);
        table.push(Neighbour { address, names, route });
    }

    /// Takes a neighbour out.
    pub fn remove(&self, address: IpAddr) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|neighbour| neighbour.address != address);
    }

    fn find<T>(&self, address: IpAddr, get: impl FnOnce(&Neighbour) -> T) -> Option<T> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        table.iter().find(|neighbour| neighbour.address == address).map(get)
    }
}

impl Names for NameTable {
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let named = table.iter().filter(|neighbour| neighbour.names.iter().any(|own| own == name));
        let addresses: Vec<_> = named.map(|neighbour| neighbour.address).collect();
        (!addresses.is_empty()).then_some(addresses)
    }

    fn names(&self, address: IpAddr) -> Vec<String> {
        self.find(address, |neighbour| neighbour.names.clone()).unwrap_or_default()
    }

    fn route(&self, address: IpAddr) -> Option<Route> {
        self.find(address, |neighbour| neighbour.route.clone())
    }
}
