//! A network device of the machine's own: given its address, hardware address and routes.

use std::io;
use std::net::Ipv4Addr;

use super::config::GuestError;
use super::netlink::Netlink;

/// How a device is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its name in the machine.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its only address, without a subnet: whoever else there is, is behind the gateway.
    pub address: Ipv4Addr,
    /// The router, on the same link. The default route of IPv4 leads there, in the place of any other.
    pub gateway: Ipv4Addr,
    /// The longest packet, in bytes.
    pub mtu: u32,
}

/// Makes a device of the calling thread's network namespace be so, whatever it was before: addresses that it had are gone.
///
/// # Errors
/// There is none of that name; what the kernel says to the rest (`CAP_NET_ADMIN` is needed).
pub fn set_up(config: &DeviceConfig) -> Result<(), GuestError> {
    let name = &config.name;
    let doing = |what: &str| GuestError::doing(format!("{what} {name}"));
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)
        .map_err(|error| doing("looking for")(io::Error::from(error)))?;
    let index = rustix::net::netdevice::name_to_index(&socket, name)
        .map_err(|error| doing("looking for")(io::Error::from(error)))?;
    let mut netlink = Netlink::open().map_err(doing("opening a socket for"))?;
    // Its routes go with that.
    netlink.down(index).map_err(doing("putting down"))?;
    netlink.forget_addresses(index).map_err(doing("taking the addresses of"))?;
    netlink.up(index, config.mac, config.mtu).map_err(doing("putting up"))?;
    netlink.address(index, config.address.into(), 32).map_err(doing("giving an address to"))?;
    netlink.route(index, Some(config.gateway), None).map_err(doing("making the way to the gateway over"))?;
    netlink.route(index, None, Some(config.gateway.into())).map_err(doing("making the default route over"))
}
