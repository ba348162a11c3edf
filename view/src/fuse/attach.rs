//! `/dev/fuse`, mounted.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_contract::{BackendError, ErrorKind};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{getegid, geteuid};
use rustix::mount::{UnmountFlags, unmount};

use crate::{sockets, userns};

/// What `fusermount3` looks for to know where to send the device.
const SOCKET_VARIABLE: &str = "_FUSE_COMMFD";

/// By which the mounts of routers are known in the table of mounts.
pub(crate) const SHARED_SOURCE: &str = "kiln-router";

/// Mounts a new FUSE connection, over which no requests were answered yet.
pub(super) fn attach(target: &Path, read_only: bool) -> Result<OwnedFd, BackendError> {
    let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    attach_as(target, "kiln", flags)
}

/// The same, for the mount of a router: everybody sees it, so that it makes nobody somebody else and opens no device of the
/// host.
pub(super) fn attach_shared(target: &Path) -> Result<OwnedFd, BackendError> {
    attach_as(target, SHARED_SOURCE, MsFlags::MS_NOSUID | MsFlags::MS_NODEV)
}

fn attach_as(target: &Path, source: &str, flags: MsFlags) -> Result<OwnedFd, BackendError> {
    let read_only = flags.contains(MsFlags::MS_RDONLY);
    let cannot = |why: std::io::Error| {
        BackendError::caused(format!("cannot mount a tree over FUSE at {}", target.display()), why)
    };
    let device = match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(device) => device,
        // The set-uid helper may open it where this user may not; in a user namespace it is no set-uid program.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied && !userns::entered() => {
            return through_fusermount(target, source, read_only);
        }
        Err(error) => {
            return Err(BackendError::caused("cannot open /dev/fuse", error)
                .of_kind(ErrorKind::Unsupported)
                .hint("the kernel module `fuse` must be loaded, and /dev/fuse have the mode 0666"));
        }
    };
    // The kernel checks modes and owners itself, so that no request is needed for it.
    let options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions",
        device.as_raw_fd(),
        geteuid(),
        getegid()
    );
    match mount(Some(source), target, Some("fuse.kiln"), flags, Some(options.as_str())) {
        Ok(()) => Ok(device.into()),
        Err(nix::errno::Errno::EPERM) => through_fusermount(target, source, read_only),
        Err(error) => Err(cannot(error.into())),
    }
}

/// Takes a mount away, by the way that is open to this process.
pub(crate) fn detach(target: &Path) -> Result<(), BackendError> {
    let cannot = |why: std::io::Error| {
        BackendError::caused(format!("cannot unmount the tree at {}", target.display()), why)
    };
    match unmount(target, UnmountFlags::DETACH) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::PERM) => {
            let status = Command::new("fusermount3").args(["-u", "-z", "-q", "--"]).arg(target).status();
            match status.map_err(cannot)? {
                status if status.success() => Ok(()),
                status => Err(cannot(std::io::Error::other(format!("fusermount3: {status}")))),
            }
        }
        Err(error) => Err(cannot(error.into())),
    }
}

/// The set-uid helper opens the device, mounts it, and sends it over a socket (fusermount3(1)).
fn through_fusermount(target: &Path, source: &str, read_only: bool) -> Result<OwnedFd, BackendError> {
    let what = || format!("cannot mount a tree over FUSE at {}", target.display());
    let failed = |error: nix::errno::Errno| BackendError::caused(what(), error);
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).map_err(failed)?;
    let theirs_number = inheritable(&theirs).map_err(failed)?;
    let options = format!("default_permissions,fsname={source},subtype=kiln");
    let output = Command::new("fusermount3")
        .arg("-o")
        .arg(if read_only { format!("ro,{options}") } else { options })
        .arg("--")
        .arg(target)
        .env(SOCKET_VARIABLE, OsString::from(theirs_number.to_string()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .map_err(|error| {
            BackendError::caused(format!("{}: cannot run fusermount3", what()), error)
                .of_kind(ErrorKind::Unsupported)
                .hint("install the package `fuse3`")
        })?;
    drop(theirs);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(BackendError::new(ErrorKind::Failed, format!("{}: {said}", what())));
    }
    sockets::receive(&ours).map_err(failed)?.flatten().ok_or_else(|| {
        BackendError::new(ErrorKind::Failed, format!("{}: fusermount3 sent no descriptor", what()))
    })
}

/// Lets children have a descriptor.
fn inheritable(fd: &OwnedFd) -> nix::Result<RawFd> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    Ok(fd.as_raw_fd())
}
