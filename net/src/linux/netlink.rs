//! rtnetlink without a runtime: requests go out in one datagram, answers are awaited (`rtnetlink(7)`).
//!
//! The kernel works through the requests of a datagram in order and answers each, so a whole set-up costs one
//! system call out and usually one in.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use ipnet::Ipv4Net;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::{
    AddressFamily as Family, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// A request and its flags beside `NLM_F_REQUEST | NLM_F_ACK`.
pub(super) type Request = (RouteNetlinkMessage, u16);

/// A socket to the kernel's network configuration, of the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        // No protocol is NETLINK_ROUTE, whose number is 0.
        let socket = socket_with(Family::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends all requests at once. The first that fails decides the result, after all were answered.
    pub(super) fn send(&mut self, requests: Vec<Request>) -> io::Result<()> {
        let first = self.sequence + 1;
        let mut datagram = Vec::with_capacity(256 * requests.len());
        let count = requests.len();
        for (message, flags) in requests {
            self.push(&mut datagram, message, NLM_F_REQUEST | NLM_F_ACK | flags);
        }
        send(&self.socket, &datagram, SendFlags::empty())?;
        let (mut answered, mut failure) = (0, None);
        while answered < count {
            self.receive(|header, payload| {
                if let NetlinkPayload::Error(error) = payload
                    && header.sequence_number >= first
                {
                    answered += 1;
                    if error.code.is_some() && failure.is_none() {
                        failure = Some(error.to_io());
                    }
                }
                Ok(())
            })?;
        }
        failure.map_or(Ok(()), Err)
    }

    /// All objects of a kind.
    fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut datagram = Vec::with_capacity(64);
        self.push(&mut datagram, message, NLM_F_REQUEST | NLM_F_DUMP);
        send(&self.socket, &datagram, SendFlags::empty())?;
        let (mut found, mut done) = (Vec::new(), false);
        while !done {
            self.receive(|_, payload| {
                match payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) => done = true,
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    _ => {}
                }
                Ok(())
            })?;
        }
        Ok(found)
    }

    fn push(&mut self, datagram: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let start = datagram.len();
        // Messages start at multiples of 4 bytes.
        datagram.resize(start + packet.buffer_len().next_multiple_of(4), 0);
        packet.serialize(&mut datagram[start..]);
    }

    fn receive(
        &self,
        mut each: impl FnMut(&NetlinkHeader, NetlinkPayload<RouteNetlinkMessage>) -> io::Result<()>,
    ) -> io::Result<()> {
        // The kernel fills at most 32 KiB at a time (`NLMSG_GOODSIZE`).
        let mut buffer = vec![0; 32 << 10];
        let (length, _) =
            rustix::io::retry_on_intr(|| recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty()))?;
        let mut rest = &buffer[..length];
        while rest.len() >= 16 {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            let taken = (message.header.length as usize).next_multiple_of(4).min(rest.len());
            if taken == 0 {
                break;
            }
            rest = &rest[taken..];
            let (header, payload) = message.into_parts();
            each(&header, payload)?;
        }
        Ok(())
    }

    /// The index of an interface, if there is one of that name.
    pub(super) fn index(&self, name: &str) -> io::Result<Option<u32>> {
        // Netlink sockets answer the ioctls of interfaces like any other socket.
        match rustix::net::netdevice::name_to_index(self.socket.as_fd(), name) {
            Ok(index) => Ok(Some(index)),
            Err(rustix::io::Errno::NODEV) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The index and the MTU of an interface, by name or index (if `name` is none), if it is there.
    pub(super) fn link(&mut self, name: Option<&str>, index: u32) -> io::Result<Option<(u32, u32)>> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.extend(name.map(|name| LinkAttribute::IfName(name.into())));
        let mut datagram = Vec::with_capacity(64);
        self.push(&mut datagram, RouteNetlinkMessage::GetLink(link), NLM_F_REQUEST);
        send(&self.socket, &datagram, SendFlags::empty())?;
        let mut found = None;
        self.receive(|_, payload| {
            match payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
                        LinkAttribute::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                    found = Some((link.header.index, mtu.unwrap_or(1500)));
                }
                NetlinkPayload::Error(error) if error.raw_code() != -libc::ENODEV => {
                    return Err(error.to_io());
                }
                _ => {}
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Removes an interface. One that is not there is no error.
    pub(super) fn delete_link(&mut self, name: &str) -> io::Result<()> {
        let Some(index) = self.index(name)? else { return Ok(()) };
        let mut link = LinkMessage::default();
        link.header.index = index;
        match self.send(vec![(RouteNetlinkMessage::DelLink(link), 0)]) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// All IPv4 subnets that the namespace has routes to or addresses in.
    pub(super) fn subnets(&mut self) -> io::Result<Vec<Ipv4Net>> {
        let mut subnets = Vec::new();
        for message in self.dump(RouteNetlinkMessage::GetRoute(v4_route()))? {
            if let RouteNetlinkMessage::NewRoute(route) = message
                && let Some(RouteAddress::Inet(address)) = route.attributes.iter().find_map(|a| match a {
                    RouteAttribute::Destination(address) => Some(address),
                    _ => None,
                })
            {
                subnets.extend(Ipv4Net::new(*address, route.header.destination_prefix_length));
            }
        }
        for (_, address) in self.addresses()? {
            subnets.push(address.trunc());
        }
        subnets.retain(|subnet| !subnet.addr().is_loopback());
        Ok(subnets)
    }

    /// All IPv4 addresses of the namespace, with the index of their interface.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<(u32, Ipv4Net)>> {
        let mut request = AddressMessage::default();
        request.header.family = AddressFamily::Inet;
        let mut found = Vec::new();
        for message in self.dump(RouteNetlinkMessage::GetAddress(request))? {
            let RouteNetlinkMessage::NewAddress(address) = message else { continue };
            let local = address.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(std::net::IpAddr::V4(local)) => Some(*local),
                _ => None,
            });
            if let Some(local) = local {
                found.extend(
                    Ipv4Net::new(local, address.header.prefix_len).map(|net| (address.header.index, net)),
                );
            }
        }
        Ok(found)
    }

    /// The gateway and interface index of the IPv4 default route.
    pub(super) fn default_route(&mut self) -> io::Result<Option<(Option<Ipv4Addr>, u32)>> {
        let routes = self.dump(RouteNetlinkMessage::GetRoute(v4_route()))?;
        Ok(routes.into_iter().find_map(|message| {
            let RouteNetlinkMessage::NewRoute(route) = message else { return None };
            if route.header.destination_prefix_length != 0 || route.header.kind != RouteType::Unicast {
                return None;
            }
            let (mut gateway, mut interface) = (None, None);
            for attribute in route.attributes {
                match attribute {
                    RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(address),
                    RouteAttribute::Oif(index) => interface = Some(index),
                    _ => {}
                }
            }
            Some((gateway, interface?))
        }))
    }
}

fn v4_route() -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route
}

/// `ip link add NAME type bridge`, up, with a hardware address of its own so that it does not follow its ports'.
pub(super) fn new_bridge(name: &str, mac: [u8; 6], mtu: Option<u32>) -> Request {
    let mut link = named(name, Some(mac));
    link.attributes.extend(mtu.map(LinkAttribute::Mtu));
    link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
    (RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

/// A pair of interfaces: `name` here, up, a port of the interface `bridge`; and `peer` in another namespace.
pub(super) fn new_pair(
    name: &str,
    bridge: u32,
    mtu: Option<u32>,
    peer: &str,
    peer_mac: [u8; 6],
    namespace: impl AsFd,
) -> Request {
    let mut other = LinkMessage::default();
    other.attributes = vec![
        LinkAttribute::IfName(peer.into()),
        LinkAttribute::Address(peer_mac.to_vec()),
        LinkAttribute::NetNsFd(namespace.as_fd().as_raw_fd()),
    ];
    other.attributes.extend(mtu.map(LinkAttribute::Mtu));
    let mut link = named(name, None);
    link.attributes.extend(mtu.map(LinkAttribute::Mtu));
    link.attributes.push(LinkAttribute::Controller(bridge));
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
    ]));
    (RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip link set NAME type bridge_slave hairpin on`: packets may leave by the port that they came in by.
pub(super) fn hairpin(name: &str) -> Request {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(name.into()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
        ]),
    ];
    (RouteNetlinkMessage::NewLink(link), 0)
}

fn named(name: &str, mac: Option<[u8; 6]>) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.push(LinkAttribute::IfName(name.into()));
    link.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    link
}

/// `ip link set … up`.
pub(super) fn up(index: u32) -> Request {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    (RouteNetlinkMessage::SetLink(link), 0)
}

/// `ip link set … mtu …`.
pub(super) fn mtu(index: u32, mtu: u32) -> Request {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes.push(LinkAttribute::Mtu(mtu));
    (RouteNetlinkMessage::SetLink(link), 0)
}

/// `ip route add ADDRESS dev … scope link src …`, or in the place of one that there is.
pub(super) fn way_to(address: Ipv4Addr, index: u32, as_whom: Ipv4Addr) -> Request {
    let mut route = v4_route();
    route.header.destination_prefix_length = 32;
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Boot;
    route.header.scope = RouteScope::Link;
    route.header.kind = RouteType::Unicast;
    route.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(address)),
        RouteAttribute::Oif(index),
        RouteAttribute::PrefSource(RouteAddress::Inet(as_whom)),
    ];
    (RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
}

/// `ip address add …`.
pub(super) fn new_address(index: u32, address: Ipv4Net) -> Request {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.addr().into()),
        AddressAttribute::Address(address.addr().into()),
        AddressAttribute::Broadcast(address.broadcast()),
    ];
    (RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip route add default via …`.
pub(super) fn default_via(gateway: Ipv4Addr) -> Request {
    let mut route = v4_route();
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Boot;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    route.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway))];
    (RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_EXCL)
}
