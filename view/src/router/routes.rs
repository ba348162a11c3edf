//! What is shown where, and to whom.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_contract::{BackendError, ErrorKind};

use super::api::View;
use super::{Ancestry as _, Host, Process, Processes, stale};
use crate::fuse::Owners;
use crate::fuse::shared::{Callers, NewTree, SharedMount};
use crate::fuse::space::Share;
use crate::views::{Alteration, Backend, How, ServedLock, ShownTo, ViewRecord, Views};

type Result<T> = std::result::Result<T, BackendError>;

/// What was shown before stays for working directories in it, if there is no more of it than this; open files keep what is theirs.
const EARLIER_MOST: usize = 16;

/// All mounts of a service.
pub(super) struct Routes {
    views: Views,
    mounts: Mutex<BTreeMap<PathBuf, Route>>,
}

/// One mount.
struct Route {
    mount: SharedMount,
    processes: Arc<Processes<Host>>,
    shown: BTreeMap<String, Shown>,
}

/// One view.
struct Shown {
    share: Share,
    /// What was shown before, oldest first, for those who have something of it open.
    earlier: Vec<Share>,
    /// Held as long as it is shown.
    _lock: ServedLock,
}

impl Callers for Processes<Host> {
    fn tree_of(&self, pid: u32) -> Option<Share> {
        match self.view_of(pid) {
            Ok(view) => view.and_then(Share::of_number),
            Err(error) => {
                tracing::warn!(pid, %error, "a process is shown nothing");
                None
            }
        }
    }
}

/// Whether there is somebody left for whom a view must stay.
pub(super) enum Watched {
    /// Not before this one has ended.
    Until(Process),
    /// It is shown no more.
    Gone,
}

impl Routes {
    pub(super) fn new(views: Views) -> Self {
        Self { views, mounts: Mutex::default() }
    }

    fn mounts(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Route>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is shown.
    pub(super) fn is_empty(&self) -> bool {
        self.mounts().values().all(|route| route.shown.is_empty())
    }

    /// Shows again what the last service showed, to those who are left. Returns the names.
    pub(super) fn restore(&self) -> Result<Vec<String>> {
        let mut restored = Vec::new();
        for record in self.views.list()? {
            let Some(shown_to) = &record.shown_to else { continue };
            let living: Vec<Process> = shown_to.living().collect();
            if record.backend != Backend::Router || living.is_empty() {
                continue;
            }
            let mut mounts = self.mounts();
            let shown = living.iter().try_for_each(|process| self.show(&mut mounts, &record, process.pid));
            match shown.and_then(|()| self.record(&mounts, &record)) {
                Ok(()) => restored.push(record.name),
                Err(error) => tracing::error!(view = record.name, %error, "a view cannot be shown again"),
            }
        }
        Ok(restored)
    }

    /// Shows a recorded view to a process. `true` if it was not shown to anybody before.
    pub(super) fn mount(&self, name: &str, pid: u32) -> Result<bool> {
        let record = self.find(name)?;
        let mut mounts = self.mounts();
        let new = mounts.get(&record.at).is_none_or(|route| !route.shown.contains_key(name));
        self.show(&mut mounts, &record, pid)?;
        self.record(&mounts, &record)?;
        Ok(new)
    }

    fn find(&self, name: &str) -> Result<ViewRecord> {
        let record = self.views.find(name)?;
        if record.backend != Backend::Router {
            let what = format!("the view `{name}` is not one of the router's");
            return Err(BackendError::new(ErrorKind::State, what));
        }
        Ok(record)
    }

    fn show(&self, mounts: &mut BTreeMap<PathBuf, Route>, record: &ViewRecord, pid: u32) -> Result<()> {
        let shown = self.show_in(mounts, record, pid);
        if shown.is_err() && mounts.get(&record.at).is_some_and(|route| route.shown.is_empty()) {
            mounts.remove(&record.at);
        }
        shown
    }

    fn show_in(&self, mounts: &mut BTreeMap<PathBuf, Route>, record: &ViewRecord, pid: u32) -> Result<()> {
        let missing = || BackendError::new(ErrorKind::NotFound, format!("there is no process {pid}"));
        let failed = |error| BackendError::caused(format!("cannot find the process {pid}"), error);
        Host.find(pid).map_err(failed)?.ok_or_else(missing)?;
        let route = match mounts.entry(record.at.clone()) {
            std::collections::btree_map::Entry::Occupied(route) => route.into_mut(),
            std::collections::btree_map::Entry::Vacant(vacant) => {
                stale::clean(Some(&record.at));
                let processes = Arc::new(Processes::new(Host));
                let mount = SharedMount::mount(&record.at, Arc::clone(&processes) as Arc<dyn Callers>)?;
                vacant.insert(Route { mount, processes, shown: BTreeMap::new() })
            }
        };
        if let Some(other) = route.shown.iter().find(|(_, shown)| {
            route.processes.shown_to(shown.share.number()).iter().any(|process| process.pid == pid)
        }) {
            let at = record.at.display();
            let what = format!("the process {pid} sees the view `{}` at {at} already", other.0);
            return Err(BackendError::new(ErrorKind::Conflict, what)
                .hint(format!("take it away first: kiln fs unmount {pid}")));
        }
        let share = match route.shown.get(&record.name) {
            Some(shown) => shown.share,
            None => {
                let lock = self.views.lock_served(&record.name)?;
                let share = self.add(&route.mount, record, &[])?;
                let shown = Shown { share, earlier: Vec::new(), _lock: lock };
                route.shown.insert(record.name.clone(), shown);
                share
            }
        };
        let shown = route.processes.show(pid, share.number()).map_err(failed)?;
        if shown.is_none() {
            if route.processes.shown_to(share.number()).is_empty() {
                route.shown.remove(&record.name);
                route.mount.remove(share);
            }
            return Err(missing());
        }
        Ok(())
    }

    fn add(&self, mount: &SharedMount, record: &ViewRecord, earlier: &[Share]) -> Result<Share> {
        let store = self.views.store()?;
        let (tree, objects) = (self.views.tree(&store, record)?, store.objects_dir());
        let scratch = self.views.scratch(record);
        let owners = record.owner.map_or(Owners::Kept, |(uid, gid)| Owners::One { uid, gid });
        mount.add(&NewTree {
            tree: &tree,
            objects: &objects,
            scratch: scratch.as_ref(),
            owners,
            fetcher: self.views.fetcher(),
            frozen: record.frozen,
            earlier,
        })
    }

    /// Writes down to whom a view is shown.
    fn record(&self, mounts: &BTreeMap<PathBuf, Route>, record: &ViewRecord) -> Result<()> {
        let processes = mounts.get(&record.at).and_then(|route| {
            let shown = route.shown.get(&record.name)?;
            Some(route.processes.shown_to(shown.share.number()))
        });
        let mut record = self.views.find(&record.name)?;
        record.shown_to = processes.map(ShownTo::now);
        self.views.write(&record)
    }

    /// Changes a view that is shown; without an alteration, what its record says now is shown. Nobody is shown or loses
    /// anything meanwhile: the record says to whom it is shown.
    pub(super) fn remount(&self, name: &str, alteration: Option<Alteration>) -> Result<()> {
        let record = self.find(name)?;
        let mut mounts = self.mounts();
        let route = mounts.get_mut(&record.at).ok_or_else(|| nobody(name))?;
        let Route { mount, processes, shown } = route;
        let shown = shown.get_mut(name).ok_or_else(|| nobody(name))?;
        let alteration = alteration.unwrap_or(Alteration::Show {
            reference: record.reference,
            image: record.image,
            layers: record.layers,
            binds: record.binds,
        });
        let mut show = |_: &ViewRecord, new: &ViewRecord, how| match how {
            How::Flags => mount.freeze(shown.share, &shown.earlier, new.frozen),
            How::Anew => self.show_anew(mount, processes, shown, new),
        };
        self.views.apply(name, &alteration, Some(&mut show)).map(drop)
    }

    /// Names are looked up in what the record says from now on. Open files, and working directories, stay in what was shown
    /// before, in which nothing but the bytes of open files is changed any more.
    fn show_anew(
        &self,
        mount: &SharedMount,
        processes: &Processes<Host>,
        shown: &mut Shown,
        record: &ViewRecord,
    ) -> Result<()> {
        let old = shown.share;
        let earlier = [&shown.earlier[..], &[old]].concat();
        let new = self.add(mount, record, &earlier)?;
        mount.retire(old, || processes.replace(old.number(), new.number()));
        (shown.share, shown.earlier) = (new, earlier);
        let mut too_many = shown.earlier.len().saturating_sub(EARLIER_MOST);
        shown.earlier.retain(|share| {
            let stays = too_many == 0 || mount.is_used(*share);
            if !stays {
                mount.remove(*share);
                too_many -= 1;
            }
            stays
        });
        Ok(())
    }

    /// Shows a view to nobody any more.
    pub(super) fn unmount_view(&self, name: &str) -> Result<Vec<String>> {
        let record = self.find(name)?;
        let mut mounts = self.mounts();
        if !mounts.get(&record.at).is_some_and(|route| route.shown.contains_key(name)) {
            return Err(nobody(name));
        }
        self.end(&mut mounts, &record.at, name);
        Ok(vec![name.to_owned()])
    }

    /// Takes from a process what was shown to itself.
    pub(super) fn unmount_process(&self, pid: u32) -> Result<Vec<String>> {
        let mut mounts = self.mounts();
        let mut found = Vec::new();
        for (at, route) in mounts.iter() {
            for (name, shown) in &route.shown {
                let processes = route.processes.shown_to(shown.share.number());
                for process in processes.iter().filter(|process| process.pid == pid) {
                    found.push((at.clone(), name.clone(), *process, processes.len() == 1));
                }
            }
        }
        if found.is_empty() {
            let what = format!("no view was shown to the process {pid}");
            return Err(BackendError::new(ErrorKind::NotFound, what)
                .hint("`kiln fs service status` lists the processes"));
        }
        let mut gone = Vec::new();
        for (at, name, process, last) in found {
            if last {
                self.end(&mut mounts, &at, &name);
                gone.push(name);
            } else if let Some(route) = mounts.get(&at) {
                route.processes.hide(process);
                let record = self.find(&name)?;
                self.record(&mounts, &record)?;
            }
        }
        Ok(gone)
    }

    /// Takes a view away, and the mount with its last one.
    fn end(&self, mounts: &mut BTreeMap<PathBuf, Route>, at: &Path, name: &str) {
        let Some(route) = mounts.get_mut(at) else { return };
        if let Some(shown) = route.shown.remove(name) {
            for process in route.processes.shown_to(shown.share.number()) {
                route.processes.hide(process);
            }
            shown.earlier.iter().chain([&shown.share]).for_each(|share| route.mount.remove(*share));
        }
        if route.shown.is_empty() {
            mounts.remove(at);
        }
        let Ok(mut record) = self.views.find(name) else { return };
        record.shown_to = None;
        let written = self.views.write(&record);
        // Whoever made it and is still there removes it, or has a use for it yet.
        let removed =
            written.and_then(|()| if record.keep { Ok(()) } else { self.views.remove_unused(name) });
        if let Err(error) = removed {
            tracing::warn!(view = name, %error, "a view that nobody sees is left");
        }
    }

    /// Looks whether somebody is left for whom a view must stay, and takes it away if not.
    pub(super) fn watch(&self, name: &str) -> Watched {
        let mut mounts = self.mounts();
        let Some((at, route)) = mounts.iter().find(|(_, route)| route.shown.contains_key(name)) else {
            return Watched::Gone;
        };
        let Some(shown) = route.shown.get(name) else { return Watched::Gone };
        let share = shown.share.number();
        // Who is only known to see it stays in it; who was never seen cannot be waited for.
        let living = |process: &Process| process.lives();
        let shown_to = route.processes.shown_to(share).into_iter().find(living);
        if let Some(process) = shown_to.or_else(|| route.processes.seen_in(share).into_iter().next()) {
            return Watched::Until(process);
        }
        let at = at.clone();
        self.end(&mut mounts, &at, name);
        Watched::Gone
    }

    /// What is shown.
    pub(super) fn list(&self) -> Vec<View> {
        let mounts = self.mounts();
        let views = mounts.values().flat_map(|route| {
            route.shown.iter().map(|(name, shown)| View {
                name: name.clone(),
                at: route.mount.target().to_string_lossy().into_owned(),
                processes: route
                    .processes
                    .shown_to(shown.share.number())
                    .iter()
                    .map(|process| process.pid)
                    .collect(),
            })
        });
        views.collect()
    }

    /// Takes all mounts away. What is recorded stays.
    pub(super) fn close(&self) {
        self.mounts().clear();
    }
}

fn nobody(name: &str) -> BackendError {
    BackendError::new(ErrorKind::State, format!("nobody sees the view `{name}`"))
}
