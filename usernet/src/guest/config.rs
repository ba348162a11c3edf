//! What the guest's network looks like to its programs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;

/// An address on the TUN device, and the gateway behind it: the host, which answers pings and name queries (port 53).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet<A> {
    /// The guest's address.
    pub address: A,
    /// How many leading bits of it are the subnet's.
    pub prefix: u8,
    /// The gateway, in the same subnet; the default route goes there.
    pub gateway: A,
}

/// The TUN device and its addresses. The default is right for a machine on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunConfig {
    /// The device's name, at most 15 bytes.
    pub name: String,
    /// The largest packet, 1280 to 65,535 bytes.
    pub mtu: u16,
    /// IPv4, if the guest has it.
    pub ipv4: Option<Subnet<Ipv4Addr>>,
    /// IPv6, if the guest has it.
    pub ipv6: Option<Subnet<Ipv6Addr>>,
    /// How much memory connections may take.
    pub limits: Limits,
}

impl Default for TunConfig {
    /// `192.0.0.2` behind `192.0.0.1`, and `fd6b:696c:6e00::2` behind `fd6b:696c:6e00::1`.
    ///
    /// 192.0.0.0/29 is set aside for the link between a host and the translator that takes it to the Internet (RFC 7335),
    /// so it is never the network of an office, of a cloud, of Docker or of the hypervisor that Kiln itself runs in. The
    /// IPv6 addresses are unique local ones: with them, programs prefer IPv4 to global IPv6 destinations (RFC 6724 §2.1),
    /// which is right while nobody knows whether the host has IPv6.
    fn default() -> Self {
        Self {
            name: "kiln0".into(),
            // What IPv4 can say: no datagram of a program of the guest's is ever fragmented.
            mtu: u16::MAX,
            ipv4: Some(Subnet {
                address: Ipv4Addr::new(192, 0, 0, 2),
                prefix: 29,
                gateway: Ipv4Addr::new(192, 0, 0, 1),
            }),
            ipv6: Some(Subnet {
                address: Ipv6Addr::new(0xfd6b, 0x696c, 0x6e00, 0, 0, 0, 0, 2),
                prefix: 64,
                gateway: Ipv6Addr::new(0xfd6b, 0x696c, 0x6e00, 0, 0, 0, 0, 1),
            }),
            limits: Limits::default(),
        }
    }
}

impl TunConfig {
    /// The gateways: one of each family that is there.
    pub fn gateways(&self) -> Vec<IpAddr> {
        self.ipv4
            .map(|v4| v4.gateway.into())
            .into_iter()
            .chain(self.ipv6.map(|v6| v6.gateway.into()))
            .collect()
    }

    /// A `resolv.conf(5)` that names the gateway.
    pub fn resolv_conf(&self) -> String {
        self.gateways().first().map(|gateway| format!("nameserver {gateway}\n")).unwrap_or_default()
    }

    /// The gateway of the family of `address`.
    pub(crate) fn gateway_beside(&self, address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V4(_) => self.ipv4.map(|v4| v4.gateway.into()),
            IpAddr::V6(_) => self.ipv6.map(|v6| v6.gateway.into()),
        }
    }

    pub(crate) fn check(&self) -> Result<(), GuestError> {
        let wrong = |what: &str| Err(GuestError::Config(what.to_owned()));
        if self.name.is_empty() || self.name.len() > 15 || self.name.bytes().any(|b| b == b'/' || b <= b' ') {
            return wrong("the name of an interface has 1 to 15 letters, none of them `/` or a space");
        }
        if self.mtu < 1280 {
            return wrong("the MTU must be at least 1280");
        }
        if self.ipv4.is_some_and(|v4| v4.prefix > 32) || self.ipv6.is_some_and(|v6| v6.prefix > 128) {
            return wrong("a prefix has at most 32 bits (IPv4) or 128 bits (IPv6)");
        }
        Ok(())
    }
}

/// What the guest's programs can make the stack keep in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// TCP connections, those being made included. A SYN beyond is answered with RST.
    pub connections: usize,
    /// Bytes for the buffers of all TCP connections together. As they are taken up, new connections get smaller ones.
    pub buffers: usize,
    /// Bytes for one buffer; each connection has two. At least 16 KiB, which every connection gets.
    pub buffer: usize,
    /// UDP ports and echo identifiers that are being served. A new one takes the place of the longest idle.
    pub flows: usize,
    /// Bytes of datagrams and fragments that wait. More are dropped.
    pub waiting: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 4096, buffers: 64 << 20, buffer: 512 << 10, flows: 1024, waiting: 4 << 20 }
    }
}

/// Why the guest has no network.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The configuration makes no sense.
    #[error("the network of the guest cannot be set up: {0}")]
    Config(String),
    /// The kernel has no TUN device.
    #[error(
        "opening /dev/net/tun: {0} (the guest's kernel needs CONFIG_TUN: built in, or the module `tun` loaded)"
    )]
    NoTun(io::Error),
    /// The kernel refused.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl GuestError {
    pub(crate) fn doing<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = what.into();
        move |source| Self::System { doing, source: source.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_would_refuse_is_refused_with_a_reason() {
        let with = |change: fn(&mut TunConfig)| {
            let mut config = TunConfig::default();
            change(&mut config);
            config.check().map_err(|error| error.to_string())
        };
        assert_eq!(with(|_| ()), Ok(()));
        for change in [
            (|c| c.name = String::new()) as fn(&mut TunConfig),
            |c| c.name = "a-name-of-16-byt".into(),
            |c| c.name = "a/b".into(),
            |c| c.mtu = 1279,
            |c| c.ipv4 = c.ipv4.map(|v4| Subnet { prefix: 33, ..v4 }),
            |c| c.ipv6 = c.ipv6.map(|v6| Subnet { prefix: 129, ..v6 }),
        ] {
            assert!(with(change).unwrap_err().starts_with("the network of the guest cannot be set up: "));
        }
    }

    #[test]
    fn a_guest_of_one_family_asks_the_gateway_of_that_family() {
        let mut config = TunConfig::default();
        assert_eq!(config.resolv_conf(), "nameserver 192.0.0.1\n");
        config.ipv4 = None;
        assert_eq!(config.resolv_conf(), "nameserver fd6b:696c:6e00::1\n");
        assert_eq!(config.gateways(), ["fd6b:696c:6e00::1".parse::<IpAddr>().unwrap()]);
    }
}
