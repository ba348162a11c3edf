//! What the network says of datagrams that could not be delivered.

use std::io;
use std::net::SocketAddr;

use kiln_usernet::datagram::Unreachable;
use tokio::net::UdpSocket;

/// What an error of a datagram socket means, if it is about a datagram that was sent.
pub(super) fn meaning(error: &io::Error) -> Option<Unreachable> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Some(Unreachable::Port),
        io::ErrorKind::HostUnreachable => Some(Unreachable::Host),
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::AddrNotAvailable => Some(Unreachable::Network),
        io::ErrorKind::PermissionDenied => Some(Unreachable::Prohibited),
        _ => None,
    }
}

/// Has the kernel keep what it is told about datagrams that the socket sent (`IP_RECVERR`, ip(7)).
#[cfg(target_os = "linux")]
pub(super) fn keep(socket: &UdpSocket) {
    use nix::sys::socket::{setsockopt, sockopt};
    let kept = match socket.local_addr() {
        Ok(address) if address.is_ipv6() => setsockopt(socket, sockopt::Ipv6RecvErr, &true),
        _ => setsockopt(socket, sockopt::Ipv4RecvErr, &true),
    };
    if let Err(error) = kept {
        tracing::debug!(%error, "errors of datagrams are not reported");
    }
}

/// The next of them: what it was, and where the datagram was sent. `None` if there is none.
#[cfg(target_os = "linux")]
pub(super) fn next(socket: &UdpSocket) -> Option<(Unreachable, SocketAddr)> {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    loop {
        let mut start = [0; 64];
        let mut pieces = [io::IoSliceMut::new(&mut start)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut pieces, Some(&mut space), flags).ok()?;
        let peer = message.address.and_then(|address| {
            let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from((v4.ip(), v4.port())));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from((v6.ip(), v6.port()))))
        });
        let error = message.cmsgs().ok()?.find_map(|part| match part {
            ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
                Some(io::Error::from_raw_os_error(error.ee_errno.cast_signed()))
            }
            _ => None,
        });
        if let (Some(peer), Some(why)) = (peer, error.as_ref().and_then(meaning)) {
            return Some((why, peer));
        }
    }
}

/// Elsewhere they are not told to sockets that send to many.
#[cfg(not(target_os = "linux"))]
pub(super) fn keep(_: &UdpSocket) {}

/// There are none.
#[cfg(not(target_os = "linux"))]
pub(super) fn next(_: &UdpSocket) -> Option<(Unreachable, SocketAddr)> {
    None
}
