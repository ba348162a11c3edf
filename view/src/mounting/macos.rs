//! macOS: macFUSE, whose helper mounts for everybody.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_contract::{BackendError, ErrorKind};

use super::{Kind, Mounting, cannot_mount, cannot_unmount, through_helper};

/// Where macFUSE, from version 4 on, has its helper.
const HELPER: &str = "/Library/Filesystems/macfuse.fs/Contents/Resources/mount_macfuse";

/// This system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

impl Mounting for Host {
    fn attach(&self, target: &Path, kind: Kind) -> Result<OwnedFd, BackendError> {
        let daemon = std::env::current_exe().map_err(|error| cannot_mount(target, error))?;
        let mut helper = Command::new(HELPER);
        helper.args(["-o", &options(kind)]).arg(target).stdin(Stdio::null()).stdout(Stdio::null());
        // It may only be executed by a library, it says; the second version of the protocol sends the device before it
        // mounts.
        helper.env("_FUSE_CALL_BY_LIB", "1").env("_FUSE_DAEMON_PATH", daemon).env("_FUSE_COMMVERS", "2");
        through_helper(target, &mut helper, |helper| {
            let mut child = helper.spawn().map_err(|error| {
                let missing = error.kind() == io::ErrorKind::NotFound;
                let error = BackendError::caused(format!("cannot run {HELPER}"), error);
                if missing {
                    error
                        .of_kind(ErrorKind::Unsupported)
                        .hint("install macFUSE, and allow its system extension")
                } else {
                    error
                }
            })?;
            // It ends when the first requests were answered, which is for the caller to do.
            std::thread::spawn(move || child.wait());
            Ok(())
        })
    }

    fn detach(&self, target: &Path) -> Result<(), BackendError> {
        match nix::mount::unmount(target, nix::mount::MntFlags::MNT_FORCE) {
            Ok(()) => Ok(()),
            Err(error) => Err(cannot_unmount(target, error.into())),
        }
    }
}

/// What is mounted shows no files of Finder's own, and is no volume of its own on the desktop.
fn options(kind: Kind) -> String {
    let more = match kind {
        Kind::View { read_only: true } => ",rdonly",
        Kind::View { read_only: false } => "",
        Kind::Shared => ",nosuid,nodev",
    };
    format!("default_permissions,noappledouble,nobrowse,fsname={}{more}", kind.source())
}
