//! Trees served over FUSE, for processes to which the kernel does not mount them.
//!
//! How a view is mounted:
//! 1. The tree's file is mapped and its superblock read, the scratch opened: what is wrong with them is told now.
//! 2. A child is forked that will serve ([`start`]). It leaves the caller's session, so that a terminal's signals pass it by,
//!    and holds no files but its own.
//! 3. `/dev/fuse` is opened and mounted at the target ([`Server::mount`]): by mount(2) where this process may (as root, or as
//!    the root of a user namespace), by `fusermount3` otherwise. Between the two steps the caller may move to a mount
//!    namespace of its own, so that the server does not keep that alive.
//! 4. The device is sent to the child. Until it answers, requests wait in the kernel.
//!
//! The server is a process and not a thread, so that the caller keeps one thread only and may fork and enter
//! namespaces. It ends with the last mount; one that [is bound](Served::bound) to its caller is killed by the kernel when
//! the thread that started it ends.
//!
//! Without a scratch, a node's id is its inode number in the tree (and 1 for the root, as FUSE wants it). So nothing is
//! counted or remembered between requests, FORGET means nothing, and start-up costs nothing however large the tree is.
//! Nothing in a tree ever changes: the kernel is told to keep names, attributes, listings, symlinks and data for ever.
//! With a scratch, only what is in that is remembered.

use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, Scratch};
use nix::unistd::{ForkResult, fork, getpid};
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions};

use crate::mounting::{Host, Kind, Mounting as _};
use crate::objects::{Fetcher, Objects};
use crate::sockets;

mod attributes;
mod edit;
mod fetches;
mod objects;
mod passed;
mod server;
pub(crate) mod shared;
pub(crate) mod space;
mod state;

/// Whose the files of a tree are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Owners {
    /// Whose the tree says.
    #[default]
    Kept,
    /// All are one user's, who has no other numbers to give.
    One {
        /// That user.
        uid: u32,
        /// That user's group.
        gid: u32,
    },
}

/// What is to be served, and how.
#[derive(Debug, Clone, Copy)]
pub struct Served<'a> {
    /// The merged tree, a metadata-only EROFS image.
    pub tree: &'a Path,
    /// The directory of objects.
    pub objects: &'a Path,
    /// Where changes go; read-only without.
    pub scratch: Option<&'a Scratch>,
    /// Whose its files are.
    pub owners: Owners,
    /// Whether an overlay is to be laid over it, which must not take xattrs of the tree for its own.
    pub below_overlay: bool,
    /// Whether the server is to end with the thread that starts it.
    pub bound: bool,
    /// Where it writes what it has to say; standard error otherwise.
    pub log: Option<&'a Path>,
    /// What brings objects that are missing. It is executed by the server, in the namespaces and the root that the caller
    /// of [`start`] has then.
    pub fetcher: Option<&'a Fetcher>,
}

/// A server that has nothing to serve yet. Dropping it ends it.
#[derive(Debug)]
#[must_use = "the server ends when this is dropped"]
pub struct Server {
    socket: UnixStream,
    process: Process,
    read_only: bool,
}

/// A tree that is served. Dropping it ends the server, after which whatever is left of the mount answers every request
/// with «Transport endpoint is not connected».
#[derive(Debug)]
#[must_use = "the server ends when this is dropped"]
pub struct Mounted {
    target: PathBuf,
    process: Process,
}

/// A server's process, killed when this is dropped. Not a pid: others in this process may wait for any child and so let
/// the number be used again.
#[derive(Debug)]
struct Process(Option<OwnedFd>);

/// Mounts a tree read-only at a directory, to have an overlay laid over it, and serves it until the [`Mounted`] goes, or
/// the calling thread ends.
///
/// # Errors
/// As [`start`] and [`Server::mount`].
pub fn mount(tree: &Path, objects: &Path, target: &Path) -> Result<Mounted, BackendError> {
    let owners = Owners::Kept;
    start(&Served {
        tree,
        objects,
        scratch: None,
        owners,
        below_overlay: true,
        bound: true,
        log: None,
        fetcher: None,
    })?
    .mount(target)
}

/// Starts a server.
///
/// It forks. The process should have one thread only: the child of one with several must hope that none of the others
/// held a lock that it needs (those of the C library are taken care of).
///
/// # Errors
/// The tree cannot be read or is none, the objects' directory or the scratch cannot be opened, or the scratch is in use or on
/// a file system that can hold none.
pub fn start(served: &Served<'_>) -> Result<Server, BackendError> {
    let Served { tree, objects, scratch, owners, below_overlay, bound, log, fetcher } = *served;
    let cannot = |what: &str, path: &Path, why: std::io::Error| {
        BackendError::caused(format!("cannot {what} {}", path.display()), why)
    };
    let mapping = crate::tree::map(tree)?;
    let objects = Objects::of(objects, fetcher.cloned())?;
    let trusted = crate::userns::is_root_of_host();
    let upper = scratch.map(|scratch| edit::Upper::open(scratch, trusted)).transpose()?;
    let log = log
        .map(|path| {
            let opened = File::options().create(true).append(true).open(path);
            opened.map_err(|error| cannot("open the log", path, error))
        })
        .transpose()?;
    let (socket, theirs) = UnixStream::pair().map_err(|error| cannot("start a server for", tree, error))?;
    let parent = getpid();
    // SAFETY: the child allocates, which the C library permits after fork, and never returns from `serve`.
    let forked = unsafe { fork() };
    match forked {
        Ok(ForkResult::Child) => {
            let served = std::panic::catch_unwind(|| {
                let mut keep = vec![theirs.as_fd(), objects.as_fd()];
                keep.extend(upper.iter().flat_map(edit::Upper::descriptors));
                if let Some(log) = log {
                    // Whoever reads the caller's standard error is not to wait for this process too.
                    rustix::stdio::dup2_stderr(log)?;
                }
                bind_to(bound.then_some(parent));
                leave_caller(c"kiln-view", &keep);
                let Some(device) = sockets::receive(&theirs)?.flatten() else { return Ok(()) };
                drop(theirs);
                let bytes = Box::leak(Box::new(mapping));
                match upper {
                    Some(upper) => server::serve_editable(bytes, objects, upper, owners, device),
                    None => server::serve(bytes, objects, owners, below_overlay, device),
                }
            });
            // SAFETY: ends the child without running what the parent has registered for its own end.
            unsafe { libc::_exit(i32::from(!matches!(served, Ok(Ok(()))))) }
        }
        Ok(ForkResult::Parent { child }) => {
            let pid = rustix::process::Pid::from_raw(child.as_raw()).ok_or(rustix::io::Errno::SRCH);
            match pid.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty())) {
                Ok(process) => {
                    Ok(Server { socket, process: Process(Some(process)), read_only: scratch.is_none() })
                }
                Err(error) => {
                    let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
                    let _ = nix::sys::wait::waitpid(child, None);
                    Err(cannot("watch the server of", tree, error.into()))
                }
            }
        }
        Err(error) => Err(cannot("start a server for", tree, error.into())),
    }
}

impl Server {
    /// Mounts at a directory what this server is to serve.
    ///
    /// Everybody in the caller's user namespace may use it, as modes and owners permit (except where `fusermount3` had to
    /// mount it: then only the calling user).
    ///
    /// # Errors
    /// The kernel or `fusermount3` refuse. The server ends.
    pub fn mount(self, target: &Path) -> Result<Mounted, BackendError> {
        let device = Host.attach(target, Kind::View { read_only: self.read_only })?;
        let sent = sockets::send(&self.socket, device.as_fd());
        // The server's end of the socket is closed when it has the device: from then on it alone holds that.
        let taken = sent.map_err(std::io::Error::from).and_then(|_| {
            drop(device);
            (&self.socket).read(&mut [0])
        });
        match taken {
            Ok(_) => {
                Host.read_far_ahead(target);
                Ok(Mounted { target: target.to_owned(), process: self.process })
            }
            Err(error) => {
                let _ = Host.detach(target);
                Err(BackendError::caused(format!("cannot serve the tree at {}", target.display()), error))
            }
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
        Host.detach(&self.target)
    }

    /// Leaves the server to itself: it ends with the last mount of what it serves.
    pub fn leave(mut self) {
        self.process.0 = None;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(process) = &self.0 else { return };
        // Neither can fail in a way that matters: if it is gone already, it has been reaped by somebody else.
        let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        let _ = rustix::process::waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED);
    }
}

/// Has the kernel end this process with the one that forked it, if that is named.
fn bind_to(parent: Option<nix::unistd::Pid>) {
    if let Some(parent) = parent {
        // The signal is for the death of the parent from now on: if that was before, this process has another parent
        // already.
        let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
        if nix::unistd::getppid() != parent {
            // SAFETY: as in `start`.
            unsafe { libc::_exit(1) }
        }
    }
}

/// Makes a forked copy of the caller into a process of its own.
pub(crate) fn leave_caller(name: &CStr, keep: &[BorrowedFd<'_>]) {
    let _ = nix::unistd::setsid();
    let _ = nix::unistd::chdir("/");
    let _ = nix::sys::prctl::set_name(name);
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
