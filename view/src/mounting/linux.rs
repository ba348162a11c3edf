//! Linux: mount(2) on `/dev/fuse`, or fusermount3(1).

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_contract::{BackendError, ErrorKind};
use nix::mount::{MsFlags, mount};
use nix::unistd::{getegid, geteuid};
use rustix::mount::{UnmountFlags, unmount};

use super::{Kind, Mounting, cannot_mount, cannot_unmount, through_helper};
use crate::userns;

/// The most that one request reads or writes, in bytes: what the kernel allows by default (`fs.fuse.max_pages_limit`).
pub const LARGEST_REQUEST: u32 = 1 << 20;

/// This system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

impl Mounting for Host {
    fn attach(&self, target: &Path, kind: Kind) -> Result<OwnedFd, BackendError> {
        let flags = match kind {
            Kind::View { read_only: true } => MsFlags::MS_RDONLY,
            Kind::View { read_only: false } => MsFlags::empty(),
            Kind::Shared => MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        };
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            // The set-uid helper may open it where this user may not; in a user namespace it is no set-uid program.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !userns::entered() => {
                return through_fusermount(target, kind);
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
        match mount(Some(kind.source()), target, Some("fuse.kiln"), flags, Some(options.as_str())) {
            Ok(()) => Ok(device.into()),
            Err(nix::errno::Errno::EPERM) => through_fusermount(target, kind),
            Err(error) => Err(cannot_mount(target, error.into())),
        }
    }

    fn detach(&self, target: &Path) -> Result<(), BackendError> {
        match unmount(target, UnmountFlags::DETACH) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::PERM) => {
                let status = Command::new("fusermount3").args(["-u", "-z", "-q", "--"]).arg(target).status();
                match status.map_err(|error| cannot_unmount(target, error))? {
                    status if status.success() => Ok(()),
                    status => Err(cannot_unmount(target, io::Error::other(format!("fusermount3: {status}")))),
                }
            }
            Err(error) => Err(cannot_unmount(target, error.into())),
        }
    }

    /// A connection can ask for at most 128 KiB (`VM_READAHEAD_PAGES`); what root writes to the mount's backing device
    /// (`/sys/class/bdi`, sysfs-class-bdi in the kernel's documentation) may be more.
    fn read_far_ahead(&self, target: &Path) {
        if !userns::is_root_of_host() {
            return;
        }
        let set = || -> io::Result<()> {
            // The answer to this request comes after the one that the kernel takes the connection's limits from.
            let device = rustix::fs::stat(target)?.st_dev;
            let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
            let file = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
            File::options().write(true).open(file)?.write_all((LARGEST_REQUEST >> 10).to_string().as_bytes())
        };
        // It is read all the same, a little later.
        if let Err(error) = set() {
            tracing::debug!(%error, target = %target.display(), "the kernel reads ahead no further than it does by itself");
        }
    }
}

/// The helper opens the device, mounts it, and ends. What it mounts has neither set-user-ID programs nor devices.
fn through_fusermount(target: &Path, kind: Kind) -> Result<OwnedFd, BackendError> {
    let read_only = if kind == (Kind::View { read_only: true }) { "ro," } else { "" };
    let options = format!("{read_only}default_permissions,fsname={},subtype=kiln", kind.source());
    let mut helper = Command::new("fusermount3");
    helper.args(["-o", &options, "--"]).arg(target).stdin(Stdio::null()).stdout(Stdio::null());
    through_helper(target, &mut helper, |helper| {
        let output = helper.stderr(Stdio::piped()).output().map_err(|error| {
            let what =
                format!("cannot mount a tree over FUSE at {}: cannot run fusermount3", target.display());
            BackendError::caused(what, error)
                .of_kind(ErrorKind::Unsupported)
                .hint("install the package `fuse3`")
        })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let what = format!("cannot mount a tree over FUSE at {}: {said}", target.display());
        let error = BackendError::new(ErrorKind::Failed, what);
        // As fusermount3 says it of a directory that is somebody else's.
        Err(if said.contains("no write access to mountpoint") {
            error.hint("show it with `--at` at a directory of your own")
        } else {
            error
        })
    })
}
