//! Network devices: made of an open `/dev/net/tun`; and one of the machine's own, given its address, hardware address and routes.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;

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
    let index = index(name).map_err(doing("looking for"))?;
    let mut netlink = Netlink::open().map_err(doing("opening a socket for"))?;
    // Its routes go with that.
    netlink.down(index).map_err(doing("putting down"))?;
    netlink.forget_addresses(index).map_err(doing("taking the addresses of"))?;
    netlink.up(index, config.mac, config.mtu).map_err(doing("putting up"))?;
    netlink.address(index, config.address.into(), 32).map_err(doing("giving an address to"))?;
    netlink.route(index, Some(config.gateway), None).map_err(doing("making the way to the gateway over"))?;
    netlink.route(index, None, Some(config.gateway.into())).map_err(doing("making the default route over"))
}

/// Makes an open `/dev/net/tun` a TAP device of this name in the network namespace of the calling thread, each packet behind a
/// `struct virtio_net_hdr`. The device goes when nobody has it open.
///
/// # Errors
/// What the kernel says (`CAP_NET_ADMIN` is needed).
pub fn become_tap(file: &File, name: &str) -> io::Result<()> {
    attach(file, name, libc::IFF_TAP)
}

/// Makes an open `/dev/net/tun` the device of this name: `IFF_TAP` or `IFF_TUN`.
pub(super) fn attach(file: &File, name: &str, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: `ifreq` is a structure of integers and arrays, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (kind | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads an `ifreq` and writes the device's name into it; ours lives until after the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The index of a device of the calling thread's network namespace.
pub(super) fn index(name: &str) -> io::Result<u32> {
    let any = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(&any, name)?)
}
