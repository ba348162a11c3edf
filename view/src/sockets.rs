//! Unix sockets: short names for them, and descriptors over them.

use std::io::{self, IoSliceMut};
#[cfg(target_os = "linux")]
use std::os::fd::BorrowedFd;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// A directory under a name that is short enough for a socket's address, which has room for 107 bytes (unix(7)). The name is good
/// for as long as this is there.
pub(crate) struct ShortPath {
    path: PathBuf,
    #[cfg(target_os = "linux")]
    _directory: std::os::fd::OwnedFd,
}

impl ShortPath {
    #[cfg(target_os = "linux")]
    pub(crate) fn of(directory: &Path) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(directory, flags, Mode::empty())?;
        Ok(Self { path: format!("/proc/self/fd/{}", opened.as_raw_fd()).into(), _directory: opened })
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn of(directory: &Path) -> io::Result<Self> {
        Ok(Self { path: directory.to_owned() })
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// Sends a descriptor. A byte goes with it, since it cannot go alone.
#[cfg(target_os = "linux")]
pub(crate) fn send(socket: &impl AsRawFd, descriptor: BorrowedFd<'_>) -> nix::Result<()> {
    use nix::sys::socket::{ControlMessage, sendmsg};

    let rights = [descriptor.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&rights)];
    let byte = [std::io::IoSlice::new(&[0])];
    sendmsg::<()>(socket.as_raw_fd(), &byte, &rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// The next byte, and the descriptor that came with it; `None` if the socket was closed instead.
pub(crate) fn receive(socket: &impl AsRawFd) -> nix::Result<Option<Option<OwnedFd>>> {
    // Where the kernel does not close it for what is executed, it is said afterwards.
    #[cfg(target_os = "linux")]
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let flags = MsgFlags::empty();
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(descriptor) = descriptors.first()
        {
            // SAFETY: the kernel made this descriptor for us just now.
            let descriptor = unsafe { OwnedFd::from_raw_fd(*descriptor) };
            #[cfg(not(target_os = "linux"))]
            nix::fcntl::fcntl(&descriptor, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
            return Ok(Some(Some(descriptor)));
        }
    }
    Ok((message.bytes > 0).then_some(None))
}
