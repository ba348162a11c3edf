//! Sockets with flags at birth, and directories by descriptor.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, acceptfrom_with, socket_with, socketpair,
};

pub(super) const NO_SIGNAL: SendFlags = SendFlags::NOSIGNAL;

pub(super) fn new(nonblocking: bool) -> io::Result<OwnedFd> {
    let waits = if nonblocking { SocketFlags::NONBLOCK } else { SocketFlags::empty() };
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | waits, None)?)
}

pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

pub(super) fn accept(listener: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map(|(socket, _)| socket)
}

pub(super) fn peer(socket: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.uid.as_raw())
}

pub(super) fn at_short_path<T>(
    directory: &Path,
    use_path: impl FnOnce(&Path) -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    let handle = open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    use_path(Path::new(&format!("/proc/self/fd/{}", handle.as_raw_fd())))
}
