//! Bridge networks.
//!
//! Connecting a container:
//! 1. its published ports are bound, so that a conflict changes nothing;
//! 2. under the home's lock, it gets an address and its lease is written: from here on whoever finds the
//!    instance dead can take away everything, knowing only the file;
//! 3. the bridge is made if this is its first container, and the rules are added;
//! 4. a pair of interfaces is made, one end a port of the bridge, the other born inside the container's namespace
//!    as `eth0`, with a hardware address made from the address, so that a reused address fools no neighbour's cache;
//! 5. inside, `lo` and `eth0` are configured in one request.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};

use ipnet::{IpNet, Ipv4Net};
use kiln_contract::{Attachment, Home, InstanceId, NetworkRequest, PublishSpec};

use super::namespace::Namespace;
use super::netlink::{self, Netlink};
use super::proxy::Proxy;
use super::responder::{Responder, Upstreams, Zone};
use super::{name_files, nft};
use crate::network::DEFAULT_NETWORK;
use crate::networks::{Locked, Networks, holder};
use crate::ports::{self, BoundPort};
use crate::{Lease, NetError, Network, NetworkOptions};

/// Where the name responder listens inside a container.
pub(super) const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// What the supervisor serves for a connected container. Dropping it ends that.
#[derive(Debug, Default)]
pub(super) struct Served {
    proxies: Vec<Proxy>,
    responder: Option<Responder>,
}

/// What is made inside the container's namespace.
///
/// Nothing if the container serves names itself: whoever listens on port 53 of all addresses cannot share it.
type Inside = Option<(UdpSocket, TcpListener)>;

pub(super) fn attach(
    home: &Home,
    request: &NetworkRequest,
    name: &str,
) -> Result<(Attachment, Served), NetError> {
    let path = request.namespace.as_deref().ok_or_else(|| {
        NetError::Invalid(format!(
            "the network `{name}` needs a network namespace to connect, and none was given"
        ))
    })?;
    let namespace = Namespace::open(path)?;
    let bound = ports::bind(&request.ports)?;
    let networks = Networks::open(home);
    match attach_bound(&networks, request, name, &namespace, &bound, false) {
        Ok((network, address, inside)) => {
            let asked = &request.network.dns;
            let mut served = Served::default();
            let servers = match inside {
                Some((udp, tcp)) => {
                    let upstreams = match network.internal {
                        true => Upstreams::Nobody,
                        false if asked.is_empty() => Upstreams::OfHost,
                        false => Upstreams::These(asked.clone()),
                    };
                    let zone = Zone::new(networks.file(name));
                    let responder = Responder::start(udp, tcp, zone, upstreams)
                        .map_err(NetError::doing("starting the name responder"))?;
                    served.responder = Some(responder);
                    vec![RESOLVER.into()]
                }
                None if asked.is_empty() => name_files::reachable_name_servers(),
                None => asked.clone(),
            };
            let attachment = Attachment {
                addresses: vec![address.addr().into()],
                hosts: Some(name_files::hosts(request, Some(address.addr().into()), network.gateway)?),
                resolv_conf: Some(name_files::resolv_conf(&request.network, &servers)),
                ports: bound.iter().map(|port| port.spec.clone()).collect(),
            };
            served.publish(bound, address.addr())?;
            Ok((attachment, served))
        }
        Err(error) => {
            if let Err(left) = detach(home, &request.id) {
                tracing::warn!(%left, "taking back a connection that failed");
            }
            Err(error)
        }
    }
}

/// Everything but what the supervisor serves.
pub(super) fn attach_bound(
    networks: &Networks,
    request: &NetworkRequest,
    name: &str,
    namespace: &Namespace,
    bound: &[BoundPort],
    machine: bool,
) -> Result<(Network, Ipv4Net, Inside), NetError> {
    let system = |what: &str| NetError::doing(format!("{what} for {}", request.name));
    let mut netlink = Netlink::open().map_err(system("opening a netlink socket"))?;
    let pair = pair_name(&request.id);
    // Left by an earlier run of the same instance.
    netlink.delete_link(&pair).map_err(system("removing an old interface"))?;

    let locked = networks.lock()?;
    let mut network = found_or_made(&locked, name)?;
    if !network.is_bridge() {
        return Err(NetError::MachinesOnly { network: name.into() });
    }
    no_ports_within(&network, !bound.is_empty())?;
    let bridge = netlink.link(Some(&network.interface), 0).map_err(system("looking for the bridge"))?;
    if bridge.is_none() {
        locked.avoid_collision(&mut network)?;
    }
    let (subnet, gateway) = v4(&network)?;
    let address = crate::pool::address(&network, &request.id, request.network.address)?;
    let ports = bound.iter().map(|port| port.spec.clone()).collect();
    let lease = Lease { names: names(request), ports, machine, ..Lease::at(address) };
    if !bound.is_empty() {
        take_ports_from_the_dead(&locked, &mut network, &request.id, bound)?;
    }
    network.leases.insert(request.id.clone(), lease);
    locked.write(&network)?;

    let rules = if !nft::exists(&nft::table(locked.home())) {
        nft::replace(&locked, &locked.all()?)?
    } else if network.leases.len() == 1 || !bound.is_empty() {
        nft::add(&locked, &network)?
    } else {
        nft::Transaction::NONE
    };
    let (bridge, mtu) = match bridge {
        Some(found) => found,
        None => make_bridge(&mut netlink, &network, Ipv4Net::new_assert(gateway, subnet.prefix_len()))?,
    };
    // While `nft` works, the rest is done; the lock is held only if it is at work.
    let locked = rules.is_at_work().then_some(locked);
    let mut requests = vec![netlink::new_pair(&pair, bridge, Some(mtu), "eth0", mac(address), namespace)];
    if !bound.is_empty() {
        // A container that calls its own published port is sent back to where it came from.
        requests.push(netlink::hairpin(&pair));
    }
    netlink.send(requests).map_err(system("making its interface"))?;
    let address = Ipv4Net::new_assert(address, subnet.prefix_len());
    let serves_names = bound.iter().any(|port| port.spec.container_port == 53);
    let inside =
        namespace.enter(|| configure(address, (!network.internal).then_some(gateway), !serves_names))?;
    if let Err(error) = rules.finish() {
        // Something else in the table stood against the addition: make all of it anew.
        let Some(locked) = &locked else { return Err(error) };
        tracing::debug!(%error, "rules could not be added");
        nft::replace(locked, &locked.all()?)?.finish()?;
    }
    Ok((network, address, inside))
}

/// The network with this name. The built-in one is made at its first use.
pub(super) fn found_or_made(locked: &Locked, name: &str) -> Result<Network, NetError> {
    match locked.read(name)? {
        Some(network) => Ok(network),
        None if name == DEFAULT_NETWORK => locked.make(name, &NetworkOptions::default()),
        None => Err(NetError::NoSuchNetwork { name: name.into() }),
    }
}

/// Its subnet and its gateway.
pub(super) fn v4(network: &Network) -> Result<(Ipv4Net, Ipv4Addr), NetError> {
    match (network.subnet, network.gateway) {
        (Some(IpNet::V4(subnet)), Some(IpAddr::V4(gateway))) => Ok((subnet, gateway)),
        _ => Err(NetError::Invalid(format!("the network `{}` has no IPv4 subnet", network.name))),
    }
}

/// Nothing is published from a network without a way out.
pub(super) fn no_ports_within(network: &Network, asked: bool) -> Result<(), NetError> {
    if network.internal && asked {
        let mode = format!("{}` (internal)", network.name);
        return Err(NetError::NotInMode { what: "publishing ports".into(), mode });
    }
    Ok(())
}

/// Inside the container's namespace.
fn configure(address: Ipv4Net, gateway: Option<Ipv4Addr>, names: bool) -> Result<Inside, NetError> {
    let system = |what: &str| NetError::doing(format!("{what} in the container's network namespace"));
    let mut netlink = Netlink::open().map_err(system("opening a netlink socket"))?;
    let eth0 = netlink
        .index("eth0")
        .and_then(|index| index.ok_or_else(|| std::io::ErrorKind::NotFound.into()))
        .map_err(system("looking for eth0"))?;
    let mut requests = vec![netlink::up(1), netlink::new_address(eth0, address), netlink::up(eth0)];
    requests.extend(gateway.map(netlink::default_via));
    netlink.send(requests).map_err(system("configuring eth0"))?;
    if !names {
        return Ok(None);
    }
    let udp = UdpSocket::bind((RESOLVER, 53)).map_err(system("opening the name responder's socket"))?;
    let tcp = TcpListener::bind((RESOLVER, 53)).map_err(system("opening the name responder's socket"))?;
    Ok(Some((udp, tcp)))
}

/// Brings up `lo`.
pub(super) fn loopback(namespace: &Namespace) -> Result<(), NetError> {
    namespace.enter(|| {
        Netlink::open()
            .and_then(|mut netlink| netlink.send(vec![netlink::up(1)]))
            .map_err(NetError::doing("bringing up lo in the container's network namespace"))
    })
}

pub(super) fn make_bridge(
    netlink: &mut Netlink,
    network: &Network,
    gateway: Ipv4Net,
) -> Result<(u32, u32), NetError> {
    let system = |what: &str| NetError::doing(format!("{what} `{}`", network.interface));
    // Packets must fit the way out: tunnels and clouds often have less than 1500.
    let outward = netlink
        .default_route()
        .and_then(|route| route.map_or(Ok(None), |(_, index)| netlink.link(None, index)))
        .map_err(system("looking for the way out for the bridge"))?;
    let mtu = outward.map(|(_, mtu)| mtu.clamp(1280, 65_535));
    netlink
        .send(vec![netlink::new_bridge(&network.interface, mac(gateway.addr()), mtu)])
        .map_err(system("making the bridge"))?;
    let (index, mtu) = netlink
        .link(Some(&network.interface), 0)
        .and_then(|link| link.ok_or_else(|| std::io::ErrorKind::NotFound.into()))
        .map_err(system("looking for the bridge"))?;
    netlink
        .send(vec![netlink::new_address(index, gateway)])
        .map_err(system("giving an address to the bridge"))?;
    if !network.internal {
        forward_packets()?;
    }
    Ok((index, mtu))
}

fn forward_packets() -> Result<(), NetError> {
    const SWITCH: &str = "/proc/sys/net/ipv4/ip_forward";
    let doing = || NetError::doing(format!("turning on {SWITCH}"));
    if fs::read_to_string(SWITCH).map_err(doing())?.trim() == "0" {
        fs::write(SWITCH, "1").map_err(doing())?;
        tracing::info!("turned on {SWITCH}: containers reach others through this host");
    }
    Ok(())
}

/// Who binds a port owns it: another lease that still claims it belongs to an instance whose supervisor is dead.
fn take_ports_from_the_dead(
    locked: &Locked,
    network: &mut Network,
    id: &InstanceId,
    bound: &[BoundPort],
) -> Result<(), NetError> {
    let ours = |port: &PublishSpec| {
        bound.iter().any(|bound| {
            let spec = &bound.spec;
            (spec.protocol, spec.host_port, spec.host_address)
                == (port.protocol, port.host_port, port.host_address)
        })
    };
    let mut cleaned = false;
    let mut clean = |network: &mut Network| {
        let mut changed = false;
        for (_, lease) in network.leases.iter_mut().filter(|(other, _)| *other != id) {
            let before = lease.ports.len();
            lease.ports.retain(|port| !ours(port));
            changed |= lease.ports.len() != before;
        }
        cleaned |= changed;
        changed
    };
    clean(network);
    for mut other in locked.all()?.into_iter().filter(|other| other.name != network.name) {
        if clean(&mut other) {
            locked.write(&other)?;
        }
    }
    if cleaned {
        locked.write(network)?;
        nft::replace(locked, &locked.all()?)?.finish()?;
    }
    Ok(())
}

/// Takes away all that connecting `id` made, whoever did it.
pub(super) fn detach(home: &Home, id: &InstanceId) -> Result<(), NetError> {
    let networks = Networks::open(home);
    let mut rules = nft::Transaction::NONE;
    let mut locked = None;
    let mut emptied = Vec::new();
    if holder(&networks.peek()?, id).is_some() {
        let held = networks.lock()?;
        let mut all = held.all()?;
        let mut rules_name_it = false;
        for network in &mut all {
            if let Some(lease) = network.leases.remove(id) {
                held.write(network)?;
                rules_name_it |= !lease.ports.is_empty() || lease.tap.is_some();
                if network.is_bridge() && network.leases.is_empty() {
                    emptied.push(network.interface.clone());
                }
            }
        }
        // Where this user cannot bridge there is nothing but the lease.
        if (rules_name_it || !emptied.is_empty()) && super::can_bridge() {
            rules = nft::replace(&held, &all)?;
        } else {
            emptied.clear();
        }
        locked = Some(held);
    }
    // The kernel waits for all processors to forget an interface; it can wait for several at once.
    std::thread::scope(|scope| {
        let waits: Vec<_> =
            emptied.iter().map(|bridge| scope.spawn(move || delete_link("bridge", bridge))).collect();
        delete_link("interface", &pair_name(id))?;
        waits
            .into_iter()
            .try_for_each(|wait| wait.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    rules.finish()?;
    drop(locked);
    Ok(())
}

fn delete_link(what: &str, name: &str) -> Result<(), NetError> {
    Netlink::open()
        .and_then(|mut netlink| netlink.delete_link(name))
        .map_err(NetError::doing(format!("removing the {what} `{name}`")))
}

/// Takes away what is left of a network without containers.
pub(crate) fn take_down(locked: &Locked, network: &Network) -> Result<(), NetError> {
    if !network.is_bridge() {
        return Ok(());
    }
    let mut netlink = Netlink::open().map_err(NetError::doing("opening a netlink socket"))?;
    if netlink.index(&network.interface).ok().flatten().is_some() {
        netlink
            .delete_link(&network.interface)
            .map_err(NetError::doing(format!("removing the bridge `{}`", network.interface)))?;
        nft::replace(locked, &locked.all()?)?.finish()?;
    }
    Ok(())
}

/// Publishes one more port of a connected container.
pub(super) fn publish(
    home: &Home,
    served: &mut Served,
    id: &InstanceId,
    port: &PublishSpec,
) -> Result<PublishSpec, NetError> {
    let bound = ports::bind(std::slice::from_ref(port))?;
    let networks = Networks::open(home);
    let locked = networks.lock()?;
    let mut network = locked
        .all()?
        .into_iter()
        .find(|network| network.leases.contains_key(id))
        .ok_or_else(|| NetError::Invalid(format!("the container {} is not connected", id.short())))?;
    no_ports_within(&network, true)?;
    take_ports_from_the_dead(&locked, &mut network, id, &bound)?;
    let mut address = None;
    let chosen = bound[0].spec.clone();
    if let Some(lease) = network.leases.get_mut(id) {
        lease.ports.push(chosen.clone());
        address = Some(lease.address);
    }
    locked.write(&network)?;
    nft::add(&locked, &network)?.finish()?;
    Netlink::open()
        .and_then(|mut netlink| netlink.send(vec![netlink::hairpin(&pair_name(id))]))
        .map_err(NetError::doing("letting the container call itself"))?;
    if let Some(IpAddr::V4(address)) = address {
        served.publish(bound, address)?;
    }
    Ok(chosen)
}

impl Served {
    fn publish(&mut self, bound: Vec<BoundPort>, container: Ipv4Addr) -> Result<(), NetError> {
        if !bound.is_empty() {
            let proxy = Proxy::start(bound, container.into())
                .map_err(NetError::doing("starting the proxy of published ports"))?;
            self.proxies.push(proxy);
        }
        Ok(())
    }
}

/// The names by which neighbours find it, its own first.
pub(super) fn names(request: &NetworkRequest) -> Vec<String> {
    let mut names = vec![request.name.clone()];
    let others = request.network.aliases.iter().map(String::as_str);
    for name in others.chain([request.hostname.as_str(), request.id.short()]) {
        if !name.is_empty() && !names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            names.push(name.to_owned());
        }
    }
    names
}

/// The host's end of a container's pair: 15 bytes, told from all others by 48 random bits.
fn pair_name(id: &InstanceId) -> String {
    format!("klv{}", id.short())
}

/// The device of a machine's own. An instance has either.
pub(super) fn tap_name(id: &InstanceId) -> String {
    pair_name(id)
}

/// A locally administered hardware address that holds the IPv4 address.
pub(super) fn mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x4b, a, b, c, d]
}
