//! Sockets that get their flags after birth, and directories by a link in the user's own directory for temporary files.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SendFlags, SocketType, acceptfrom, socket, socketpair, sockopt};

use crate::streams::set_nonblocking;

/// Sockets are told for good.
pub(super) const NO_SIGNAL: SendFlags = SendFlags::empty();

fn prepared(socket: OwnedFd) -> io::Result<OwnedFd> {
    fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
    sockopt::set_socket_nosigpipe(&socket, true)?;
    Ok(socket)
}

pub(super) fn new(nonblocking: bool) -> io::Result<OwnedFd> {
    let socket = prepared(socket(AddressFamily::UNIX, SocketType::STREAM, None)?)?;
    if nonblocking {
        set_nonblocking(&socket)?;
    }
    Ok(socket)
}

pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::SocketFlags;
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)?;
    Ok((prepared(one)?, prepared(other)?))
}

pub(super) fn accept(listener: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let (socket, _) = acceptfrom(listener)?;
    let ready = prepared(socket).and_then(|socket| set_nonblocking(&socket).map(|()| socket));
    ready.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::CONNABORTED))
}

pub(super) fn peer(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let (mut user, mut group) = (0, 0);
    // SAFETY: both pointers lead to numbers that are written.
    match unsafe { libc::getpeereid(socket.as_raw_fd(), &raw mut user, &raw mut group) } {
        0 => Ok(user),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(super) fn at_short_path<T>(
    directory: &Path,
    use_path: impl FnOnce(&Path) -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let link = std::env::temp_dir().join(format!("kiln-{}-{number}", std::process::id()));
    // What a process of the same number left.
    let _ = std::fs::remove_file(&link);
    symlink(directory, &link).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NOENT))?;
    let used = use_path(&link);
    let _ = std::fs::remove_file(&link);
    used
}
