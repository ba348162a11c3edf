//! Views that the router shows.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::ExitStatus;
use std::time::Duration;

use kiln_contract::{BackendError, ErrorKind};
use rustix::fs::FlockOperation;

use super::{Backend, Result, View, ViewRecord, Views, monitor};
use crate::Bind;
use crate::router::{self, Client};

/// How often, and how far apart, a lock is tried for.
const LOOKS: usize = 5;
const LOOK: Duration = Duration::from_millis(5);

/// Held by the service for as long as it shows a view.
#[derive(Debug)]
pub(crate) struct ServedLock(#[expect(dead_code, reason = "held, not used")] File);

/// Live layers are mounts over one view; the router has one mount for all.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if there are any.
pub(super) fn no_live_layers(binds: &[Bind]) -> Result<()> {
    if binds.is_empty() {
        return Ok(());
    }
    let what = "live layers are shown in mount namespaces only, which the router does without";
    Err(BackendError::new(ErrorKind::Unsupported, what).hint("use another --backend"))
}

impl Views {
    /// Takes a view to show it. Only the service does.
    ///
    /// # Errors
    /// Another service shows it.
    pub(crate) fn lock_served(&self, name: &str) -> Result<ServedLock> {
        let path = self.directory(name).join("served");
        let failed =
            |error: std::io::Error| BackendError::caused(format!("cannot lock {}", path.display()), error);
        let file = File::options().create(true).append(true).mode(0o600).open(&path).map_err(failed)?;
        // Whoever only looks whether it is shown has it for a moment.
        for _ in 0..LOOKS {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(ServedLock(file)),
                Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOOK),
                Err(error) => return Err(failed(error.into())),
            }
        }
        let what = format!("the view `{name}` is shown by another service");
        Err(BackendError::new(ErrorKind::State, what))
    }

    /// Removes a view that nobody has any more. Whoever has it does that himself.
    pub(crate) fn remove_unused(&self, name: &str) -> Result<()> {
        match self.lock(name)? {
            Some(_lock) => self.delete(name),
            None => Ok(()),
        }
    }

    /// The service that shows views of the router, started if none runs.
    ///
    /// # Errors
    /// It cannot be started, or does not answer.
    pub fn router(&self) -> Result<Client> {
        if let Some(client) = Client::connect(&self.home)? {
            return Ok(client);
        }
        self.in_no_view()?;
        router::connect_or_start(&self.home, self.launch)
    }

    /// What a view of the router needs before it is shown. Nobody sees it yet.
    pub(super) fn prepare_routed(&self, record: &mut ViewRecord) -> Result<()> {
        no_live_layers(&record.binds)?;
        let root = rustix::process::geteuid().is_root();
        if !super::enter::is_there(&record.at, root)? {
            let why = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(super::enter::cannot_show(&record.at, why).hint(
                "all processes see the same directory, so that it must be there: name one of yours with --at",
            ));
        }
        // A mount is known by one path.
        record.at =
            fs::canonicalize(&record.at).map_err(|error| super::enter::cannot_show(&record.at, error))?;
        if !root {
            record.owner = Some((rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw()));
        }
        self.write(record)
    }

    /// Runs a command in a view in which somebody is, and waits for its end. This process must have one thread only.
    ///
    /// # Errors
    /// As [`Views::join`] and [`View::run`].
    pub fn join_and_run(&self, record: &ViewRecord, command: &[String]) -> Result<ExitStatus> {
        if record.backend != Backend::Router {
            self.join(record)?;
            return super::run(command, &record.name);
        }
        if record.shown_to.as_ref().is_none_or(|shown_to| shown_to.living().next().is_none()) {
            return Err(super::enter::nobody_in(&record.name));
        }
        let show = |pid| self.show(&record.name, &record.at, pid);
        monitor::run(command, &record.name, show).map(|ended| ended.status)
    }
}

impl View {
    /// Makes a view of the router ready for [`View::run`], and the service that shows it.
    pub(super) fn enter_routed(&mut self) -> Result<()> {
        self.views.prepare_routed(&mut self.record)?;
        self.views.router().map(drop)
    }

    /// Runs a command in a view of the router.
    pub(super) fn run_routed(&self, command: &[String]) -> Result<ExitStatus> {
        let show = |pid| self.views.show(&self.record.name, &self.record.at, pid);
        let ended = monitor::run(command, &self.record.name, show)?;
        self.others.set(ended.others);
        Ok(ended.status)
    }

    /// Leaves a view of the router. Returns whether somebody is in it: then it goes with the last one.
    pub(super) fn leave_routed(self) -> Result<bool> {
        if self.others.get() {
            return Ok(true);
        }
        if let Some(mut client) = Client::connect(&self.views.home)? {
            match client.unmount_view(&self.record.name) {
                // The service was quicker, or it was never shown.
                Err(error) if error.kind() == ErrorKind::State => {}
                other => {
                    other?;
                }
            }
        }
        if self.record.keep {
            // It may have been changed meanwhile.
            let mut record = self.views.find(&self.record.name)?;
            record.shown_to = None;
            self.views.write(&record)?;
        } else {
            self.views.delete(&self.record.name)?;
        }
        Ok(false)
    }

    /// Shows a view of the router to a process that is there already, and to all that descend from it. It goes when they
    /// have ended, unless it is to be kept.
    ///
    /// # Errors
    /// There is no such process, or it has a view at this path; or the view cannot be mounted.
    pub fn show_to(mut self, pid: u32) -> Result<()> {
        if self.record.backend != Backend::Router {
            let what = "only the router shows a view to a process that is there already";
            return Err(BackendError::new(ErrorKind::Invalid, what));
        }
        let shown = self
            .views
            .prepare_routed(&mut self.record)
            .and_then(|()| self.views.show(&self.record.name, &self.record.at, pid));
        if shown.is_err() && !self.record.keep {
            self.views.delete(&self.record.name)?;
        }
        shown
    }
}
