//! A device of a machine's own, as who connects it and who uses it know it.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a machine's device is connected to, and who the machine is there.
#[derive(Debug, Clone)]
pub struct NetworkDevice {
    /// The host's end: an open TAP device, each packet behind a `struct virtio_net_hdr`.
    pub host: Arc<OwnedFd>,
    /// The hardware address.
    pub mac: [u8; 6],
    /// The only address that is let through.
    pub address: Ipv4Addr,
    /// Who has a way to everywhere else, on the same link though in no common subnet.
    pub gateway: Ipv4Addr,
    /// The longest packet, in bytes.
    pub mtu: u32,
}
