//! What one guest's traffic meets.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::counters::{Counters, Tally};
use super::forward::Upstreams;
use super::grants::Grants;
use super::names::{Machine, NameTable, Names, Route};
use crate::Policy;
use crate::policy::{Denied, canonical};

/// The name under which a guest finds its host.
pub(super) const HOST: &str = "host";

/// What one guest may take of the host at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatewayLimits {
    /// TCP connections, each of which takes a descriptor.
    pub connections: usize,
    /// Sources of datagrams, each of which takes up to four.
    pub flows: usize,
    /// Name queries that wait for an answer, each of which takes one.
    pub queries: usize,
}

impl Default for GatewayLimits {
    /// As many as the process has descriptors for, with room for others: of 1024, 640 connections, 64 flows, 64 queries.
    fn default() -> Self {
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let most = usize::try_from(most.unwrap_or(u64::MAX)).unwrap_or(usize::MAX).min(1 << 16);
        Self { connections: most / 8 * 5, flows: most / 16, queries: (most / 16).min(256) }
    }
}

/// How a [`Gateway`] is to be.
#[derive(Clone)]
pub struct GatewayOptions {
    /// What the log calls the guest.
    pub guest: String,
    /// What the guest may reach.
    pub policy: Policy,
    /// The names of its network.
    pub names: Arc<dyn Names>,
    /// Who is asked for other names.
    pub upstreams: Upstreams,
    /// The addresses that the guest knows as its gateway's.
    pub addresses: Vec<IpAddr>,
    /// Nothing but its neighbours can be reached, whatever the policy.
    pub internal: bool,
    /// What it may take of the host.
    pub limits: GatewayLimits,
}

impl Default for GatewayOptions {
    /// An open policy, no names, the host's name servers, and the addresses that guests have unless told otherwise
    /// (`192.0.0.1` and `fd6b:696c:6e00::1`).
    fn default() -> Self {
        Self {
            guest: String::new(),
            policy: Policy::open(),
            names: Arc::new(NameTable::default()),
            upstreams: Upstreams::Host,
            addresses: vec![
                IpAddr::from([192, 0, 0, 1]),
                IpAddr::from([0xfd6b, 0x696c, 0x6e00, 0, 0, 0, 0, 1]),
            ],
            internal: false,
            limits: GatewayLimits::default(),
        }
    }
}

impl fmt::Debug for GatewayOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayOptions")
            .field("guest", &self.guest)
            .field("policy", &self.policy)
            .field("upstreams", &self.upstreams)
            .field("addresses", &self.addresses)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// The host's side of one guest's network.
#[derive(Debug)]
pub struct Gateway {
    pub(super) options: GatewayOptions,
    pub(super) tally: Tally,
    grants: Mutex<Grants>,
    connections: Arc<Semaphore>,
    flows: Arc<Semaphore>,
    queries: Arc<Semaphore>,
}

/// Where something really goes.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// To an address that the host dials.
    Address(IpAddr),
    /// To the host's loopback.
    Loopback,
    /// To a neighbour.
    Machine(Machine),
}

impl Gateway {
    /// Nothing is opened by this.
    pub fn new(options: GatewayOptions) -> Self {
        let GatewayLimits { connections, flows, queries } = options.limits;
        let semaphore = |most: usize| Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        Self {
            tally: Tally::default(),
            grants: Mutex::default(),
            connections: semaphore(connections),
            flows: semaphore(flows),
            queries: semaphore(queries),
            options,
        }
    }

    /// What the guest did until now.
    pub fn counters(&self) -> Counters {
        self.tally.counters()
    }

    pub(super) fn policy(&self) -> &Policy {
        &self.options.policy
    }

    pub(super) fn grants(&self) -> MutexGuard<'_, Grants> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a connection or a datagram to `address` goes, if it may; with no port, an echo request.
    pub(super) fn place(&self, address: IpAddr, port: Option<u16>) -> Result<Place, Denied> {
        let address = canonical(address);
        if self.policy().is_none() {
            return Err(Denied::NoRule);
        }
        if self.options.addresses.contains(&address) {
            // Echo requests to the gateway never come here: it is beside the guest.
            return self.policy().check_host_loopback(port.unwrap_or(0)).map(|()| Place::Loopback);
        }
        if let Some(route) = self.options.names.route(address) {
            self.policy().check_neighbour(&self.options.names.names(address), address, port)?;
            return Ok(match route {
                Route::Address(address) => Place::Address(address),
                Route::Machine(machine) => Place::Machine(machine),
            });
        }
        let granted = self.grants().allow(address, port, Instant::now());
        self.check_outward(address, port, granted).map(|()| Place::Address(address))
    }

    /// Whether what is no neighbour may be reached.
    pub(super) fn check_outward(
        &self,
        address: IpAddr,
        port: Option<u16>,
        granted: bool,
    ) -> Result<(), Denied> {
        if self.options.internal {
            return Err(Denied::Closed("what is outside of an internal network"));
        }
        let elsewhere = self.options.names.elsewhere(canonical(address));
        self.policy().check_granted(address, port, granted, elsewhere)
    }

    pub(super) fn take_connection(&self) -> Option<OwnedSemaphorePermit> {
        self.take(&self.connections)
    }

    pub(super) fn take_flow(&self) -> Option<OwnedSemaphorePermit> {
        self.take(&self.flows)
    }

    pub(super) fn take_query(&self) -> Option<OwnedSemaphorePermit> {
        self.take(&self.queries)
    }

    fn take(&self, of: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(of).try_acquire_owned().ok();
        if permit.is_none() {
            Tally::add(&self.tally.over_limit, 1);
        }
        permit
    }

    pub(super) fn deny(
        &self,
        counter: &AtomicU64,
        what: &str,
        target: impl fmt::Display,
        reason: impl fmt::Display,
    ) {
        self.tally.deny(counter, &self.options.guest, what, target, reason);
    }

    /// The host's loopback at a port, the usual family first.
    pub(super) fn loopback(port: u16) -> [SocketAddr; 2] {
        [SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port))]
    }
}
