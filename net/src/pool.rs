//! Which subnets and addresses are free.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use kiln_contract::InstanceId;

use crate::{Lease, NetError, Network};

/// Where automatic subnets come from, for messages.
pub(crate) const POOL: &str = "10.89.0.0 to 10.99.255.255";

/// The first /24 of the pool that overlaps nothing in `taken`.
pub(crate) fn free_subnet(taken: &[Ipv4Net]) -> Result<Ipv4Net, NetError> {
    (89..=99u8)
        .flat_map(|second| (0..=255u8).map(move |third| Ipv4Addr::new(10, second, third, 0)))
        .filter_map(|address| Ipv4Net::new(address, 24).ok())
        .find(|subnet| collision(subnet, taken).is_none())
        .ok_or(NetError::PoolExhausted { pool: POOL })
}

/// The first of `taken` that shares addresses with `subnet`. Default routes collide with nothing.
pub(crate) fn collision<'a>(subnet: &Ipv4Net, taken: &'a [Ipv4Net]) -> Option<&'a Ipv4Net> {
    taken
        .iter()
        .filter(|other| other.prefix_len() > 0)
        .find(|other| other.contains(subnet) || subnet.contains(*other))
}

/// An IPv4 subnet that bridges can have, or why it is none.
pub(crate) fn usable(subnet: IpNet) -> Result<Ipv4Net, NetError> {
    let unusable = |reason: &str| NetError::SubnetUnusable { subnet, reason: reason.into() };
    let IpNet::V4(v4) = subnet else { return Err(unusable("bridges have IPv4 addresses only")) };
    if !(8..=30).contains(&v4.prefix_len()) {
        return Err(unusable("its prefix length must be from 8 to 30"));
    }
    let first = v4.network();
    if first.is_loopback() || first.is_multicast() || first.is_link_local() || first.octets()[0] == 0 {
        return Err(unusable("its addresses have a special meaning"));
    }
    Ok(v4.trunc())
}

/// The address for `id`: the one asked for, or the lowest free one.
pub(crate) fn address(
    network: &Network,
    id: &InstanceId,
    asked: Option<IpAddr>,
) -> Result<Ipv4Addr, NetError> {
    let (Some(IpNet::V4(subnet)), Some(IpAddr::V4(gateway))) = (network.subnet, network.gateway) else {
        return Err(NetError::Invalid(format!("the network `{}` has no IPv4 subnet", network.name)));
    };
    let holder = |address: Ipv4Addr| -> Option<(&InstanceId, &Lease)> {
        network.leases.iter().find(|(other, lease)| *other != id && lease.address == IpAddr::V4(address))
    };
    if let Some(asked) = asked {
        let unusable = |reason: String| NetError::AddressUnusable {
            address: asked,
            network: network.name.clone(),
            reason,
        };
        let IpAddr::V4(v4) = asked else { return Err(unusable("it is not an IPv4 address".into())) };
        if !subnet.contains(&v4) || v4 == subnet.network() || v4 == subnet.broadcast() {
            return Err(unusable(format!("it is not a host's address in {subnet}")));
        }
        if v4 == gateway {
            return Err(unusable("it is the gateway's".into()));
        }
        if let Some((other, _)) = holder(v4) {
            return Err(unusable(format!("the container {} has it", other.short())));
        }
        return Ok(v4);
    }
    subnet
        .hosts()
        .find(|address| *address != gateway && holder(*address).is_none())
        .ok_or_else(|| NetError::SubnetFull { network: network.name.clone(), subnet: subnet.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<Ipv4Net> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_first_subnet_that_collides_with_nothing_is_chosen() {
        let table: [(&[&str], &str); 5] = [
            (&[], "10.89.0.0/24"),
            (&["0.0.0.0/0", "192.168.0.0/16"], "10.89.0.0/24"),
            (&["10.89.0.0/24", "10.89.1.128/25"], "10.89.2.0/24"),
            (&["10.89.0.7/32"], "10.89.1.0/24"),
            (&["10.88.0.0/15"], "10.90.0.0/24"),
        ];
        for (taken, chosen) in table {
            assert_eq!(free_subnet(&nets(taken)).unwrap().to_string(), chosen, "{taken:?}");
        }
        assert!(matches!(free_subnet(&nets(&["10.0.0.0/8"])), Err(NetError::PoolExhausted { .. })));
    }

    #[test]
    fn subnets_without_room_or_with_a_meaning_are_refused() {
        for bad in [
            "10.0.0.0/31",
            "10.0.0.0/32",
            "127.0.0.0/24",
            "224.0.0.0/24",
            "169.254.0.0/16",
            "fd00::/64",
            "0.0.0.0/8",
        ] {
            assert!(usable(bad.parse().unwrap()).is_err(), "{bad}");
        }
        assert_eq!(usable("10.7.0.9/24".parse().unwrap()).unwrap().to_string(), "10.7.0.0/24");
    }

    #[test]
    fn addresses_are_the_lowest_free_ones_and_never_the_gateway() {
        let mut network = Network::built_in("n", "bridge");
        network.subnet = Some("10.1.1.0/29".parse().unwrap());
        network.gateway = Some("10.1.1.1".parse().unwrap());
        for last in 2..=6 {
            let id = InstanceId::random();
            let address = address(&network, &id, None).unwrap();
            assert_eq!(address, Ipv4Addr::new(10, 1, 1, last));
            network.leases.insert(id, Lease::at(address));
        }
        let id = InstanceId::random();
        assert!(matches!(address(&network, &id, None), Err(NetError::SubnetFull { .. })));
        for bad in ["10.1.1.0", "10.1.1.1", "10.1.1.3", "10.1.1.7", "10.1.2.2", "fd00::2"] {
            assert!(address(&network, &id, Some(bad.parse().unwrap())).is_err(), "{bad}");
        }
    }
}
