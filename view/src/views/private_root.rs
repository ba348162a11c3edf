//! A root directory with one more name, for one process tree.
//!
//! A view is to be seen at `/kiln`, which an ordinary user cannot make. But in a mount namespace of his own he can have
//! another root: an empty file system in memory, in which everything that `/` has is bound to its name, and the missing
//! directory is made.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_remount, move_mount, open_tree, unmount,
};

/// The name that `/` would need for `path` to be made, if that is all that is missing.
pub(super) fn missing_name(path: &Path) -> Option<&OsStr> {
    let mut parts = path.components();
    match (parts.next()?, parts.next()?) {
        (Component::RootDir, Component::Normal(name))
            if fs::symlink_metadata(Path::new("/").join(name)).is_err() =>
        {
            Some(name)
        }
        _ => None,
    }
}

/// Gives this process, in its own mount namespace, a root that also has `path`. `meanwhile` is a directory on which
/// nothing is mounted.
pub(super) fn enter(path: &Path, meanwhile: &Path) -> io::Result<()> {
    let working = std::env::current_dir()?;
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "mode", "0755")?;
    fsconfig_create(context.as_fd())?;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(&root, "", CWD, meanwhile, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    for entry in fs::read_dir("/")? {
        let entry = entry?;
        let (name, file_type) = (entry.file_name(), entry.file_type()?);
        let here = Path::new("/").join(&name);
        if file_type.is_symlink() {
            rustix::fs::symlinkat(fs::read_link(&here)?, &root, &name)?;
            continue;
        }
        if file_type.is_dir() {
            rustix::fs::mkdirat(&root, &name, Mode::from_raw_mode(0o755))?;
        } else {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&root, &name, flags, Mode::RUSR)?;
        }
        bind(&here, &root, &name)?;
    }
    let below = path.strip_prefix("/").unwrap_or(path);
    fs::create_dir_all(meanwhile.join(below))?;
    rustix::process::chdir(meanwhile)?;
    // The old root lies over the new one for a moment, and is taken away from there (pivot_root(2), «pivot_root(".", ".")»).
    rustix::process::pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    // What was bound had the new root in it.
    unmount(meanwhile, UnmountFlags::DETACH)?;
    // Whose the file system is may write to it; the host's root he may not.
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, c"")?;
    // It has the same name as before.
    std::env::set_current_dir(working)
}

/// Shows something of the host, with all that is mounted in it, under a name of the new root.
fn bind(what: &Path, root: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, what, flags)?;
    Ok(move_mount(&tree, "", root, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_name_of_the_root_itself_can_be_added() {
        let none = "kiln-test-no-such-directory";
        assert_eq!(missing_name(Path::new("/kiln-test-no-such-directory")), Some(OsStr::new(none)));
        assert_eq!(missing_name(Path::new("/kiln-test-no-such-directory/x")), Some(OsStr::new(none)));
        for path in ["/", "/etc", "/etc/kiln-test-no-such-directory", "etc"] {
            assert_eq!(missing_name(Path::new(path)), None, "{path}");
        }
    }
}
