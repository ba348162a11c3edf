//! The names of a network as its file tells them: what machines and containers on it call each other.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use kiln_contract::{Home, InstanceId};

use super::names::{Machine, Names, Route};
use crate::Networks;

/// A change so young may be followed by another with the same time: file systems count in ticks.
const SETTLED: Duration = Duration::from_millis(100);

type ToMachine = dyn Fn(&InstanceId) -> Machine + Send + Sync;

/// The neighbours of a machine, read anew whenever a network of the home has changed.
#[derive(Clone)]
pub struct Neighbours {
    home: Home,
    own: Option<String>,
    machine: Arc<ToMachine>,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    seen: Option<(u64, i64, i64)>,
    members: HashMap<IpAddr, Member>,
    /// Of the other networks.
    subnets: Vec<IpNet>,
}

#[derive(Debug)]
struct Member {
    id: InstanceId,
    names: Vec<String>,
    is_machine: bool,
}

impl fmt::Debug for Neighbours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Neighbours").field("home", &self.home).field("own", &self.own).finish_non_exhaustive()
    }
}

impl Neighbours {
    /// Those on the network `own` of `home`; without one there are none, and all networks are others. `machine` gives what
    /// opens streams to a machine.
    pub fn of(
        home: &Home,
        own: Option<String>,
        machine: impl Fn(&InstanceId) -> Machine + Send + Sync + 'static,
    ) -> Self {
        Self { home: home.clone(), own, machine: Arc::new(machine), known: Arc::default() }
    }

    fn now(&self) -> MutexGuard<'_, Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let metadata = fs::metadata(self.home.networks()).ok();
        // Every change of a network renames a file in there.
        let seen = metadata.as_ref().map(|m| (m.ino(), m.mtime(), m.mtime_nsec()));
        if seen.is_some() && seen == known.seen {
            return known;
        }
        *known = Known::default();
        let Ok(networks) = Networks::open(&self.home).peek() else {
            // Nothing is a neighbour until it can be read again.
            return known;
        };
        for network in networks {
            if self.own.as_deref() != Some(&network.name) {
                known.subnets.extend(network.subnet);
                continue;
            }
            for (id, lease) in network.leases {
                let names = lease.names.iter().map(|name| name.to_ascii_lowercase()).collect();
                known.members.insert(lease.address, Member { id, names, is_machine: lease.machine });
            }
        }
        let young = metadata
            .and_then(|metadata| metadata.modified().ok())
            .is_none_or(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < SETTLED));
        known.seen = seen.filter(|_| !young);
        known
    }
}

impl Names for Neighbours {
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        let known = self.now();
        let named = known.members.iter().filter(|(_, member)| member.names.iter().any(|own| own == name));
        let mut addresses: Vec<IpAddr> = named.map(|(address, _)| *address).collect();
        addresses.sort();
        (!addresses.is_empty()).then_some(addresses)
    }

    fn names(&self, address: IpAddr) -> Vec<String> {
        self.now().members.get(&address).map(|member| member.names.clone()).unwrap_or_default()
    }

    fn route(&self, address: IpAddr) -> Option<Route> {
        let known = self.now();
        let member = known.members.get(&address)?;
        Some(match member.is_machine {
            true => Route::Machine((self.machine)(&member.id)),
            false => Route::Address(address),
        })
    }

    fn elsewhere(&self, address: IpAddr) -> Option<IpNet> {
        self.now().subnets.iter().find(|subnet| subnet.contains(&address)).copied()
    }
}
