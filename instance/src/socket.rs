//! Unix sockets, in what systems differ about them.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{SendFlags, SocketAddrUnix};

#[cfg(target_os = "linux")]
use linux as platform;
#[cfg(target_os = "macos")]
use macos as platform;

/// A stream socket that a program which is executed does not inherit.
pub(crate) fn new(nonblocking: bool) -> io::Result<OwnedFd> {
    platform::new(nonblocking)
}

/// Two that are connected.
///
/// # Errors
/// If there can be no more descriptors.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    platform::pair()
}

/// A connection, non-blocking.
pub(crate) fn accept(listener: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    platform::accept(listener)
}

/// The user at the other end.
///
/// # Errors
/// If it is not connected, or no Unix socket.
pub fn peer(socket: &impl AsFd) -> io::Result<u32> {
    platform::peer(socket.as_fd())
}

/// Sends, without a signal if the other end is gone. `wait`: until there is room.
pub(crate) fn send(socket: &OwnedFd, bytes: &[u8], wait: bool) -> rustix::io::Result<usize> {
    let flags = if wait { SendFlags::empty() } else { SendFlags::DONTWAIT };
    rustix::net::send(socket, bytes, flags | platform::NO_SIGNAL)
}

/// Uses the address of the socket at `path`. A socket's address has room for some 100 bytes, and a home may be deeper than that.
///
/// # Errors
/// Those of `use_address`; the directory is not there.
pub(crate) fn at_short_path<T>(
    path: &Path,
    use_address: impl FnOnce(&SocketAddrUnix) -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    shortened(path, |short| use_address(&SocketAddrUnix::new(short)?))
}

/// Uses another path of the socket at `path`, short enough for a socket's address and good only meanwhile.
///
/// # Errors
/// Those of `use_path`; the directory is not there.
pub fn with_short_path<T>(path: &Path, use_path: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    shortened(path, |short| Ok(use_path(short)))?
}

fn shortened<T>(path: &Path, use_path: impl FnOnce(&Path) -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::INVAL) };
    platform::at_short_path(directory, |short| use_path(&short.join(name)))
}
