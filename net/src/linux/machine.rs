//! Connecting machines to networks that containers are on too.
//!
//! On a bridge network a machine is connected as a container is: by an interface in a network namespace. Nothing runs in that
//! namespace but two sockets, to which everything is handed that comes to the machine's address (`doors` module); it goes with
//! the monitor. It may have a device of its own instead (`tap` module). On a network without a bridge there are only machines,
//! whose monitors find each other through the network's file.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use kiln_contract::{BackendError, Home, InstanceId, NetworkRequest, NetworkSpec};
use kiln_usernet::Open;
use tokio::sync::watch;

use super::doors::Reception;
use super::namespace::Namespace;
use super::{bridge, can_bridge, tap};
use crate::networks::{Locked, Networks};
use crate::usernet::{Machine, Neighbours};
use crate::{Lease, NetError, Network, NetworkDevice};

/// A machine's place on a network that a user made, or on the built-in bridge.
///
/// Address and rules stay when it is dropped: [`leave`](Self::leave) takes them away, in this process or any other.
#[derive(Debug)]
pub struct MachineNetwork {
    home: Home,
    network: Network,
    address: Ipv4Addr,
    reception: Option<Reception>,
    device: Option<NetworkDevice>,
}

impl MachineNetwork {
    /// Gives a machine an address on the network `request.network.mode`, which its neighbours know from here on. Nothing that
    /// comes is served yet.
    ///
    /// # Errors
    /// There is no such network; the address cannot be had; a bridge cannot be made by this user.
    pub fn join(home: &Home, request: &NetworkRequest) -> Result<Self, BackendError> {
        // An earlier run of the same machine may have been killed.
        bridge::detach(home, &request.id)?;
        let networks = Networks::open(home);
        let joined = Self::join_as(home, &networks, request);
        if joined.is_err()
            && let Err(left) = bridge::detach(home, &request.id)
        {
            tracing::warn!(%left, "taking back a connection that failed");
        }
        Ok(joined?)
    }

    fn join_as(home: &Home, networks: &Networks, request: &NetworkRequest) -> Result<Self, NetError> {
        let name = &request.network.mode;
        if let Some(name) = crate::tap_network(name) {
            if !can_bridge() {
                return Err(NetError::TapNotPrivileged);
            }
            let (network, device) = tap::attach(networks, request, name)?;
            let address = device.address;
            return Ok(Self { home: home.clone(), network, address, reception: None, device: Some(device) });
        }
        let network = {
            let locked = networks.lock()?;
            let mut network = bridge::found_or_made(&locked, name)?;
            bridge::no_ports_within(&network, !request.ports.is_empty())?;
            if !network.is_bridge() {
                let address = lease(&locked, &mut network, request)?;
                return Ok(Self { home: home.clone(), network, address, reception: None, device: None });
            }
            network
        };
        if !can_bridge() {
            return Err(NetError::NotPrivileged { network: network.name });
        }
        let namespace = Namespace::fresh()?;
        // Its monitor serves its ports, and its guest's gateway the names: no rule and no socket is needed for either.
        let (network, address, _) = bridge::attach_bound(networks, request, name, &namespace, &[], true)?;
        let reception = Reception::open(namespace)?;
        let reception = Some(reception);
        Ok(Self { home: home.clone(), network, address: address.addr(), reception, device: None })
    }

    /// Takes away all that joining made, whoever did it. Taking away what is not there is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn leave(home: &Home, id: &InstanceId) -> Result<(), BackendError> {
        Ok(bridge::detach(home, id)?)
    }

    /// Its address.
    pub fn address(&self) -> IpAddr {
        self.address.into()
    }

    /// What its device is connected to, if it has one of its own (`tap`).
    pub fn device(&self) -> Option<&NetworkDevice> {
        self.device.as_ref()
    }

    /// Refuses what [`join`](Self::join) would refuse of a machine with a device of its own, whatever else is on the network.
    ///
    /// # Errors
    /// This user may not make devices; the policy has rules of names.
    pub fn check_device(network: &NetworkSpec) -> Result<(), BackendError> {
        if !can_bridge() {
            return Err(NetError::TapNotPrivileged.into());
        }
        Ok(tap::rules(network).map(drop)?)
    }

    /// Whether nothing outside of the network can be reached from it.
    pub fn is_internal(&self) -> bool {
        self.network.internal
    }

    /// Its neighbours. `machine` gives what opens streams to another machine.
    pub fn neighbours(&self, machine: impl Fn(&InstanceId) -> Machine + Send + Sync + 'static) -> Neighbours {
        Neighbours::of(&self.home, Some(self.network.name.clone()), machine)
    }

    /// Serves what comes from the network from now on, on the runtime of the caller. `sessions` holds what opens streams to the
    /// guest.
    ///
    /// # Errors
    /// If a socket cannot be waited for.
    pub fn serve<O: Open>(&mut self, sessions: &watch::Receiver<Arc<O>>) -> Result<(), BackendError> {
        let Some(reception) = &mut self.reception else { return Ok(()) };
        let serving = reception.serve(sessions);
        Ok(serving.map_err(NetError::doing("serving what comes from the network"))?)
    }
}

/// Gives it an address, and writes that down.
fn lease(locked: &Locked, network: &mut Network, request: &NetworkRequest) -> Result<Ipv4Addr, NetError> {
    let address = crate::pool::address(network, &request.id, request.network.address)?;
    let names = bridge::names(request);
    let lease = Lease { names, machine: true, ..Lease::at(address) };
    network.leases.insert(request.id.clone(), lease);
    locked.write(network)?;
    Ok(address)
}
