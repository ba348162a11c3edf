//! The TUN device: packets between the kernel and this process.
//!
//! Each packet has a header before it (`struct virtio_net_hdr`, 10 bytes) that says what was left undone: the checksum of
//! TCP or UDP, and cutting a long segment into short ones.
//!
//! ```text
//!  | flags u8 | GSO kind u8 | length of headers u16 | segment size u16 | checksum from u16 | its place u16 |
//! ```

use std::ffi::c_ulong;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

use super::TunConfig;
use super::config::GuestError;
use super::{device, netlink};

/// The header before each packet.
const HEADER: usize = 10;
/// A segment as long as IPv4 can say, and the header.
const LARGEST: usize = HEADER + 65_535;
const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const TUN_F_CSUM: c_ulong = 1;
const TUN_F_TSO4: c_ulong = 2;
const TUN_F_TSO6: c_ulong = 4;
const TUN_F_TSO_ECN: c_ulong = 8;

/// A TUN device, gone when this is dropped.
#[derive(Debug)]
pub struct Tun {
    file: File,
    config: TunConfig,
    /// Where packets are made, behind a place for their header.
    making: Mutex<Vec<u8>>,
}

/// What is left for the kernel to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Undone {
    /// Where the TCP or UDP header begins and where in it the checksum is. The place holds the sum of the pseudo header.
    pub(super) checksum: Option<(u16, u16)>,
    /// Bytes of payload in each segment, for TCP, and the length of all headers.
    pub(super) segments: Option<(u16, u16)>,
}

impl Tun {
    /// Makes the device in the network namespace of the calling thread, with its addresses, its routes, and up.
    ///
    /// # Errors
    /// [`GuestError::NoTun`] where the kernel has none, and what it says to the rest (`CAP_NET_ADMIN` is needed).
    pub fn create(config: &TunConfig) -> Result<Self, GuestError> {
        config.check()?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(GuestError::NoTun)?;
        let doing = || GuestError::doing(format!("making the device {}", config.name));
        let index = attach(&file, &config.name).map_err(doing())?;
        netlink::configure(index, config)?;
        Ok(Self { file, config: config.clone(), making: Mutex::default() })
    }

    /// As it was created.
    pub fn config(&self) -> &TunConfig {
        &self.config
    }

    /// Takes a packet that the kernel has sent. `buffer` should have [`Self::room`].
    pub(super) fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let length = (&self.file).read(buffer)?;
        // Checksums that are missing and segments that are long are no different from others to a receiver.
        Ok(buffer.get(HEADER..length).unwrap_or_default())
    }

    pub(super) fn room() -> Vec<u8> {
        vec![0; LARGEST]
    }

    /// Gives the kernel a packet of `length` bytes, which `fill` writes and says what of it is left undone.
    ///
    /// A packet that cannot be sent is lost, as on any network.
    pub(super) fn send<T>(&self, length: usize, fill: impl FnOnce(&mut [u8]) -> (T, Undone)) -> T {
        let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if making.len() < HEADER + length {
            making.resize(HEADER + length, 0);
        }
        let (header, packet) = making.split_at_mut(HEADER);
        let packet = &mut packet[..length];
        let (result, undone) = fill(packet);
        header.copy_from_slice(&undone.header(packet));
        if let Err(error) = (&self.file).write(&making[..HEADER + length]) {
            tracing::debug!(%error, length, "a packet was lost");
        }
        result
    }
}

impl Undone {
    fn header(&self, packet: &[u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        if let Some((from, place)) = self.checksum {
            header[0] = NEEDS_CHECKSUM;
            header[6..8].copy_from_slice(&from.to_ne_bytes());
            header[8..10].copy_from_slice(&place.to_ne_bytes());
        }
        if let Some((size, headers)) = self.segments {
            let ipv4 = packet.first().is_some_and(|first| first >> 4 == 4);
            header[1] = if ipv4 { GSO_TCP4 } else { GSO_TCP6 };
            header[2..4].copy_from_slice(&headers.to_ne_bytes());
            header[4..6].copy_from_slice(&size.to_ne_bytes());
        }
        header
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tun {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

/// Makes an open `/dev/net/tun` the TUN device of this name; its index.
fn attach(file: &File, name: &str) -> io::Result<u32> {
    device::attach(file, name, libc::IFF_TUN)?;
    let offload = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    // SAFETY: TUNSETOFFLOAD takes its flags by value and touches no memory of ours.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, offload) } < 0 {
        return Err(io::Error::last_os_error());
    }
    device::index(name)
}
