//! Another stack is shown in a view while its processes go on.
//!
//! The keeper's child does it, and ends:
//! 1. It starts a server, if one is needed, outside of the view's namespaces.
//! 2. It joins the view, and makes a further mount namespace, a copy of the view's, in which nobody sees what it does. There it
//!    mounts everything as it is to be.
//! 3. Back in the view's namespace it puts that beneath what is mounted there (Linux 6.5), which it then detaches: at any moment
//!    there is either the old view or the new one.
//!
//! Files that are open stay open: they are those of the old file system, which goes with the last of them, and what is
//! written to one is in the scratch, which both have. Each has a work directory of its own, so that neither sweeps what the
//! other is making. A process whose working directory is in the view is in the old one until it enters the directory again;
//! what it would change there is refused from then on, where nothing is open for writing. A server finds files by their names in
//! the scratch: of one that was reset while it was open, it reads and writes the bytes, but may have lost the attributes.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use kiln_contract::{BackendError, ErrorKind, ViewBackend as _, ViewRequest};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};

use super::enter::{Serving, mount_flags};
use super::{How, Result, ViewRecord, Views, binds, keeper};
use crate::Overlay;

/// Shows `new` where `old` is shown. `watch` will tell of the end of what is mounted.
pub(super) fn remount(
    views: &Views,
    old: &ViewRecord,
    new: &ViewRecord,
    how: How,
    watch: &OwnedFd,
) -> Result<()> {
    let failed =
        |error: io::Error| BackendError::caused(format!("cannot change the view `{}`", old.name), error);
    let (mut said, say) = io::pipe().map_err(failed)?;
    // SAFETY: the keeper has one thread, so that the child may do everything; it does not return from here.
    match unsafe { fork() }.map_err(|error| failed(error.into()))? {
        ForkResult::Child => {
            let done = std::panic::catch_unwind(|| match how {
                How::Anew => show(views, old, new, watch),
                How::Flags => views.join(old).and_then(|()| set_flags(new)),
            });
            let done = done
                .unwrap_or_else(|_| Err(BackendError::new(ErrorKind::Failed, "the remount has panicked")));
            if let Err(error) = &done {
                let hint = error.hint_text().unwrap_or_default();
                let _ = (&say).write_all(format!("{}\0{hint}", error.with_causes()).as_bytes());
            }
            // SAFETY: ends the child without running what its parents have registered for their own end.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        ForkResult::Parent { child } => {
            drop(say);
            let mut text = String::new();
            // A server that the child has started holds nothing of the pipe: it ends with the child.
            let read = said.read_to_string(&mut text);
            let ended = waitpid(child, None).map_err(io::Error::from);
            read.and(ended).map_err(failed).and_then(|status| match (status, text.split_once('\0')) {
                (nix::sys::wait::WaitStatus::Exited(_, 0), _) => Ok(()),
                (_, Some((what, ""))) => Err(BackendError::new(ErrorKind::State, what)),
                (_, Some((what, hint))) => Err(BackendError::new(ErrorKind::State, what).hint(hint)),
                _ => Err(failed(io::Error::other("the process that was to do it was ended"))),
            })
        }
    }
}

fn show(views: &Views, old: &ViewRecord, new: &ViewRecord, watch: &OwnedFd) -> Result<()> {
    let failed = |error: io::Error| {
        BackendError::caused(format!("cannot show another stack at {}", new.at.display()), error)
    };
    let inside = views.inside(old)?;
    inside.enter_user().map_err(failed)?;
    let Serving { tree, objects, scratch, server, below_overlay } = views.serve(new, true)?;
    inside.enter_mounts().map_err(failed)?;
    let theirs = File::open("/proc/self/ns/mnt").map_err(failed)?;
    let prepare = || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        Ok(())
    };
    prepare().map_err(failed)?;
    let held = binds::hold(&new.binds)?;
    let target = new.at.clone();
    match (below_overlay, server) {
        (false, Some(server)) => server.mount(&target)?.leave(),
        (_, server) => {
            let overlay = server.map_or_else(Overlay::new, Overlay::on);
            overlay.mount(&ViewRequest { tree, objects, target, scratch })?;
            overlay.leave();
        }
    }
    set_flags(new)?;
    held.attach(&new.at)?;
    let swap = || -> io::Result<()> {
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let mounted = open_tree(CWD, &new.at, flags)?;
        setns(&theirs, CloneFlags::CLONE_NEWNS)?;
        swap(&mounted, &new.at)?;
        keeper::add_watch(watch, &new.at)
    };
    swap().map_err(failed)
}

/// Puts a mount where another one is, which is detached.
fn swap(mount: &OwnedFd, at: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let beneath = move_mount(mount, "", CWD, at, flags | MoveMountFlags::MOVE_MOUNT_BENEATH);
    // Who is in the old one should not believe that his changes are seen. Refused where something is open for writing.
    let _ = mount_remount(at, mount_flags() | MountFlags::RDONLY, c"");
    unmount(at, UnmountFlags::DETACH)?;
    match beneath {
        Ok(()) => Ok(()),
        Err(_) => Ok(move_mount(mount, "", CWD, at, flags)?),
    }
}

/// Lets what is mounted be written to, or not.
fn set_flags(record: &ViewRecord) -> Result<()> {
    let frozen = if record.frozen { MountFlags::RDONLY } else { MountFlags::empty() };
    mount_remount(&record.at, mount_flags() | frozen, c"").map_err(|error| {
        let at = record.at.display();
        match error {
            rustix::io::Errno::BUSY => {
                BackendError::new(ErrorKind::State, format!("files at {at} are open for writing"))
                    .hint("end what writes to them first")
            }
            error => BackendError::caused(format!("cannot change the mount at {at}"), io::Error::from(error)),
        }
    })
}
