//! The few messages of rtnetlink(7) that give a device its addresses and routes. Written by hand: the crates for it
//! would be larger than all else in the guest's half.
//!
//! A message is a header of 16 bytes (length, kind, flags, sequence, port), a fixed part, and attributes (length, kind, value),
//! everything in the host's byte order and aligned to 4 bytes.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

use super::TunConfig;
use super::config::GuestError;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const REQUEST_AND_ACK: u16 = 1 | 4;
const REPLACE_OR_CREATE: u16 = 0x100 | 0x400;
const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFLA_TXQLEN: u16 = 13;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// No duplicate address detection: nobody else is there.
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
/// More addresses than a device has, so that taking them comes to an end.
const MANY: usize = 1024;
/// Packets that may wait for this stack. The usual 500 are few where a thousand connections begin at once.
const QUEUE: u32 = 4096;

/// Gives the device with this index its MTU, addresses and routes, and puts it up.
pub(super) fn configure(index: u32, config: &TunConfig) -> Result<(), GuestError> {
    let name = &config.name;
    let mut netlink =
        Netlink::open().map_err(GuestError::doing("opening a socket to the kernel's network"))?;
    // Without an address of its own making it looks for no router. A kernel without IPv6 refuses, and does not either.
    let mode = nested(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
    let mut quiet = Message::new(RTM_NEWLINK, 0);
    quiet.bytes(&[0, 0, 0, 0]).word(index).word(0).word(0);
    quiet.attribute(IFLA_AF_SPEC, &nested(AF_INET6.into(), &mode));
    if let Err(error) = netlink.request(quiet) {
        tracing::debug!(%error, "the guest's device may look for routers");
    }
    let mut link = Message::new(RTM_NEWLINK, 0);
    link.bytes(&[0, 0, 0, 0]).word(index).word(IFF_UP).word(IFF_UP);
    link.attribute(IFLA_MTU, &u32::from(config.mtu).to_ne_bytes());
    link.attribute(IFLA_TXQLEN, &QUEUE.to_ne_bytes());
    netlink.request(link).map_err(GuestError::doing(format!("putting {name} up (MTU {})", config.mtu)))?;
    if let Some(v4) = config.ipv4 {
        netlink.add(index, name, v4.address.into(), v4.prefix, v4.gateway.into())?;
    }
    if let Some(v6) = config.ipv6
        && let Err(error) = netlink.add(index, name, v6.address.into(), v6.prefix, v6.gateway.into())
    {
        // A kernel without it, or one that was told to do without (`ipv6.disable`, `disable_ipv6`).
        tracing::warn!(%error, "the guest has no IPv6");
    }
    Ok(())
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An attribute, as what another one holds.
fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut inner = Message(Vec::new());
    inner.attribute(kind, value);
    inner.0
}

struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut message = Self(vec![0; 4]);
        message.bytes(&kind.to_ne_bytes()).bytes(&(flags | REQUEST_AND_ACK).to_ne_bytes()).word(1).word(0);
        message
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn word(&mut self, word: u32) -> &mut Self {
        self.bytes(&word.to_ne_bytes())
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // Values are addresses, numbers and attributes of such: some 20 bytes at most.
        let length = 4 + value.len() as u16;
        self.bytes(&length.to_ne_bytes()).bytes(&kind.to_ne_bytes()).bytes(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

pub(super) struct Netlink(OwnedFd);

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        // No protocol is NETLINK_ROUTE, whose number is 0.
        Ok(Self(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?))
    }

    /// An address, and the default route by way of a gateway.
    fn add(
        &mut self,
        index: u32,
        name: &str,
        address: IpAddr,
        prefix: u8,
        gateway: IpAddr,
    ) -> Result<(), GuestError> {
        self.address(index, address, prefix)
            .map_err(GuestError::doing(format!("giving {name} the address {address}/{prefix}")))?;
        self.route(index, None, Some(gateway))
            .map_err(GuestError::doing(format!("making {gateway} the gateway of the default route")))
    }

    pub(super) fn address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWADDR, REPLACE_OR_CREATE);
        message.bytes(&[family(address), prefix, IFA_F_NODAD, 0]).word(index);
        message.attribute(IFA_LOCAL, &octets(address)).attribute(IFA_ADDRESS, &octets(address));
        self.request(message)
    }

    /// A route to one address or to all, over a device, by way of a gateway or none; in the place of one that there is.
    pub(super) fn route(
        &mut self,
        index: u32,
        to: Option<Ipv4Addr>,
        gateway: Option<IpAddr>,
    ) -> io::Result<()> {
        let family = gateway.map_or(AF_INET, family);
        let bits = if to.is_some() { 32 } else { 0 };
        let scope = if gateway.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
        let mut message = Message::new(RTM_NEWROUTE, REPLACE_OR_CREATE);
        message.bytes(&[family, bits, 0, 0]).bytes(&[RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST]).word(0);
        if let Some(to) = to {
            message.attribute(RTA_DST, &to.octets());
        }
        message.attribute(RTA_OIF, &index.to_ne_bytes());
        if let Some(gateway) = gateway {
            message.attribute(RTA_GATEWAY, &octets(gateway));
        }
        self.request(message)
    }

    pub(super) fn down(&mut self, index: u32) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWLINK, 0);
        message.bytes(&[0, 0, 0, 0]).word(index).word(0).word(IFF_UP);
        self.request(message)
    }

    pub(super) fn up(&mut self, index: u32, mac: [u8; 6], mtu: u32) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWLINK, 0);
        message.bytes(&[0, 0, 0, 0]).word(index).word(IFF_UP).word(IFF_UP);
        message.attribute(IFLA_ADDRESS, &mac).attribute(IFLA_MTU, &mtu.to_ne_bytes());
        self.request(message)
    }

    /// Takes all addresses of IPv4.
    pub(super) fn forget_addresses(&mut self, index: u32) -> io::Result<()> {
        for _ in 0..MANY {
            // One that names no address is about the first.
            let mut message = Message::new(RTM_DELADDR, 0);
            message.bytes(&[AF_INET, 0, 0, 0]).word(index);
            match self.request(message) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::StorageFull.into())
    }

    /// Sends one request and waits until the kernel has carried it out.
    fn request(&mut self, message: Message) -> io::Result<()> {
        let mut bytes = message.0;
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        send(&self.0, &bytes, SendFlags::empty())?;
        let mut answer = [0; 4096];
        let (length, _) = rustix::io::retry_on_intr(|| recv(&self.0, &mut answer, RecvFlags::empty()))?;
        // An acknowledgement is an error of number 0, behind the header.
        let answer = &answer[..length];
        let (Some(kind), Some(code)) = (answer.get(4..6), answer.get(16..20)) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
        match (u16::from_ne_bytes([kind[0], kind[1]]), code) {
            (NLMSG_ERROR, 0) => Ok(()),
            (NLMSG_ERROR, code) => Err(io::Error::from_raw_os_error(-code)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
