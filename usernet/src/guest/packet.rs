//! Taking packets apart, and making those that are not part of a TCP connection.

use std::net::{IpAddr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4Repr,
    Icmpv6DstUnreachable, Icmpv6Message, Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol, IpRepr, Ipv4Packet,
    Ipv4Repr, Ipv6Packet, Ipv6Repr, TcpControl, TcpPacket, TcpRepr, UDP_HEADER_LEN, UdpPacket, checksum,
};

use super::tun::{Tun, Undone};
use crate::datagram::Unreachable;

const HOP_LIMIT: u8 = 64;
/// How much of what cannot be delivered is sent back with the news: the header behind IP's, as of old (RFC 792).
const QUOTED: usize = 8;

/// A packet of IPv4 or IPv6.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet<'a> {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// All of it, without what may follow it.
    pub(super) bytes: &'a [u8],
    pub(super) body: Body<'a>,
}

/// What a packet carries.
#[derive(Debug, Clone, Copy)]
pub(super) enum Body<'a> {
    /// A TCP segment.
    Tcp(Segment),
    /// A UDP datagram.
    Udp {
        /// The source port.
        from: u16,
        /// The destination port.
        to: u16,
        payload: &'a [u8],
    },
    /// An ICMP echo request.
    Echo { identifier: u16, sequence: u16, data: &'a [u8] },
    /// A part of an IPv4 packet.
    Fragment(Fragment<'a>),
    /// Something else.
    Other,
}

/// What must be known of a TCP segment to find its connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) from: u16,
    pub(super) to: u16,
    pub(super) syn: bool,
    pub(super) ack: bool,
    pub(super) rst: bool,
}

/// A part of an IPv4 packet (RFC 791 §3.2).
#[derive(Debug, Clone, Copy)]
pub(super) struct Fragment<'a> {
    pub(super) identification: u16,
    pub(super) protocol: u8,
    pub(super) offset: usize,
    pub(super) last: bool,
    pub(super) data: &'a [u8],
}

impl<'a> Packet<'a> {
    /// `None` for what is no packet.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => {
                let packet = Ipv4Packet::new_checked(bytes).ok()?;
                let header = usize::from(packet.header_len());
                if header < IPV4_HEADER_LEN {
                    return None;
                }
                let bytes = &bytes[..usize::from(packet.total_len())];
                let data = bytes.get(header..)?;
                let body = if packet.more_frags() || packet.frag_offset() != 0 {
                    Body::Fragment(Fragment {
                        identification: packet.ident(),
                        protocol: packet.next_header().into(),
                        offset: usize::from(packet.frag_offset()),
                        last: !packet.more_frags(),
                        data,
                    })
                } else {
                    Body::parse(packet.next_header(), data)
                };
                let (source, destination) = (packet.src_addr().into(), packet.dst_addr().into());
                Some(Self { source, destination, bytes, body })
            }
            6 => {
                let packet = Ipv6Packet::new_checked(bytes).ok()?;
                let bytes = &bytes[..packet.total_len()];
                let body = Body::parse(packet.next_header(), &bytes[IPV6_HEADER_LEN..]);
                let (source, destination) = (packet.src_addr().into(), packet.dst_addr().into());
                Some(Self { source, destination, bytes, body })
            }
            _ => None,
        }
    }

    /// An ICMP error about this packet would be wrong: it went to many, or comes from nobody.
    pub(super) fn is_unicast(&self) -> bool {
        let unicast = |address: IpAddr| {
            !address.is_unspecified() && !address.is_multicast() && address != IpAddr::from([255; 4])
        };
        unicast(self.source) && unicast(self.destination)
    }
}

impl<'a> Body<'a> {
    pub(super) fn parse(protocol: IpProtocol, data: &'a [u8]) -> Self {
        let parsed = match protocol {
            IpProtocol::Tcp => TcpPacket::new_checked(data).ok().map(|tcp| {
                Self::Tcp(Segment {
                    from: tcp.src_port(),
                    to: tcp.dst_port(),
                    syn: tcp.syn(),
                    ack: tcp.ack(),
                    rst: tcp.rst(),
                })
            }),
            IpProtocol::Udp => UdpPacket::new_checked(data).ok().and_then(|udp| {
                let payload = data.get(UDP_HEADER_LEN..usize::from(udp.len()))?;
                Some(Self::Udp { from: udp.src_port(), to: udp.dst_port(), payload })
            }),
            IpProtocol::Icmp => Icmpv4Packet::new_checked(data)
                .ok()
                .filter(|icmp| icmp.msg_type() == Icmpv4Message::EchoRequest)
                .map(|icmp| Self::Echo {
                    identifier: icmp.echo_ident(),
                    sequence: icmp.echo_seq_no(),
                    data: &data[icmp.header_len()..],
                }),
            IpProtocol::Icmpv6 => Icmpv6Packet::new_checked(data)
                .ok()
                .filter(|icmp| icmp.msg_type() == Icmpv6Message::EchoRequest)
                .map(|icmp| Self::Echo {
                    identifier: icmp.echo_ident(),
                    sequence: icmp.echo_seq_no(),
                    data: &data[icmp.header_len()..],
                }),
            _ => None,
        };
        parsed.unwrap_or(Self::Other)
    }
}

/// Fills in the sum of the pseudo header of TCP or UDP (its checksum is `place` bytes into its header), which is what a
/// kernel that is to do the rest expects.
pub(super) fn leave_checksum(packet: &mut [u8], place: u16) -> Undone {
    let Some(parsed) = Packet::parse(packet) else { return Undone::default() };
    // Ours have no options.
    let header = if parsed.source.is_ipv4() { IPV4_HEADER_LEN } else { IPV6_HEADER_LEN };
    let protocol = if place == TCP_CHECKSUM { IpProtocol::Tcp } else { IpProtocol::Udp };
    let length = packet.len().saturating_sub(header) as u32;
    let (source, destination) = (parsed.source.into(), parsed.destination.into());
    let sum = checksum::pseudo_header(&source, &destination, protocol, length);
    let at = header + usize::from(place);
    match packet.get_mut(at..at + 2) {
        Some(field) => field.copy_from_slice(&sum.to_be_bytes()),
        None => return Undone::default(),
    }
    Undone { checksum: Some((header as u16, place)), segments: None }
}

/// Where the checksum is in the header of TCP.
pub(super) const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;

fn ip(source: IpAddr, destination: IpAddr, protocol: IpProtocol, length: usize) -> IpRepr {
    IpRepr::new(source.into(), destination.into(), protocol, length, HOP_LIMIT)
}

/// Sends a UDP datagram to a program.
pub(super) fn send_udp(tun: &Tun, from: SocketAddr, to: SocketAddr, payload: &[u8]) {
    let length = UDP_HEADER_LEN + payload.len();
    let repr = ip(from.ip(), to.ip(), IpProtocol::Udp, length);
    if from.is_ipv4() != to.is_ipv4() || repr.buffer_len() > 65_535 {
        return;
    }
    tun.send(repr.buffer_len(), |packet| {
        repr.emit(&mut *packet, &ChecksumCapabilities::default());
        let data = &mut packet[repr.header_len()..];
        data[UDP_HEADER_LEN..].copy_from_slice(payload);
        let mut udp = UdpPacket::new_unchecked(data);
        udp.set_src_port(from.port());
        udp.set_dst_port(to.port());
        udp.set_len(length as u16);
        ((), leave_checksum(packet, UDP_CHECKSUM))
    });
}

/// Sends the answer to an echo request.
pub(super) fn send_echo(tun: &Tun, from: IpAddr, to: IpAddr, identifier: u16, sequence: u16, data: &[u8]) {
    send_icmp(tun, from, to, &Icmp::Echo { identifier, sequence, data });
}

/// Tells a program that its packet, or one that begins like it, cannot be delivered.
pub(super) fn send_unreachable(tun: &Tun, gateway: IpAddr, about: &[u8], why: Unreachable) {
    let Some(packet) = Packet::parse(about) else { return };
    if packet.is_unicast() && gateway.is_ipv4() == packet.source.is_ipv4() {
        send_icmp(tun, gateway, packet.source, &Icmp::Unreachable { about: packet.bytes, why });
    }
}

/// The start of a UDP datagram that was sent, for [`send_unreachable`].
pub(super) fn udp_start(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut header = [0; UDP_HEADER_LEN];
    let mut udp = UdpPacket::new_unchecked(&mut header);
    udp.set_src_port(from.port());
    udp.set_dst_port(to.port());
    udp.set_len(UDP_HEADER_LEN as u16);
    with_header(from.ip(), to.ip(), IpProtocol::Udp, &header)
}

/// The start of an echo request that was sent, for [`send_unreachable`].
pub(super) fn echo_start(from: IpAddr, to: IpAddr, identifier: u16, sequence: u16) -> Vec<u8> {
    let kind = if from.is_ipv4() { 8 } else { 128 };
    let [a, b] = identifier.to_be_bytes();
    let [c, d] = sequence.to_be_bytes();
    let protocol = if from.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
    with_header(from, to, protocol, &[kind, 0, 0, 0, a, b, c, d])
}

fn with_header(from: IpAddr, to: IpAddr, protocol: IpProtocol, data: &[u8]) -> Vec<u8> {
    let repr = ip(from, to, protocol, data.len());
    let mut packet = vec![0; repr.buffer_len()];
    repr.emit(&mut packet[..], &ChecksumCapabilities::default());
    packet[repr.header_len()..].copy_from_slice(data);
    packet
}

#[derive(Debug)]
enum Icmp<'a> {
    Echo { identifier: u16, sequence: u16, data: &'a [u8] },
    Unreachable { about: &'a [u8], why: Unreachable },
}

fn send_icmp(tun: &Tun, from: IpAddr, to: IpAddr, message: &Icmp<'_>) {
    let capabilities = ChecksumCapabilities::default();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let repr = match *message {
                Icmp::Echo { identifier, sequence, data } => {
                    Icmpv4Repr::EchoReply { ident: identifier, seq_no: sequence, data }
                }
                Icmp::Unreachable { about, why } => {
                    let Ok(packet) = Ipv4Packet::new_checked(about) else { return };
                    let Ok(header) = Ipv4Repr::parse(&packet, &capabilities) else { return };
                    let data = packet.payload();
                    let reason = match why {
                        Unreachable::Network => Icmpv4DstUnreachable::NetUnreachable,
                        Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
                        Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
                        Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
                    };
                    let data = &data[..data.len().min(QUOTED)];
                    Icmpv4Repr::DstUnreachable { reason, header, data }
                }
            };
            let length = repr.buffer_len();
            let ip = ip(from.into(), to.into(), IpProtocol::Icmp, length);
            tun.send(ip.buffer_len(), |packet| {
                ip.emit(&mut *packet, &capabilities);
                repr.emit(&mut Icmpv4Packet::new_unchecked(&mut packet[ip.header_len()..]), &capabilities);
                ((), Undone::default())
            });
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let repr = match *message {
                Icmp::Echo { identifier, sequence, data } => {
                    Icmpv6Repr::EchoReply { ident: identifier, seq_no: sequence, data }
                }
                Icmp::Unreachable { about, why } => {
                    let Ok(packet) = Ipv6Packet::new_checked(about) else { return };
                    let Ok(header) = Ipv6Repr::parse(&packet) else { return };
                    let data = packet.payload();
                    let reason = match why {
                        Unreachable::Network => Icmpv6DstUnreachable::NoRoute,
                        Unreachable::Host => Icmpv6DstUnreachable::AddrUnreachable,
                        Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
                        Unreachable::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
                    };
                    let data = &data[..data.len().min(QUOTED)];
                    Icmpv6Repr::DstUnreachable { reason, header, data }
                }
            };
            let length = repr.buffer_len();
            let ip = ip(from.into(), to.into(), IpProtocol::Icmpv6, length);
            tun.send(ip.buffer_len(), |packet| {
                ip.emit(&mut *packet, &capabilities);
                let mut icmp = Icmpv6Packet::new_unchecked(&mut packet[ip.header_len()..]);
                repr.emit(&from, &to, &mut icmp, &capabilities);
                ((), Undone::default())
            });
        }
        _ => {}
    }
}

/// Answers a segment of no connection with RST, in the way that RFC 9293 §3.10.7.1 has it.
pub(super) fn send_reset(tun: &Tun, about: &[u8]) {
    let Some(packet) = Packet::parse(about) else { return };
    let header = if packet.source.is_ipv4() { IPV4_HEADER_LEN } else { IPV6_HEADER_LEN };
    let Ok(tcp) = TcpPacket::new_checked(&packet.bytes[header.min(packet.bytes.len())..]) else { return };
    if tcp.rst() || !packet.is_unicast() {
        return;
    }
    let repr = TcpRepr {
        src_port: tcp.dst_port(),
        dst_port: tcp.src_port(),
        control: TcpControl::Rst,
        seq_number: if tcp.ack() { tcp.ack_number() } else { Default::default() },
        ack_number: (!tcp.ack()).then(|| tcp.seq_number() + tcp.segment_len()),
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (from, to): (IpAddress, IpAddress) = (packet.destination.into(), packet.source.into());
    let ip = IpRepr::new(from, to, IpProtocol::Tcp, repr.buffer_len(), HOP_LIMIT);
    tun.send(ip.buffer_len(), |bytes| {
        let capabilities = ChecksumCapabilities::default();
        ip.emit(&mut *bytes, &capabilities);
        let mut tcp = TcpPacket::new_unchecked(&mut bytes[ip.header_len()..]);
        repr.emit(&mut tcp, &from, &to, &capabilities);
        ((), Undone::default())
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sent(from: &str, to: &str) -> Vec<u8> {
        udp_start(from.parse().unwrap(), to.parse().unwrap())
    }

    #[test]
    fn datagrams_are_taken_apart_whatever_follows_them() {
        for (from, to) in [("192.0.0.2:1000", "192.0.2.1:53"), ("[fd00::2]:1000", "[2001:db8::1]:53")] {
            let mut bytes = sent(from, to);
            bytes.extend_from_slice(b"padding");
            let packet = Packet::parse(&bytes).unwrap();
            assert_eq!(packet.bytes.len(), bytes.len() - 7);
            let Body::Udp { from: source, to: destination, payload } = packet.body else {
                panic!("{packet:?}")
            };
            assert_eq!((packet.source, source), (from.parse::<SocketAddr>().unwrap().ip(), 1000));
            assert_eq!((packet.destination, destination), (to.parse::<SocketAddr>().unwrap().ip(), 53));
            assert!(payload.is_empty());
            for cut in 0..bytes.len() - 7 {
                assert!(Packet::parse(&bytes[..cut]).is_none(), "{cut}");
            }
        }
    }

    #[test]
    fn a_sum_that_is_left_to_the_kernel_is_the_pseudo_headers() {
        for (from, to) in [("192.0.0.2:1000", "192.0.2.1:53"), ("[fd00::2]:1000", "[2001:db8::1]:53")] {
            let mut bytes = sent(from, to);
            let undone = leave_checksum(&mut bytes, UDP_CHECKSUM);
            let (start, place) = undone.checksum.unwrap();
            let start = usize::from(start);
            // What the kernel does: sums all from there, and puts the complement in its place.
            let sum = !checksum::data(&bytes[start..]);
            let place = start + usize::from(place);
            bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
            let packet = Packet::parse(&bytes).unwrap();
            let udp = UdpPacket::new_checked(&bytes[start..]).unwrap();
            assert!(udp.verify_checksum(&packet.source.into(), &packet.destination.into()));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_taken_apart(mut bytes in prop::collection::vec(any::<u8>(), 0..120), version in 3u8..8) {
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 15;
            }
            if let Some(packet) = Packet::parse(&bytes) {
                prop_assert!(packet.bytes.len() <= bytes.len());
            }
            leave_checksum(&mut bytes, TCP_CHECKSUM);
        }
    }
}
