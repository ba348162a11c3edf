//! How a file system in user space is mounted: the one part of serving it that is another on each system.
//!
//! On both, a set-uid helper does it for ordinary users, and sends the device over a socket of which it is told in
//! `_FUSE_COMMFD`: fusermount3(1) on Linux, where root does without it, and `mount_macfuse` on macOS.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use kiln_contract::{BackendError, ErrorKind};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::sockets;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

#[cfg(target_os = "linux")]
pub use self::linux::{Host, LARGEST_REQUEST};
#[cfg(target_os = "macos")]
pub use self::macos::Host;

/// By which the mounts of routers are known in the table of mounts.
pub const SHARED_SOURCE: &str = "kiln-router";

/// What is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The mount of one view; `read_only`: nothing in it can be changed.
    View {
        /// Whether the kernel refuses every change.
        read_only: bool,
    },
    /// The mount of a router. Everybody sees it, so that it makes nobody somebody else and opens no device of the host.
    Shared,
}

impl Kind {
    /// What the table of mounts says that it is.
    fn source(self) -> &'static str {
        match self {
            Self::View { .. } => "kiln",
            Self::Shared => SHARED_SOURCE,
        }
    }
}

/// A system's way to mount.
pub trait Mounting {
    /// Mounts a new connection, over which no requests were answered yet. The kernel checks modes and owners.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where FUSE or its helper is not installed; or the directory is none that may be
    /// mounted on.
    fn attach(&self, target: &Path, kind: Kind) -> Result<OwnedFd, BackendError>;

    /// Takes a mount away, by the way that is open to this process. Who has files of it open keeps them.
    ///
    /// # Errors
    /// Nothing is mounted there, or it is not this user's.
    fn detach(&self, target: &Path) -> Result<(), BackendError>;

    /// Has the kernel read ahead by whole requests instead of parts of them, where this process may
    /// decide that. Only for a mount that somebody serves: the kernel learns what it is from the first answer.
    fn read_far_ahead(&self, _target: &Path) {}
}

fn cannot_mount(target: &Path, why: io::Error) -> BackendError {
    BackendError::caused(format!("cannot mount a tree over FUSE at {}", target.display()), why)
}

fn cannot_unmount(target: &Path, why: io::Error) -> BackendError {
    BackendError::caused(format!("cannot unmount the tree at {}", target.display()), why)
}

/// Has a helper send the device. `run` gets it with the socket in its environment, starts it, and says what went wrong
/// if it ended without having sent anything.
fn through_helper(
    target: &Path,
    helper: &mut Command,
    run: impl FnOnce(&mut Command) -> Result<(), BackendError>,
) -> Result<OwnedFd, BackendError> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| cannot_mount(target, error))?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|error| cannot_mount(target, error.into()))?;
    run(helper.env("_FUSE_COMMFD", theirs.as_raw_fd().to_string()))?;
    drop(theirs);
    let received = sockets::receive(&ours).map_err(|error| cannot_mount(target, error.into()))?;
    received.flatten().ok_or_else(|| {
        let helper = helper.get_program().to_string_lossy();
        let what =
            format!("cannot mount a tree over FUSE at {}: {helper} sent no descriptor", target.display());
        BackendError::new(ErrorKind::Failed, what)
    })
}
