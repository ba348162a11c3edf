//! A device of a machine's own: a TAP device, and a way to it through the host.
//!
//! The device is no port of the network's bridge, because packets between ports pass no rule that knows connections on most
//! kernels, and a machine's policy holds towards its neighbours too. Instead the host is its router: the machine has one
//! address of the network's, reached over its device alone; to the containers on the bridge the host answers for it (proxy
//! ARP). All that it sends passes the home's table.
//!
//! The device is gone when nobody has it open: when the machine ends, however it ends, with the route to it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use kiln_contract::{BackendError, NetworkRequest, NetworkSpec};
use kiln_usernet::guest::become_tap;

use super::bridge;
use super::namespace::Namespace;
use super::netlink::{self, Netlink};
use super::nft;
use crate::networks::Networks;
use crate::{Lease, NetError, Network, NetworkDevice, Policy};

/// A device that leads nowhere, in a network namespace that goes with it: for who only has to have one.
///
/// # Errors
/// This user may not make network namespaces; the kernel has no TAP devices.
pub fn unconnected() -> Result<Arc<OwnedFd>, BackendError> {
    let device = Namespace::fresh().and_then(|namespace| namespace.enter(|| open("tap")));
    Ok(Arc::new(device?))
}

/// The rules of what a machine may reach, if packet rules can hold them.
pub(super) fn rules(network: &NetworkSpec) -> Result<Vec<String>, NetError> {
    let policy = Policy::parse(&network.allow).map_err(|error| NetError::Invalid(error.to_string()))?;
    match policy.needs_names() {
        Some(rule) => Err(NetError::NeedsAddresses { rule: rule.to_string() }),
        None => Ok(policy.rules().iter().map(ToString::to_string).collect()),
    }
}

/// Gives a machine a device and an address on the network `name`.
pub(super) fn attach(
    networks: &Networks,
    request: &NetworkRequest,
    name: &str,
) -> Result<(Network, NetworkDevice), NetError> {
    let system = |what: &str| NetError::doing(format!("{what} for {}", request.name));
    let rules = rules(&request.network)?;
    let mut netlink = Netlink::open().map_err(system("opening a netlink socket"))?;
    let interface = bridge::tap_name(&request.id);
    let locked = networks.lock()?;
    let mut network = bridge::found_or_made(&locked, name)?;
    bridge::no_ports_within(&network, !request.ports.is_empty())?;
    if !network.is_bridge() {
        let what = "a device of a machine's own".into();
        return Err(NetError::NotInMode { what, mode: network.name });
    }
    let bridge = netlink.link(Some(&network.interface), 0).map_err(system("looking for the bridge"))?;
    if bridge.is_none() {
        locked.avoid_collision(&mut network)?;
    }
    let (subnet, gateway) = bridge::v4(&network)?;
    let address = crate::pool::address(&network, &request.id, request.network.address)?;
    let names = bridge::names(request);
    let lease = Lease { names, machine: true, tap: Some(rules), ..Lease::at(address) };
    network.leases.insert(request.id.clone(), lease);
    locked.write(&network)?;
    // In force before there is anything that could send.
    nft::replace(&locked, &locked.all()?)?.finish()?;
    let mtu = match bridge {
        Some((_, mtu)) => mtu,
        None => {
            let gateway = ipnet::Ipv4Net::new_assert(gateway, subnet.prefix_len());
            bridge::make_bridge(&mut netlink, &network, gateway)?.1
        }
    };
    // The network's containers ask the bridge for the machine.
    set("conf", &network.interface, "forwarding", "1")?;
    set("neigh", &network.interface, "proxy_delay", "0")?;
    set("conf", &network.interface, "proxy_arp", "1")?;
    let host = open(&interface)?;
    set("conf", &interface, "forwarding", "1")?;
    let index = netlink
        .index(&interface)
        .and_then(|index| index.ok_or_else(|| io::ErrorKind::NotFound.into()))
        .map_err(system("looking for its device"))?;
    netlink
        .send(vec![netlink::mtu(index, mtu), netlink::up(index), netlink::way_to(address, index, gateway)])
        .map_err(system("making the way to its device"))?;
    let device = NetworkDevice { host: Arc::new(host), mac: bridge::mac(address), address, gateway, mtu };
    Ok((network, device))
}

/// Sets a parameter of one interface.
fn set(table: &str, interface: &str, name: &str, value: &str) -> Result<(), NetError> {
    let path = Path::new("/proc/sys/net/ipv4").join(table).join(interface).join(name);
    std::fs::write(&path, value).map_err(NetError::doing(format!("setting {}", path.display())))
}

/// Makes the TAP device `name` in the network namespace of the calling thread. It goes when it is closed.
fn open(name: &str) -> Result<OwnedFd, NetError> {
    const DEVICE: &str = "/dev/net/tun";
    let file = File::options().read(true).write(true).open(DEVICE);
    let file = file.map_err(NetError::doing(format!("opening {DEVICE}")))?;
    become_tap(&file, name).map_err(NetError::doing(format!("making the device {name}")))?;
    Ok(file.into())
}
