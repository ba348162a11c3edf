//! Packet rules of machines with a device of their own: who they are and what they may reach.
//!
//! Each has two chains: `t_<id>` for what it sends through the host, `h_<id>` for what it sends to the host itself. What
//! arrives by its device with another source than its address goes nowhere. Where `t_<id>` returns, the rules that are for
//! all networks follow (`nft` module); only what a rule of its policy names is accepted at once, even in another network.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use kiln_contract::InstanceId;

use super::bridge::tap_name;
use crate::policy::{Passage, Ports, closed_ranges};
use crate::{Network, Policy};

/// The chains of all such machines, `tapped` among them, which is there without any too.
pub(super) fn chains(networks: &[Network]) -> String {
    let (mut chains, mut through, mut to_host) = (String::new(), Vec::new(), Vec::new());
    let mut neighbours = String::new();
    for network in networks.iter().filter(|network| network.is_bridge()) {
        let elsewhere: Vec<_> = networks
            .iter()
            .filter(|other| other.name != network.name)
            .filter_map(|other| match other.subnet {
                Some(IpNet::V4(subnet)) => Some(subnet),
                _ => None,
            })
            .collect();
        let mut ends = vec![format!("\"{}\"", network.interface)];
        for (id, lease) in &network.leases {
            let (Some(rules), IpAddr::V4(address)) = (&lease.tap, lease.address) else { continue };
            // What cannot be read opens nothing.
            let policy = rules.iter().map(|rule| rule.parse().ok()).collect::<Option<Policy>>();
            let passages = policy.unwrap_or_default().passages(&elsewhere);
            of_machine(&mut chains, id, Ipv4Net::from(address), network.internal, &passages);
            let (end, short) = (format!("\"{}\"", tap_name(id)), id.short());
            through.push(format!("{end} : jump t_{short}"));
            to_host.push(format!("{end} : jump h_{short}"));
            ends.push(end);
        }
        if ends.len() > 1 {
            let ends = ends.join(", ");
            let _ = writeln!(neighbours, "    iifname {{ {ends} }} oifname {{ {ends} }} accept");
        }
    }
    let map = |of: &[String]| match of {
        [] => String::new(),
        of => format!("    iifname vmap {{ {} }}\n", of.join(", ")),
    };
    let _ = write!(chains, "  chain tapped {{\n{}{neighbours}  }}\n", map(&through));
    if !to_host.is_empty() {
        let begin = "    type filter hook input priority filter; policy accept;";
        let _ = write!(chains, "  chain input {{\n{begin}\n{}  }}\n", map(&to_host));
    }
    chains
}

/// The two chains of one machine.
fn of_machine(chains: &mut String, id: &InstanceId, address: Ipv4Net, internal: bool, passages: &[Passage]) {
    let is_it = format!("    meta nfproto != ipv4 drop\n    ip saddr != {} drop\n", address.addr());
    let short = id.short();
    let _ = write!(chains, "  chain t_{short} {{\n{is_it}    ct state established,related return\n");
    // It was sent to a port that the host publishes: an address of the host's own.
    chains.push_str("    ct status dnat drop\n");
    for passage in passages.iter().filter(|passage| !internal && (passage.is_named || passage.is_exact())) {
        let _ = writeln!(chains, "    {}accept", matching(passage));
    }
    let closed: Vec<_> = closed_ranges().collect();
    let _ = writeln!(chains, "    ip daddr {{ {} }} drop", closed.join(", "));
    for passage in passages {
        let _ = writeln!(chains, "    {}return", matching(passage));
    }
    let _ = write!(
        chains,
        "    drop\n  }}\n  chain h_{short} {{\n{is_it}    ct state established,related accept\n"
    );
    for passage in passages.iter().filter(|passage| !internal && passage.is_exact()) {
        let _ = writeln!(chains, "    {}accept", matching(passage));
    }
    chains.push_str("    drop\n  }\n");
}

fn matching(passage: &Passage) -> String {
    let to = match passage.network.prefix_len() {
        0 => String::new(),
        _ => format!("ip daddr {} ", passage.network),
    };
    match passage.ports {
        Ports::All => to,
        Ports::These(first, last) => format!("{to}meta l4proto {{ tcp, udp }} th dport {first}-{last} "),
    }
}
