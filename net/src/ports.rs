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

/// Binds all ports, or none.
pub(crate) fn bind(ports: &[PublishSpec]) -> Result<Vec<BoundPort>, NetError> {
    ports.iter().map(bind_one).collect()
}

fn bind_one(port: &PublishSpec) -> Result<BoundPort, NetError> {
    // A port that is free for IPv4 may be taken for IPv6: where any will do, try some more.
    let mut attempts = if port.host_port == 0 { 16 } else { 1 };
    loop {
        attempts -= 1;
        match try_bind(port) {
            Ok(bound) => return Ok(bound),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if attempts == 0 {
                    return Err(NetError::PortTaken { port: port.clone() });
                }
            }
            Err(source) => return Err(NetError::PortFailed { port: port.clone(), source }),
        }
    }
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
