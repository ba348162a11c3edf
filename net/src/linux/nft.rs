//! Packet rules: one table for each home, `inet kiln_<hash>`, and nothing outside of it.
//!
//! What the table must be follows from the networks' files alone, so it is written as a whole, in one
//! transaction, whenever something must go; what is only added (a network, ports) is added to its sets and maps,
//! which the kernel does fifty times faster. A rule never names a container: sets name bridges and subnets,
//! maps name ports, and their elements carry the container's id as a comment. Only machines with a device of their own have
//! chains of their own (`walls` module).
//!
//! Other tables still have their say: a packet that this table accepts can be dropped by another one, such as
//! Docker's `FORWARD` chain with policy `drop`, because a verdict of `accept` ends one base chain only.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ipnet::IpNet;
use kiln_contract::{Digest, InstanceId, Protocol};
use rustix::net::{
    AddressFamily as Family, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

use super::bridge::tap_name;
use super::{program, walls};
use crate::networks::Locked;
use crate::{NetError, Network};

/// The name of the home's table.
pub(super) fn table(home: &Path) -> String {
    format!("kiln_{}", &Digest::of(home.as_os_str().as_encoded_bytes()).hex()[..8])
}

/// What the networks with containers make the table hold.
#[derive(Debug, Default)]
struct Elements {
    bridges: Vec<String>,
    internal: Vec<String>,
    subnets: Vec<String>,
    all_subnets: Vec<String>,
    ports_any: BTreeMap<String, String>,
    ports_at: BTreeMap<String, String>,
}

impl Elements {
    fn of(networks: &[Network]) -> Self {
        let mut elements = Self::default();
        for network in networks.iter().filter(|network| network.is_bridge() && !network.leases.is_empty()) {
            let Some(IpNet::V4(subnet)) = network.subnet else { continue };
            let interface = format!("\"{}\"", network.interface);
            if network.internal {
                elements.internal.push(interface.clone());
            } else {
                elements.subnets.push(subnet.to_string());
            }
            elements.all_subnets.push(subnet.to_string());
            elements.bridges.push(interface);
            for (id, lease) in &network.leases {
                if lease.tap.is_some() {
                    // Behind a device of its own it is as if on a bridge of its own.
                    let device = format!("\"{}\"", tap_name(id));
                    elements.internal.extend(network.internal.then(|| device.clone()));
                    elements.bridges.push(device);
                }
                elements.add_ports(id, lease);
            }
        }
        elements
    }

    fn add_ports(&mut self, id: &InstanceId, lease: &crate::Lease) {
        let IpAddr::V4(container) = lease.address else { return };
        for port in &lease.ports {
            let protocol = match port.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            let to = format!("{container} . {}", port.container_port);
            let key = |key: String| format!("{key} comment \"{id}\"");
            match port.host_address {
                None | Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) => {
                    self.ports_any.insert(key(format!("{protocol} . {}", port.host_port)), to);
                }
                // Packets to loopback addresses never leave the host: the proxy alone serves them. IPv6 ones
                // cannot be turned into IPv4 ones: the proxy does that too.
                Some(IpAddr::V4(address)) if !address.is_loopback() => {
                    self.ports_at.insert(key(format!("{address} . {protocol} . {}", port.host_port)), to);
                }
                Some(_) => {}
            }
        }
    }

    /// Each set or map that has elements: its name and its elements.
    fn lists(&self) -> Vec<(&'static str, String)> {
        let twice = |names: &[String]| {
            names.iter().map(|name| format!("{name} . {name}")).collect::<Vec<_>>().join(", ")
        };
        let map = |map: &BTreeMap<String, String>| {
            map.iter().map(|(key, value)| format!("{key} : {value}")).collect::<Vec<_>>().join(", ")
        };
        let lists = [
            ("bridges", self.bridges.join(", ")),
            ("internal", self.internal.join(", ")),
            ("same", twice(&self.bridges)),
            ("outward", self.subnets.join(", ")),
            ("hairpin", twice(&self.all_subnets)),
            ("ports", map(&self.ports_any)),
            ("ports_at", map(&self.ports_at)),
        ];
        lists.into_iter().filter(|(_, elements)| !elements.is_empty()).collect()
    }
}

/// The chains. Order matters: neighbours, answers, published ports, then walls, then the way out.
const CHAINS: &str = r#"
  set bridges { type ifname; }
  set internal { type ifname; }
  set same { type ifname . ifname; }
  set outward { type ipv4_addr; flags interval; }
  set hairpin { type ipv4_addr . ipv4_addr; flags interval; }
  map ports { type inet_proto . inet_service : ipv4_addr . inet_service; }
  map ports_at { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
  chain forward {
    type filter hook forward priority filter; policy accept;
    jump tapped
    iifname . oifname @same accept
    oifname @bridges ct state established,related accept
    iifname @bridges ct state established,related accept
    iifname @internal drop
    oifname @internal drop
    oifname @bridges ct status dnat accept
    oifname @bridges drop
    iifname @bridges accept
  }
  chain published {
    meta l4proto { tcp, udp } dnat ip to ip daddr . meta l4proto . th dport map @ports_at
    meta l4proto { tcp, udp } dnat ip to meta l4proto . th dport map @ports
  }
  chain prerouting {
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local jump published
  }
  chain output {
    type nat hook output priority -100; policy accept;
    ip daddr != 127.0.0.0/8 fib daddr type local jump published
  }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr @outward oifname != @bridges masquerade
    ct status dnat ip saddr . ip daddr @hairpin masquerade
  }
"#;

/// The script that makes the table be what the networks say. Where it is known not to exist it is not deleted first:
/// the kernel would wait some 15 ms for all processors to forget the empty one.
fn whole(home: &Path, networks: &[Network], exists: bool) -> String {
    let table = table(home);
    let mut script = String::new();
    if exists {
        let _ = writeln!(script, "table inet {table} {{}}\ndelete table inet {table}");
    }
    let elements = Elements::of(networks);
    if !elements.bridges.is_empty() {
        let _ = writeln!(script, "table inet {table} {{{CHAINS}{}}}", walls::chains(networks));
        script.push_str(&additions(&table, &elements));
    }
    script
}

fn additions(table: &str, elements: &Elements) -> String {
    elements.lists().into_iter().fold(String::new(), |mut script, (set, list)| {
        let _ = writeln!(script, "add element inet {table} {set} {{ {list} }}");
        script
    })
}

/// A transaction on its way. Finish it: rules are in force only then.
#[derive(Debug)]
#[must_use]
pub(super) struct Transaction(Option<Child>);

impl Transaction {
    /// Nothing to do.
    pub(super) const NONE: Self = Self(None);

    /// Whether rules are on their way.
    pub(super) fn is_at_work(&self) -> bool {
        self.0.is_some()
    }

    /// Waits, and gives what `nft` said if it failed.
    pub(super) fn finish(mut self) -> Result<(), NetError> {
        let Some(child) = self.0.take() else { return Ok(()) };
        let output = child.wait_with_output().map_err(NetError::doing("waiting for `nft`"))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
        Err(NetError::ProgramFailed {
            program: "nft",
            doing: "writing packet rules".into(),
            said: if said.is_empty() { output.status.to_string() } else { said },
        })
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.wait();
        }
    }
}

/// Makes the table what the networks say, or removes it if no network has a container.
pub(super) fn replace(locked: &Locked, networks: &[Network]) -> Result<Transaction, NetError> {
    let exists = exists(&table(locked.home()));
    if !exists && networks.iter().all(|network| network.leases.is_empty()) {
        return Ok(Transaction::NONE);
    }
    run(&whole(locked.home(), networks, exists), locked)
}

/// Adds what `network` makes the table hold. The table must be there.
pub(super) fn add(locked: &Locked, network: &Network) -> Result<Transaction, NetError> {
    run(&additions(&table(locked.home()), &Elements::of(std::slice::from_ref(network))), locked)
}

/// Runs a script in the network namespace of the calling thread, and waits.
pub(super) fn here(script: &str) -> Result<(), NetError> {
    start(script, Stdio::null())?.finish()
}

fn run(script: &str, locked: &Locked) -> Result<Transaction, NetError> {
    // It writes nothing there, but has the lock with it: if we are killed, whoever cleans up after us waits until
    // it has ended, and does not find rules that are written after all was taken away.
    start(script, locked.share().map_err(NetError::doing("sharing the networks' lock"))?.into())
}

fn start(script: &str, output: Stdio) -> Result<Transaction, NetError> {
    let nft = program::find("nft").ok_or(NetError::ProgramMissing {
        program: "nft",
        package: "nftables",
        purpose: "the packet rules of bridge networks",
    })?;
    let mut child = Command::new(nft)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(output)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(NetError::doing("starting `nft`"))?;
    if let Some(mut input) = child.stdin.take()
        && let Err(error) = input.write_all(script.as_bytes())
    {
        // It ended early: what it said is the better message.
        tracing::debug!(%error, "nft did not read its script");
    }
    Ok(Transaction(Some(child)))
}

/// Whether the table is there, asked of the kernel directly: an administrator may have flushed the ruleset.
pub(super) fn exists(table: &str) -> bool {
    /// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE` and `…NEWTABLE`, its answer.
    const GET_TABLE: u16 = 10 << 8 | 1;
    const NEW_TABLE: u16 = 10 << 8;
    const NFPROTO_INET: u8 = 1;
    const NFTA_TABLE_NAME: u16 = 1;
    const NLM_F_REQUEST: u16 = 1;
    let ask = || -> rustix::io::Result<bool> {
        let socket =
            socket_with(Family::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
        // struct nlmsghdr, struct nfgenmsg, one string attribute.
        let mut message = Vec::with_capacity(64);
        let name_length = 4 + table.len() + 1;
        let length = 16 + 4 + name_length.next_multiple_of(4);
        message.extend_from_slice(&(length as u32).to_ne_bytes());
        message.extend_from_slice(&GET_TABLE.to_ne_bytes());
        message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[NFPROTO_INET, 0, 0, 0]);
        message.extend_from_slice(&(name_length as u16).to_ne_bytes());
        message.extend_from_slice(&NFTA_TABLE_NAME.to_ne_bytes());
        message.extend_from_slice(table.as_bytes());
        message.resize(length, 0);
        send(&socket, &message, SendFlags::empty())?;
        let mut answer = [0; 1024];
        let (received, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
        Ok(received >= 16 && u16::from_ne_bytes([answer[4], answer[5]]) == NEW_TABLE)
    };
    ask().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lease;
    use kiln_contract::PublishSpec;

    fn network(internal: bool, ports: Vec<PublishSpec>) -> Network {
        let mut network = Network::built_in("n", "bridge");
        network.interface = "kiln01234567".into();
        network.subnet = Some("10.89.0.0/24".parse().unwrap());
        network.internal = internal;
        let lease = Lease { ports, ..Lease::at("10.89.0.2".parse::<IpAddr>().unwrap()) };
        network.leases.insert(InstanceId::random(), lease);
        network
    }

    #[test]
    fn loopback_and_ipv6_ports_are_left_to_the_proxy() {
        let table = [
            (None, true),
            (Some("0.0.0.0"), true),
            (Some("192.0.2.1"), true),
            (Some("127.0.0.1"), false),
            (Some("::1"), false),
        ];
        for (address, translated) in table {
            let port = PublishSpec {
                host_address: address.map(|address| address.parse().unwrap()),
                host_port: 8080,
                host_port_last: None,
                container_port: 80,
                protocol: Protocol::Tcp,
            };
            let script = whole(Path::new("/h"), &[network(false, vec![port])], false);
            assert_eq!(script.contains("8080"), translated, "{address:?}");
        }
    }

    #[test]
    fn a_home_without_containers_has_no_table() {
        let mut unused = network(false, Vec::new());
        unused.leases.clear();
        let script = whole(Path::new("/h"), &[unused], true);
        assert!(script.ends_with(&format!("delete table inet {}\n", table(Path::new("/h")))), "{script}");
    }

    #[test]
    fn internal_networks_have_no_way_out() {
        let elements = Elements::of(&[network(true, Vec::new())]);
        assert!(elements.subnets.is_empty() && elements.internal == ["\"kiln01234567\""]);
    }
}
