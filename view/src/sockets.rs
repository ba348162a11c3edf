//! Unix sockets: short names for them, and descriptors over them.

use std::io;
use std::path::{Path, PathBuf};

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
        use std::os::fd::AsRawFd as _;

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

#[cfg(target_os = "linux")]
pub(crate) use self::descriptors::{receive, send};

#[cfg(target_os = "linux")]
mod descriptors {
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

    use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

    /// Sends a descriptor. A byte goes with it, since it cannot go alone.
    pub(crate) fn send(socket: &impl AsRawFd, descriptor: BorrowedFd<'_>) -> nix::Result<()> {
        let rights = [descriptor.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)
            .map(drop)
    }

    /// The next byte, and the descriptor that came with it; `None` if the socket was closed instead.
    pub(crate) fn receive(socket: &impl AsRawFd) -> nix::Result<Option<Option<OwnedFd>>> {
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control
                && let Some(descriptor) = descriptors.first()
            {
                // SAFETY: the kernel made this descriptor for us just now.
                return Ok(Some(Some(unsafe { OwnedFd::from_raw_fd(*descriptor) })));
            }
        }
        Ok((message.bytes > 0).then_some(None))
    }
}
