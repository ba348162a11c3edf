//! Where a rule that does not name it leads nobody.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use ipnet::IpNet;

/// What is closed, with the name that users are told.
pub(super) const CLOSED: &[(&str, &str)] = &[
    ("0.0.0.0/8", "`this host` (0.0.0.0/8)"),
    ("127.0.0.0/8", "the host's loopback"),
    ("169.254.0.0/16", "link-local, where clouds keep their machines' secrets"),
    // Where those answer that do not use a link-local address: Azure, Oracle, Alibaba.
    ("168.63.129.16/32", "the metadata service of a cloud"),
    ("192.0.0.192/32", "the metadata service of a cloud"),
    ("100.100.100.200/32", "the metadata service of a cloud"),
    // Where the guest's own addresses come from (kiln_usernet's default): on the host's side they are somebody else's.
    ("192.0.0.0/29", "the link between guest and host"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("::/96", "the unspecified address, the host's loopback, or IPv4 in an abandoned form"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local, abandoned"),
    ("ff00::/8", "multicast"),
    // Amazon's and Google's.
    ("fd00:ec2::/32", "the metadata service of a cloud"),
    ("fd20:ce::254/128", "the metadata service of a cloud"),
    ("fd6b:696c:6e00::/48", "the link between guest and host"),
];

/// What an address of the host's own is called.
pub(super) const OWN: &str = "an address of the host's own";
/// What an address of another network of Kiln's is called.
pub(super) const ELSEWHERE: &str = "another network of this host";

/// IPv4 in IPv6 (`::ffff:192.0.2.1`) as what it is: the kernel connects to the same host.
pub(crate) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The closed range in which an address is, and its name.
pub(super) fn closed(address: IpAddr) -> Option<(IpNet, &'static str)> {
    static RANGES: LazyLock<Vec<(IpNet, &str)>> = LazyLock::new(|| {
        CLOSED.iter().filter_map(|(range, name)| Some((range.parse().ok()?, *name))).collect()
    });
    let found = RANGES.iter().find(|(range, _)| range.contains(&address)).copied();
    found.or_else(|| {
        // A gateway on the way would lead there.
        let IpAddr::V6(address) = address else { return None };
        let (_, name) = closed(embedded(address)?.into())?;
        Some((IpNet::from(IpAddr::V6(address)), name))
    })
}

/// The IPv4 address to which a translator or a tunnel would carry what is sent to this one.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = address.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match [a, b, c, d, e, f] {
        // NAT64 (RFC 6052), also for use inside a network (RFC 8215), and SIIT (RFC 2765).
        [0x64, 0xff9b, 0, 0, 0, 0] | [0x64, 0xff9b, 1, _, _, _] | [0, 0, 0, 0, 0xffff, 0] => Some(v4(g, h)),
        // 6to4 (RFC 3056).
        [0x2002, ..] => Some(v4(b, c)),
        _ => None,
    }
}

/// Whether an address is one of the host's: the kernel then chooses it as the source too. Nothing is sent.
pub(super) fn is_own(address: IpAddr) -> bool {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = std::net::UdpSocket::bind((any, 0))
        // Any port will do.
        .and_then(|socket| socket.connect((address, 9)).and_then(|()| socket.local_addr()));
    source.is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_closed_range_is_a_range() {
        for (range, _) in CLOSED {
            let range: IpNet = range.parse().unwrap();
            assert_eq!(range, range.trunc());
        }
    }
}
