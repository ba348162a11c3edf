//! Ports held on the host.
//!
//! Packets from outside are turned to the container by the rules before they reach these sockets; the sockets make
//! sure that nobody else takes the port, and serve what the rules cannot: loopback, and IPv6.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use kiln_contract::{Protocol, PublishSpec};
use rustix::net::{AddressFamily, SocketType, bind as bind_to, listen, sockopt};

use crate::NetError;

/// A published port and the sockets that hold it, one for each address family.
#[derive(Debug)]
pub(crate) struct BoundPort {
    /// As asked for, with the port chosen.
    pub(crate) spec: PublishSpec,
    pub(crate) sockets: Vec<Held>,
}

#[derive(Debug)]
pub(crate) enum Held {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// Binds all ports, or none; those first that can be no others.
pub(crate) fn bind(ports: &[PublishSpec]) -> Result<Vec<BoundPort>, NetError> {
    let mut bound: Vec<(usize, BoundPort)> = Vec::with_capacity(ports.len());
    for choice in [false, true] {
        for (index, port) in ports.iter().enumerate() {
            if (port.host_port == 0 || port.host_port_last.is_some()) == choice {
                bound.push((index, bind_one(port)?));
            }
        }
    }
    bound.sort_by_key(|(index, _)| *index);
    Ok(bound.into_iter().map(|(_, port)| port).collect())
}

fn bind_one(port: &PublishSpec) -> Result<BoundPort, NetError> {
    let first = port.host_port;
    let candidates: Box<dyn Iterator<Item = u16>> = match port.host_port_last {
        Some(last) => Box::new(first..=last),
        // A port that is free for IPv4 may be taken for IPv6: where any will do, try some more.
        None if first == 0 => Box::new(std::iter::repeat_n(0, 16)),
        None => Box::new(std::iter::once(first)),
    };
    let mut failed = None;
    for candidate in candidates {
        match try_bind(&PublishSpec { host_port: candidate, host_port_last: None, ..port.clone() }) {
            Ok(bound) => return Ok(bound),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            // The first ports of a range may be for root only.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => failed = Some(error),
            Err(source) => return Err(NetError::PortFailed { port: port.clone(), source }),
        }
    }
    Err(match failed {
        Some(source) => NetError::PortFailed { port: port.clone(), source },
        None => NetError::PortTaken { port: port.clone() },
    })
}

fn try_bind(port: &PublishSpec) -> io::Result<BoundPort> {
    let addresses = match port.host_address {
        Some(address) => vec![address],
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    };
    let mut spec = port.clone();
    let mut sockets = Vec::with_capacity(addresses.len());
    for address in addresses {
        match hold(SocketAddr::new(address, spec.host_port), port.protocol) {
            Ok((held, at)) => {
                spec.host_port = at.port();
                sockets.push(held);
            }
            // A host without IPv6 publishes on IPv4 alone.
            Err(error) if address == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && port.host_address.is_none() => {
                if error.kind() == io::ErrorKind::AddrInUse {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(BoundPort { spec, sockets })
}

fn hold(address: SocketAddr, protocol: Protocol) -> io::Result<(Held, SocketAddr)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = unconnected(family, kind)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol == Protocol::Tcp {
        // Connections that still linger from an earlier run do not count; another listener does.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind_to(&socket, &address)?;
    Ok(match protocol {
        Protocol::Tcp => {
            listen(&socket, 1024)?;
            let listener = TcpListener::from(socket);
            let at = listener.local_addr()?;
            (Held::Tcp(listener), at)
        }
        Protocol::Udp => {
            let socket = UdpSocket::from(socket);
            let at = socket.local_addr()?;
            (Held::Udp(socket), at)
        }
    })
}

/// A socket that does not block, and that no child inherits.
#[cfg(target_os = "linux")]
fn unconnected(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    use rustix::net::{SocketFlags, socket_with};
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?)
}

/// A socket that does not block, and that no child inherits.
#[cfg(not(target_os = "linux"))]
fn unconnected(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket(family, kind, None)?;
    rustix::io::ioctl_fioclex(&socket)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of(first: u16, last: u16, container_port: u16) -> PublishSpec {
        PublishSpec {
            host_address: Some(Ipv4Addr::LOCALHOST.into()),
            host_port: first,
            host_port_last: Some(last),
            container_port,
            protocol: Protocol::Tcp,
        }
    }

    /// Ten ports that are free now, of which the first is then in use.
    fn ten() -> (TcpListener, u16) {
        loop {
            let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let first = taken.local_addr().unwrap().port();
            let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
            if first < u16::MAX - 10 && (first + 1..first + 10).all(free) {
                return (taken, first);
            }
        }
    }

    #[test]
    fn the_first_free_port_of_a_range_is_taken() {
        let (taken, first) = ten();
        let fixed = PublishSpec { host_port_last: None, ..one_of(first + 1, first + 1, 3) };
        let asked = [one_of(first, first + 9, 1), one_of(first, first + 9, 2), fixed];
        let bound = bind(&asked).unwrap();
        let got: Vec<_> = bound
            .iter()
            .map(|port| (port.spec.host_port, port.spec.host_port_last, port.spec.container_port))
            .collect();
        assert_eq!(got, [(first + 2, None, 1), (first + 3, None, 2), (first + 1, None, 3)]);

        let full = bind(&[one_of(first, first + 3, 1)]).unwrap_err();
        let expected = format!("publishing 127.0.0.1:{first}-{}/tcp: all are in use on this host", first + 3);
        assert_eq!(full.to_string(), expected);
        drop((bound, taken));
        assert_eq!(bind(&[one_of(first, first + 3, 1)]).unwrap()[0].spec.host_port, first);
    }
}
