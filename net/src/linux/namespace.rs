//! Doing something inside another network namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::NetError;

/// A network namespace, kept alive by being open.
#[derive(Debug)]
pub(super) struct Namespace(OwnedFd);

impl Namespace {
    pub(super) fn open(path: &Path) -> Result<Self, NetError> {
        let file = File::open(path)
            .map_err(NetError::doing(format!("opening the network namespace {}", path.display())))?;
        Ok(Self(file.into()))
    }

    /// A new one, in which nothing is up. It goes when nobody has it open.
    pub(super) fn fresh() -> Result<Self, NetError> {
        let made = thread::scope(|scope| {
            let inside = thread::Builder::new().stack_size(128 << 10).spawn_scoped(
                scope,
                || -> io::Result<OwnedFd> {
                    // SAFETY: only this thread moves, and only its network namespace: nothing of it is shared less.
                    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
                    Ok(File::open("/proc/thread-self/ns/net")?.into())
                },
            );
            inside?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        made.map(Self).map_err(NetError::doing("making a network namespace"))
    }

    /// Runs `work` inside. Namespaces belong to threads: a short-lived one goes in, and never comes back, so that
    /// the caller cannot be left in the wrong place by a failure. Sockets made inside stay inside.
    pub(super) fn enter<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, NetError> + Send,
    ) -> Result<T, NetError> {
        thread::scope(|scope| {
            let inside = thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, || {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(NetError::doing("entering the container's network namespace"))?;
                work()
            });
            inside
                .map_err(NetError::doing("starting a thread"))?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether this process may change the network namespace that it is in: it is in the user namespace that owns it,
/// and has `CAP_NET_ADMIN` there. Root inside an unprivileged user's own user namespace may not.
pub(crate) fn may_configure() -> bool {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    let owned = || -> io::Result<bool> {
        use std::os::fd::{AsRawFd, FromRawFd};
        let network = File::open("/proc/thread-self/ns/net")?;
        // SAFETY: NS_GET_USERNS takes no argument and gives a new descriptor or -1 (ioctl_nsfs(2)).
        let owner = unsafe { libc::ioctl(network.as_raw_fd(), NS_GET_USERNS) };
        if owner < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else knows of it.
        let owner = unsafe { OwnedFd::from_raw_fd(owner) };
        let own = File::open("/proc/self/ns/user")?;
        let (owner, own) = (rustix::fs::fstat(owner)?, rustix::fs::fstat(own)?);
        Ok((owner.st_dev, owner.st_ino) == (own.st_dev, own.st_ino))
    };
    let capable = || {
        rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::NET_ADMIN))
    };
    capable() && owned().unwrap_or(false)
}
