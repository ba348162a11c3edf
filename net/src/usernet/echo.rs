//! Echo requests, sent from the sockets that Linux and macOS have for them without any privilege.

use std::io;
use std::net::IpAddr;

use rustix::net::{AddressFamily, SocketType, ipproto};
use tokio::net::UdpSocket;

const HEADER: usize = 8;

/// A socket that sends echo requests and receives the answers to them (icmp(7), `ping_group_range`). The kernel chooses the
/// identifier, and computes checksums.
pub(super) fn socket(ipv4: bool) -> io::Result<UdpSocket> {
    let (family, protocol) =
        if ipv4 { (AddressFamily::INET, ipproto::ICMP) } else { (AddressFamily::INET6, ipproto::ICMPV6) };
    let socket = rustix::net::socket(family, SocketType::DGRAM, Some(protocol))?;
    rustix::io::ioctl_fioclex(&socket)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    // It is sent to and received from like any other datagram socket.
    UdpSocket::from_std(std::net::UdpSocket::from(socket))
}

/// The message that such a socket sends.
pub(super) fn request(to: IpAddr, sequence: u16, data: &[u8]) -> Vec<u8> {
    let kind = if to.is_ipv4() { 8 } else { 128 };
    let [high, low] = sequence.to_be_bytes();
    [&[kind, 0, 0, 0, 0, 0, high, low], data].concat()
}

/// The sequence number and the data of an answer that such a socket has received.
pub(super) fn reply(from: IpAddr, message: &[u8]) -> Option<(u16, &[u8])> {
    // macOS gives the header of IPv4 too.
    let message = match message.first()? {
        first if cfg!(not(target_os = "linux")) && from.is_ipv4() && first >> 4 == 4 => {
            message.get(usize::from(first & 15) * 4..)?
        }
        _ => message,
    };
    let (header, data) = message.split_first_chunk::<HEADER>()?;
    let kind = if from.is_ipv4() { 0 } else { 129 };
    (header[0] == kind).then(|| (u16::from_be_bytes([header[6], header[7]]), data))
}
