//! A process moves into a view.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};

use kiln_contract::{BackendError, ErrorKind, Scratch, ViewBackend as _, ViewRequest};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigHandler, Signal};
use rustix::mount::{MountFlags, MountPropagationFlags, mount_change, mount_remount};

use super::binds::{self, Held};
use super::keeper::Keeper;
use super::{
    Backend, Result, ViewRecord, Views, boot, namespace_now, namespace_of, private_root, processes_in,
};
use crate::fuse::{self, Owners, Served};
use crate::{Overlay, userns};

/// The variable that names the view to what runs in it.
pub const VARIABLE: &str = "KILN_VIEW";

/// A view that this process has made or taken.
#[derive(Debug)]
pub struct View {
    pub(super) views: Views,
    pub(super) record: ViewRecord,
    /// Held as long as this process is its owner, and by the keeper.
    lock: File,
    keeper: Option<Keeper>,
    server: Option<fuse::Mounted>,
    overlay: Option<Overlay>,
    /// Of a view of the router: whether what was run in it has left something there.
    pub(super) others: Cell<bool>,
}

impl View {
    pub(super) fn new(views: Views, record: ViewRecord, lock: File) -> Self {
        Self { views, record, lock, keeper: None, server: None, overlay: None, others: Cell::new(false) }
    }

    /// What is remembered of it.
    pub fn record(&self) -> &ViewRecord {
        &self.record
    }

    /// Whether, once it was [entered](View::enter), all processes of this user see it: the host forbids user namespaces.
    pub fn is_seen_by_others(&self) -> bool {
        self.record.backend != Backend::Router && self.record.namespace.is_none()
    }

    /// Moves this process, which must have one thread only, to where the view is seen, and mounts it there. The router
    /// shows a view to what [`View::run`] runs, and not to this process.
    ///
    /// # Errors
    /// The directory for it is missing, the store's trees cannot be read, or the host forbids namespaces or mounts.
    pub fn enter(&mut self) -> Result<()> {
        if self.record.backend == Backend::Router {
            return self.enter_routed();
        }
        let target = self.record.at.clone();
        let missing = !is_there(&target, rustix::process::geteuid().is_root())?;
        let mut private = true;
        // Before this process is in any namespace: the keeper is to be in none.
        self.keeper = Some(Keeper::start(&self.views, &self.record.name, &self.lock)?);
        if !rustix::process::geteuid().is_root() {
            let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
            match userns::enter_as_self() {
                // The set-uid helper of FUSE mounts it where all of this user's processes see it.
                Err(error)
                    if error.kind() == ErrorKind::Unsupported && self.record.backend == Backend::Fuse =>
                {
                    tracing::info!(%error, "the view is seen by all processes of this user");
                    private = false;
                }
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    return Err(error.hint(
                        "`--backend fuse` shows a view without one; `kiln system doctor` tells why there is none",
                    ));
                }
                other => other?,
            }
            self.record.owner = Some((uid, gid));
        }
        // Before this process leaves its mount namespace: the server must not be what keeps the new one.
        let Serving { tree, objects, scratch, server, below_overlay } =
            self.views.serve(&self.record, private)?;
        if private {
            private_mounts()?;
        }
        let held = self.hold(private)?;
        if missing {
            let added = if private { self.views.add_to_root(&self.record) } else { Ok(false) };
            if !added? {
                let why = io::Error::from(io::ErrorKind::NotFound);
                return Err(cannot_show(&target, why).hint("name a directory of yours with --at"));
            }
        }
        match (below_overlay, server) {
            (false, Some(server)) => self.server = Some(server.mount(&target)?),
            (_, server) => {
                let overlay = server.map_or_else(Overlay::new, Overlay::on);
                overlay.mount(&ViewRequest { tree, objects, target, scratch })?;
                self.overlay = Some(overlay);
            }
        }
        if private {
            // An image shows files; it makes nobody somebody else, and opens no device of the host.
            let frozen = if self.record.frozen { MountFlags::RDONLY } else { MountFlags::empty() };
            mount_remount(&self.record.at, mount_flags() | frozen, c"")
                .map_err(|error| cannot_show(&self.record.at, error.into()))?;
        }
        if let Some(held) = held {
            held.attach(&self.record.at)?;
        }
        self.record.namespace = namespace_of(Path::new("/proc/self")).filter(|_| private);
        self.record.boot = boot();
        self.views.write(&self.record)?;
        if let Some(keeper) = self.keeper.as_ref().filter(|_| private)
            && let Err(error) = keeper.watch(&self.record.at)
        {
            tracing::warn!(%error, "the view's end will not be noticed: `kiln fs runtimes prune` removes what is left");
        }
        Ok(())
    }

    /// What of the host's will be shown in the view.
    fn hold(&self, private: bool) -> Result<Option<Held>> {
        match (self.record.binds.as_slice(), private) {
            ([], _) => Ok(None),
            (_, false) => Err(binds::need_namespace()),
            (binds, true) => binds::hold(binds).map(Some),
        }
    }

    /// Runs a command in the view and waits for its end ([`run`]).
    ///
    /// # Errors
    /// [`ErrorKind::CommandNotFound`], [`ErrorKind::CommandNotExecutable`], or it cannot be waited for.
    pub fn run(&self, command: &[String]) -> Result<ExitStatus> {
        match self.record.backend {
            Backend::Router => self.run_routed(command),
            _ => run(command, &self.record.name),
        }
    }

    /// Leaves the view: it is taken away with what was changed in it, unless it is to be kept, or somebody is in it still.
    /// Returns whether somebody is.
    ///
    /// # Errors
    /// Something of it cannot be removed.
    pub fn leave(mut self) -> Result<bool> {
        if self.record.backend == Backend::Router {
            return self.leave_routed();
        }
        // It may have been changed meanwhile.
        let record = self.views.find(&self.record.name)?;
        let others = record.namespace.is_some_and(|namespace| processes_in(namespace).next().is_some());
        if others {
            if let Some(server) = self.server.take() {
                server.leave();
            }
            if let Some(overlay) = self.overlay.take() {
                overlay.leave();
            }
            return Ok(true);
        }
        if let Some(overlay) = self.overlay.take() {
            overlay.unmount(&record.at)?;
        }
        if let Some(server) = self.server.take() {
            server.unmount()?;
        }
        self.views.end(record)?;
        if let Some(keeper) = self.keeper.take() {
            keeper.dismiss();
        }
        // The keeper's end takes its time, and its lock is this one.
        let _ = rustix::fs::flock(&self.lock, rustix::fs::FlockOperation::Unlock);
        Ok(false)
    }
}

/// How everything is mounted: an image shows files; it makes nobody somebody else, and opens no device of the host.
pub(super) fn mount_flags() -> MountFlags {
    MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV
}

/// What is to be mounted, and the server of it, if it has one.
pub(super) struct Serving {
    pub(super) tree: PathBuf,
    pub(super) objects: PathBuf,
    pub(super) scratch: Option<Scratch>,
    pub(super) server: Option<fuse::Server>,
    /// Whether an overlay is to be laid over what the server serves, or the kernel mounts.
    pub(super) below_overlay: bool,
}

/// The namespaces of a view.
pub(super) struct Inside {
    /// If it is another one than this process's.
    user: Option<OwnedFd>,
    mount: OwnedFd,
}

impl Inside {
    /// Moves this process, which must have one thread only, to the user namespace.
    pub(super) fn enter_user(&self) -> io::Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        Ok(setns(user, CloneFlags::CLONE_NEWUSER)?)
    }

    /// Then to the mount namespace.
    pub(super) fn enter_mounts(&self) -> io::Result<()> {
        let working = std::env::current_dir().ok();
        setns(&self.mount, CloneFlags::CLONE_NEWNS)?;
        // Moving leaves the working directory behind; in the view it may be another one.
        let _ = working.map(std::env::set_current_dir);
        Ok(())
    }
}

impl Views {
    /// Gives this process a root in which the directory of a view is. `false` if more than a name of the root is missing.
    fn add_to_root(&self, record: &ViewRecord) -> Result<bool> {
        if private_root::missing_name(&record.at).is_none() {
            return Ok(false);
        }
        let meanwhile = self.directory(&record.name).join("root");
        let entered = match fs::create_dir(&meanwhile) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => private_root::enter(&record.at, &meanwhile),
        };
        entered.map(|()| true).map_err(|error| cannot_show(&record.at, error))
    }

    /// Moves this process, which must have one thread only, into a view in which somebody is, if it is not in it yet.
    ///
    /// # Errors
    /// Nobody is in it, or its namespaces may not be entered.
    pub fn join(&self, record: &ViewRecord) -> Result<()> {
        let namespace = namespace_now(record);
        if namespace.is_some() && namespace == namespace_of(Path::new("/proc/self")) {
            return Ok(());
        }
        let inside = self.inside(record)?;
        inside
            .enter_user()
            .and_then(|()| inside.enter_mounts())
            .map_err(|error| BackendError::caused(format!("cannot join the view `{}`", record.name), error))
    }

    /// The namespaces of a view in which somebody is.
    pub(super) fn inside(&self, record: &ViewRecord) -> Result<Inside> {
        let nobody = || nobody_in(&record.name);
        let pid = namespace_now(record).and_then(|namespace| processes_in(namespace).next());
        let pid = pid.ok_or_else(nobody)?;
        let failed =
            |error: io::Error| BackendError::caused(format!("cannot join the view `{}`", record.name), error);
        let open = |kind: &str| -> Result<OwnedFd> {
            File::open(format!("/proc/{pid}/ns/{kind}")).map(OwnedFd::from).map_err(failed)
        };
        let number =
            |process: &str| fs::metadata(format!("/proc/{process}/ns/user")).map(|file| file.ino()).ok();
        let other_user = number("self") != number(&pid.to_string());
        let user = if other_user { Some(open("user")?) } else { None };
        Ok(Inside { user, mount: open("mnt")? })
    }

    /// Starts the server of a view, if it needs one, which is not yet to be mounted.
    pub(super) fn serve(&self, record: &ViewRecord, private: bool) -> Result<Serving> {
        let store = self.store()?;
        let (tree, objects) = (self.tree(&store, record)?, store.objects_dir());
        drop(store);
        let scratch = self.scratch(record);
        let owners = record.owner.map_or(Owners::Kept, |(uid, gid)| Owners::One { uid, gid });
        // An overlay of one lower layer and nothing else is not an overlay for the kernel.
        let below_overlay =
            record.backend == Backend::Overlay && (scratch.is_some() || userns::is_root_of_host());
        let server = if below_overlay && userns::is_root_of_host() {
            None
        } else {
            let log = self.log(&record.name);
            let served = Served {
                tree: &tree,
                objects: &objects,
                scratch: scratch.as_ref().filter(|_| !below_overlay),
                owners,
                below_overlay,
                bound: !private,
                log: Some(&log),
                fetcher: self.fetcher.as_ref(),
            };
            Some(fuse::start(&served)?)
        };
        Ok(Serving { tree, objects, scratch, server, below_overlay })
    }
}

/// Runs a command and waits for its end; `view` is named to it.
///
/// What a terminal sends (SIGINT, SIGQUIT) the command gets itself; SIGTERM and SIGHUP are passed on to it. To be called by
/// one thread at a time.
///
/// # Errors
/// As [`View::run`].
pub fn run(command: &[String], view: &str) -> Result<ExitStatus> {
    run_and_wait(command, view, Child::wait)
}

/// The same, waiting in another way.
pub(super) fn run_and_wait(
    command: &[String],
    view: &str,
    wait: impl FnOnce(&mut Child) -> io::Result<ExitStatus>,
) -> Result<ExitStatus> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(BackendError::new(ErrorKind::Invalid, "there is no command to run"));
    };
    let passed_on = PassedOn::to(0);
    let mut child = Command::new(program);
    child.args(arguments).env(VARIABLE, OsStr::new(view));
    let for_child = passed_on.before.clone();
    // SAFETY: between fork and exec only sigaction(2) is called.
    unsafe {
        child.pre_exec(move || {
            for (signal, handler) in &for_child {
                nix::sys::signal::signal(*signal, *handler)?;
            }
            Ok(())
        });
    }
    let mut child = child.spawn().map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::CommandNotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::CommandNotExecutable,
            _ => ErrorKind::Failed,
        };
        BackendError::caused(format!("cannot execute `{program}`"), error).of_kind(kind)
    })?;
    CHILD.store(child.id().cast_signed(), Ordering::Relaxed);
    wait(&mut child).map_err(|error| BackendError::caused(format!("cannot wait for `{program}`"), error))
}

/// Signals go to another process until this is dropped: those of a terminal that gets them itself are ignored, the others
/// are passed on.
pub(super) struct PassedOn {
    before: Vec<(Signal, SigHandler)>,
}

impl PassedOn {
    /// To a child; 0 is nobody yet.
    pub(super) fn to(child: i32) -> Self {
        CHILD.store(child, Ordering::Relaxed);
        let ignore = SigHandler::SigIgn;
        let pass_on = SigHandler::Handler(pass_on);
        let table = [
            (Signal::SIGINT, ignore),
            (Signal::SIGQUIT, ignore),
            (Signal::SIGTERM, pass_on),
            (Signal::SIGHUP, pass_on),
        ];
        let mut before = Vec::new();
        for (signal, handler) in table {
            // SAFETY: the handler does nothing but kill(2).
            let old = unsafe { nix::sys::signal::signal(signal, handler) };
            before.push((signal, old.unwrap_or(SigHandler::SigDfl)));
        }
        Self { before }
    }
}

impl Drop for PassedOn {
    fn drop(&mut self) {
        CHILD.store(0, Ordering::Relaxed);
        for (signal, handler) in &self.before {
            // SAFETY: what was there before.
            let _ = unsafe { nix::sys::signal::signal(*signal, *handler) };
        }
    }
}

/// The command that runs in the view, for [`pass_on`].
static CHILD: AtomicI32 = AtomicI32::new(0);

extern "C" fn pass_on(signal: libc::c_int) {
    let child = CHILD.load(Ordering::Relaxed);
    if child > 0 {
        // SAFETY: kill(2) may be called in a handler, and the child has not been waited for yet.
        unsafe { libc::kill(child, signal) };
    }
}

/// Whether the directory is there where the view is to be seen. Root makes it.
pub(super) fn is_there(at: &Path, may_make: bool) -> Result<bool> {
    match crate::router::stale::metadata(at) {
        Ok(metadata) if metadata.is_dir() => Ok(true),
        Ok(_) => Err(cannot_show(at, rustix::io::Errno::NOTDIR.into())),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(cannot_show(at, error)),
        Err(_) if may_make => match fs::create_dir_all(at) {
            Ok(()) => Ok(true),
            Err(error) => Err(cannot_show(at, error)),
        },
        Err(_) => Ok(false),
    }
}

pub(super) fn nobody_in(view: &str) -> BackendError {
    BackendError::new(ErrorKind::State, format!("nobody is in the view `{view}`"))
        .hint(format!("enter it again with: kiln fs run --rerun {view} -- COMMAND"))
}

pub(super) fn cannot_show(at: &Path, why: io::Error) -> BackendError {
    BackendError::caused(format!("cannot show a view at {}", at.display()), why)
}

/// Moves this process to a mount namespace of its own: what the host mounts later is seen in it, what is mounted in it
/// is not seen outside.
fn private_mounts() -> Result<()> {
    let made = unshare(CloneFlags::CLONE_NEWNS).map_err(io::Error::from).and_then(|()| {
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", flags).map_err(io::Error::from)
    });
    made.map_err(|error| BackendError::caused("cannot make a mount namespace for the view", error))
}
