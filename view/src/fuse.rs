//! Trees served over FUSE, for processes to which the kernel does not mount them.
//!
//! How a tree is mounted:
//! 1. The tree's file is mapped and its superblock read; what is wrong with it is told now.
//! 2. `/dev/fuse` is opened and mounted at the target: by mount(2) where this process may (as root, or as the root of
//!    the user namespace that [`crate::userns::enter`] made), by `fusermount3` otherwise.
//! 3. A child is forked that serves, and the caller's ends of everything are closed. Until the child is ready, requests
//!    wait in the kernel.
//!
//! The server is a process and not a thread, so that the caller keeps one thread only and may fork and enter
//! namespaces. It leaves the caller's session, so that a terminal's signals pass it by, holds no files but its own, and is
//! killed by the kernel when the thread that mounted ends.
//!
//! A node's id is its inode number in the tree (and 1 for the root, as FUSE wants it). So nothing is counted or
//! remembered between requests, FORGET means nothing, and start-up costs nothing however large the tree is. Nothing in a
//! tree ever changes: the kernel is told to keep names, attributes, listings, symlinks and data for ever.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_contract::BackendError;
use kiln_erofs::Image;
use memmap2::Mmap;
use nix::unistd::{ForkResult, fork, getpid};
use rustix::fs::{Mode, OFlags};
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions};

mod attach;
mod objects;
mod server;

/// A tree that is served. Dropping it ends the server, after which whatever is left of the mount answers every request
/// with «Transport endpoint is not connected».
#[derive(Debug)]
#[must_use = "the server ends when this is dropped"]
pub struct Mounted {
    target: PathBuf,
    /// The server. Not a pid: others in this process may wait for any child and so let the number be used again.
    server: OwnedFd,
}

/// Mounts a tree read-only at a directory and serves it until the [`Mounted`] goes, or the calling thread ends.
///
/// Everybody in the caller's user namespace may use it, as modes and owners permit (except where `fusermount3` had to
/// mount it: then only the calling user).
///
/// It forks. The process should have one thread only: the child of one with several must hope that none of the others
/// held a lock that it needs (those of the C library are taken care of).
///
/// # Errors
/// The tree cannot be read or is none, the objects' directory cannot be opened, or the kernel or `fusermount3` refuse.
pub fn mount(tree: &Path, objects: &Path, target: &Path) -> Result<Mounted, BackendError> {
    let cannot = |what: &str, path: &Path, why: std::io::Error| {
        BackendError::caused(format!("cannot {what} {}", path.display()), why)
    };
    let file = File::open(tree).map_err(|error| cannot("open the tree", tree, error))?;
    // SAFETY: trees are immutable once they are in the store. Whoever truncates one all the same ends the server.
    let mapping = unsafe { Mmap::map(&file) }.map_err(|error| cannot("map the tree", tree, error))?;
    Image::open(&mapping).and_then(|image| image.root()).map_err(|error| {
        BackendError::caused(format!("cannot read the tree {}", tree.display()), error)
            .hint("`kiln system check --repair` finds and repairs what is damaged in the store")
    })?;
    let objects_at =
        rustix::fs::open(objects, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| cannot("open the objects in", objects, error.into()))?;
    let device = attach::attach(target)?;
    let parent = getpid();
    // SAFETY: the child allocates, which the C library permits after fork, and never returns from `serve`.
    let forked = unsafe { fork() };
    match forked {
        Ok(ForkResult::Child) => {
            let served = std::panic::catch_unwind(|| {
                prepare_child(parent, &[device.as_fd(), objects_at.as_fd()]);
                server::serve(Box::leak(Box::new(mapping)), objects_at, device, objects)
            });
            // SAFETY: ends the child without running what the parent has registered for its own end.
            unsafe { libc::_exit(i32::from(!matches!(served, Ok(Ok(()))))) }
        }
        Ok(ForkResult::Parent { child }) => {
            let pid = rustix::process::Pid::from_raw(child.as_raw()).expect("a child has a pid");
            match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
                Ok(server) => Ok(Mounted { target: target.to_owned(), server }),
                Err(error) => {
                    let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
                    let _ = nix::sys::wait::waitpid(child, None);
                    let _ = attach::detach(target);
                    Err(cannot("watch the server of", target, error.into()))
                }
            }
        }
        Err(error) => {
            let _ = attach::detach(target);
            Err(cannot("start a server for", target, error.into()))
        }
    }
}

impl Mounted {
    /// Takes the mount away and ends the server. Not for a target over which something else was mounted since: for that,
    /// take the other mount away, and drop this.
    ///
    /// # Errors
    /// Nothing is mounted there, or it may not be taken away. The server ends all the same.
    pub fn unmount(self) -> Result<(), BackendError> {
        attach::detach(&self.target)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Neither can fail in a way that matters: if it is gone already, it has been reaped by somebody else.
        let _ = rustix::process::pidfd_send_signal(&self.server, Signal::KILL);
        let _ = rustix::process::waitid(WaitId::PidFd(self.server.as_fd()), WaitIdOptions::EXITED);
    }
}

/// Makes a forked copy of the caller into a process of its own.
fn prepare_child(parent: nix::unistd::Pid, keep: &[BorrowedFd<'_>]) {
    // A server must not outlive whom it serves. The signal is for the death of the parent from now on: if that was
    // before, this process has another parent already.
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    if nix::unistd::getppid() != parent {
        // SAFETY: as in `mount`.
        unsafe { libc::_exit(1) }
    }
    let _ = nix::unistd::setsid();
    let _ = nix::unistd::chdir("/");
    let _ = nix::sys::prctl::set_name(c"kiln-view");
    close_all_but(keep);
    // Every file that the container has open is one here.
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

/// Leaves standard error and what is named open, and makes the other two standard streams empty ones: somebody may be
/// waiting for the end of a pipe or the freeing of a lock that the caller holds.
fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut keep: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > from {
            // SAFETY: in this process nothing will use the descriptors that its parent knows.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        for standard in [0, 1] {
            // SAFETY: the number is that of a standard stream, which is replaced whole; nothing owns it.
            let mut stream = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(standard) });
            let _ = rustix::io::dup2(&null, &mut stream);
        }
    }
}
