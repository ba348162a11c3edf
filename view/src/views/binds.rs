//! Live layers: what of the host's is shown in a view.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, ErrorKind};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::Result;
use crate::Bind;

/// Files and directories of the host, each a mount of its own that is nowhere yet: what the view hides can be shown in it.
#[derive(Debug)]
pub(super) struct Held {
    mounts: Vec<(OwnedFd, PathBuf)>,
}

/// Takes hold of what is to be shown. Needs a mount namespace of this process's own.
pub(super) fn hold(binds: &[Bind]) -> Result<Held> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let mut mounts = Vec::with_capacity(binds.len());
    for Bind { source, dest } in binds {
        let mount = open_tree(CWD, source, flags).map_err(|error| {
            BackendError::caused(
                format!("cannot show {} in a view", source.display()),
                io::Error::from(error),
            )
        })?;
        mounts.push((mount, dest.clone()));
    }
    Ok(Held { mounts })
}

impl Held {
    /// Puts everything to its place below the view at `at`. Links in the view are followed, within it.
    pub(super) fn attach(self, at: &Path) -> Result<()> {
        for (mount, dest) in self.mounts {
            attach(&mount, &dest, at).map_err(|error| {
                let what = format!("cannot show something of the host's at {}", at.join(&dest).display());
                BackendError::caused(what, error)
                    .hint("a directory can be shown over a directory only, and a file over a file")
            })?;
        }
        Ok(())
    }
}

fn attach(mount: &OwnedFd, dest: &Path, at: &Path) -> io::Result<()> {
    let view = rustix::fs::open(at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let place = openat2(&view, dest, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), inside)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", &place, "", flags)?)
}

/// What a view without a mount namespace of its own says.
pub(super) fn need_namespace() -> BackendError {
    BackendError::new(
        ErrorKind::Unsupported,
        "live layers are shown in mount namespaces only, which this host forbids",
    )
    .hint("see `kiln system doctor`")
}
