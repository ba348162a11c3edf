//! The machine's network: a TUN device, whose flows become streams to the host; and a network device, if it has one.

use std::io;
use std::sync::Arc;

use kiln_link::{Opener, Stream, message};
use kiln_usernet::guest::{DeviceConfig, Tun, run, set_up};
use tokio::sync::watch;

use crate::failure::{Doing as _, Failure, say};

/// Opens streams of one life.
#[derive(Debug)]
pub(crate) struct Life(Opener);

impl kiln_usernet::Open for Life {
    type Stream = Stream;

    async fn open(&self, service: u16) -> io::Result<Stream> {
        self.0.open(service).await.map_err(io::Error::other)
    }
}

/// A device that is up.
#[derive(Debug)]
pub(crate) struct Network(watch::Sender<Arc<Life>>);

impl Network {
    /// Carries what goes through the device.
    pub(crate) fn start(tun: Tun, opener: &Opener) -> Self {
        let (lives, watched) = watch::channel(Arc::new(Life(opener.clone())));
        tokio::spawn(async move {
            if let Err(error) = run(tun, watched).await {
                say(format_args!("the network has ended: {error}"));
            }
        });
        Self(lives)
    }

    /// Goes on with another life. Connections of the one before are reset.
    pub(crate) fn go_on(&self, opener: &Opener) {
        self.0.send_replace(Arc::new(Life(opener.clone())));
    }
}

/// The name of a device that the machine has.
const DEVICE: &str = "eth0";

/// Becomes somebody on the machine's network device.
pub(crate) fn assume(device: &message::Device) -> Result<(), Failure> {
    let message::Device { mac, address, gateway, mtu } = *device;
    let config =
        DeviceConfig { name: DEVICE.to_owned(), mac, address: address.into(), gateway: gateway.into(), mtu };
    set_up(&config).doing("use the network device")
}

/// `127.0.0.1` and `::1` work in every machine.
pub(crate) fn bring_up_loopback() -> Result<(), Failure> {
    use std::os::fd::AsRawFd as _;
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .doing("make a socket")?;
    // SAFETY: all zeros is a value of this type.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads the name and the flags, both of which are set.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(crate::failure::failed("bring up loopback", std::io::Error::last_os_error()));
    }
    Ok(())
}
