//! Views with names: a stack at one path, seen by one process tree.
//!
//! `$KILN_HOME/views/<name>/` holds `view.json` ([`ViewRecord`]), `lock`, `log`, and the scratch of an editable view, `upper/` and
//! `work/`. How a view lives:
//!
//! 1. [`Views::create`] takes the name: the directory and its lock are there before anything else, and the lock is held for
//!    as long as the process that made the view lives.
//! 2. [`View::enter`] moves that process to a mount namespace of its own (of an ordinary user, in a user namespace), and
//!    mounts. What it starts sees the view; nobody else does. A FUSE server stays outside of the namespace: it ends with
//!    the last mount, which ends with the last process in the namespace.
//! 3. [`View::leave`] takes away the record and the scratch, unless they are to be kept. If somebody is in the view still, or
//!    who made it is killed, the view's [keeper](keeper) does that after its last process. What a keeper left that was killed
//!    too, [`Views::prune`] finds: no lock is held, and no process is in the namespace.
//!
//! [`Views::commit`] makes a layer of a scratch at any time.

mod alter;
mod binds;
mod enter;
mod keeper;
mod monitor;
mod private_root;
mod record;
mod remount;
mod routed;
mod seen;
mod startup;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_contract::{BackendError, Change, CommitOptions, Digest, ErrorKind, Home, Scratch};
use kiln_store::{Changes, CommitRequest, IdKind, Store};
use rustix::fs::FlockOperation;

use crate::router::{self, Launch};
use crate::{Bind, Fetcher};

pub use self::alter::Alteration;
pub(crate) use self::alter::{How, Show};
pub use self::enter::{VARIABLE, View, run};
pub use self::record::{Backend, ShownTo, ViewRecord};
pub(crate) use self::routed::ServedLock;

type Result<T> = std::result::Result<T, BackendError>;

/// The longest name of a view, in bytes.
const NAME_MOST: usize = 100;

/// How long somebody may have the lock of a view in which nobody is.
const PATIENCE: Duration = Duration::from_secs(2);

/// The views of one home.
#[derive(Debug, Clone)]
pub struct Views {
    home: Home,
    /// What brings objects that are missing.
    fetcher: Option<Fetcher>,
    launch: Launch,
}

/// What a view is to be.
#[derive(Debug, Clone)]
pub struct NewView {
    /// Its name: letters, digits, and `_`, `.` and `-` but at the start.
    pub name: String,
    /// What it is a view of, in words.
    pub reference: String,
    /// The image whose configuration a commit goes on with.
    pub image: Digest,
    /// The stack, bottom first.
    pub layers: Vec<Digest>,
    /// Where it is to be seen: an absolute path.
    pub at: PathBuf,
    /// How it is to be shown; as suits this user best if `None`.
    pub backend: Option<Backend>,
    /// Whether it is to have a scratch.
    pub editable: bool,
    /// Whether it is to stay when its last process is gone.
    pub keep: bool,
    /// What will run in it.
    pub command: Vec<String>,
    /// What of the host's is to be shown in it.
    pub binds: Vec<Bind>,
    /// What is to be remembered of it.
    pub annotations: BTreeMap<String, String>,
}

impl Views {
    /// The views of `home`. Nothing is read or made by this.
    pub fn open(home: &Home) -> Self {
        Self { home: home.clone(), fetcher: None, launch: router::this_program }
    }

    /// The same, with what brings objects that are missing or damaged while a view is used.
    #[must_use]
    pub fn fetching(self, fetcher: Fetcher) -> Self {
        Self { fetcher: Some(fetcher), ..self }
    }

    /// Starts the router's service in another way than as `kiln fs service`.
    #[must_use]
    pub fn served_by(mut self, launch: Launch) -> Self {
        self.launch = launch;
        self
    }

    /// The home whose views these are.
    pub fn home(&self) -> &Home {
        &self.home
    }

    pub(crate) fn fetcher(&self) -> Option<&Fetcher> {
        self.fetcher.as_ref()
    }

    /// Makes a view. Nothing is mounted yet.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if the name is taken, [`ErrorKind::Invalid`] if it is none, or the view would hide what Kiln
    /// itself keeps.
    pub fn create(&self, new: NewView) -> Result<View> {
        check_name(&new.name)?;
        let whole = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if whole(self.home.path()).starts_with(whole(&new.at)) {
            let what = format!("a view at {} would hide {}", new.at.display(), self.home.path().display());
            return Err(BackendError::new(ErrorKind::Invalid, what).hint("name another directory with --at"));
        }
        let directory = self.directory(&new.name);
        let failed = |error| BackendError::caused(format!("cannot make {}", directory.display()), error);
        fs::create_dir_all(self.home.views()).map_err(failed)?;
        match fs::create_dir(&directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(BackendError::new(
                    ErrorKind::Conflict,
                    format!("there is a view `{}` already", new.name),
                ));
            }
            Err(error) => return Err(failed(error)),
        }
        // Nobody may reach the scratch but through the view: it has files of many owners, set-user-id ones among them.
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        let lock = self.lock(&new.name)?.ok_or_else(|| {
            BackendError::new(ErrorKind::Conflict, format!("the view `{}` is being removed", new.name))
        })?;
        let backend = new.backend.unwrap_or(if crate::userns::is_root_of_host() {
            Backend::Overlay
        } else {
            Backend::Fuse
        });
        let mut record = ViewRecord {
            format: record::FORMAT,
            name: new.name,
            reference: new.reference,
            image: new.image,
            layers: new.layers,
            base: None,
            binds: new.binds,
            at: new.at,
            backend,
            editable: new.editable,
            frozen: false,
            generation: 0,
            keep: new.keep,
            created: Timestamp::now(),
            command: new.command,
            annotations: new.annotations,
            namespace: None,
            boot: None,
            owner: None,
            shown_to: None,
        };
        let prepared = self.prepare_base(&mut record).and_then(|()| self.prepare_scratch(&record));
        let prepared = prepared.and_then(|()| self.write(&record));
        match prepared {
            Ok(()) => Ok(View::new(self.clone(), record, lock)),
            Err(error) => {
                let _ = remove_all(&directory);
                Err(error)
            }
        }
    }

    /// Takes a view that was kept and has nobody in it, to enter it again.
    ///
    /// # Errors
    /// There is none of that name, or it is in use.
    pub fn reopen(&self, name: &str, command: Vec<String>) -> Result<View> {
        let (lock, mut record) = self.hold(name, PATIENCE)?.ok_or_else(|| {
            BackendError::new(ErrorKind::State, format!("the view `{name}` is in use"))
                .hint(format!("run something in it with: kiln fs join {name} -- COMMAND"))
        })?;
        record.command = command;
        self.sweep_work(&record)?;
        Ok(View::new(self.clone(), record, lock))
    }

    /// Removes the work directories of mounts that were replaced.
    fn sweep_work(&self, record: &ViewRecord) -> Result<()> {
        let Some(scratch) = self.scratch(record) else { return Ok(()) };
        let directory = self.directory(&record.name);
        let sweep = || -> io::Result<()> {
            for entry in fs::read_dir(&directory)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().as_encoded_bytes();
                if name.starts_with(b"work") && path != scratch.work {
                    remove_all(&path)?;
                }
            }
            Ok(())
        };
        sweep().map_err(|error| BackendError::caused(format!("cannot sweep {}", directory.display()), error))
    }

    fn prepare_base(&self, record: &mut ViewRecord) -> Result<()> {
        record.base = None;
        if !record.binds.is_empty() {
            let places = record.binds.iter().map(|bind| (bind.dest.as_path(), bind.source.is_dir()));
            let made = self.store()?.layer_of_mount_points(places);
            record.base = Some(made.map_err(|error| {
                BackendError::caused("cannot make a layer with the places of live layers", error)
            })?);
        }
        Ok(())
    }

    /// Makes what is not there yet of a scratch.
    fn prepare_scratch(&self, record: &ViewRecord) -> Result<()> {
        let Some(scratch) = self.scratch(record) else { return Ok(()) };
        let kept = scratch.upper.exists();
        let tree = self.tree(&self.store()?, record)?;
        let attributes = crate::root_attributes(&tree)?;
        let failed =
            |error| BackendError::caused(format!("cannot make the scratch of `{}`", record.name), error);
        for path in [&scratch.upper, &scratch.work] {
            fs::create_dir_all(path).map_err(failed)?;
        }
        if kept {
            return Ok(());
        }
        // What an editable view shows as its root is the scratch's.
        if crate::userns::is_root_of_host() {
            std::os::unix::fs::chown(&scratch.upper, Some(attributes.uid), Some(attributes.gid))
                .map_err(failed)?;
        }
        fs::set_permissions(&scratch.upper, fs::Permissions::from_mode(attributes.mode)).map_err(failed)
    }

    /// All views, by name.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn list(&self) -> Result<Vec<ViewRecord>> {
        let mut names = Vec::new();
        match fs::read_dir(self.home.views()) {
            Ok(entries) => {
                for entry in entries.flatten() {
                    names.extend(entry.file_name().into_string());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(BackendError::caused("cannot list the views", error)),
        }
        names.sort();
        // One that is being made or removed has no record.
        Ok(names.iter().filter_map(|name| self.find(name).ok()).collect())
    }

    /// One view.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; or its record is of a newer version.
    pub fn find(&self, name: &str) -> Result<ViewRecord> {
        let missing = || {
            BackendError::new(ErrorKind::NotFound, format!("there is no view `{name}`"))
                .hint("`kiln fs runtimes ls` lists them")
        };
        check_name(name).map_err(|_| missing())?;
        let path = self.directory(name).join("view.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            Err(error) => return Err(BackendError::caused(format!("cannot read {}", path.display()), error)),
        };
        let wrong = |error| BackendError::caused(format!("cannot read {}", path.display()), error);
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(wrong)?;
        match value["format"].as_u64() {
            Some(format) if format > record::FORMAT.into() => Err(BackendError::new(
                ErrorKind::Unsupported,
                format!(
                    "the record of the view `{name}` has version {format}; this program knows {}",
                    record::FORMAT
                ),
            )),
            _ => serde_json::from_value(value).map_err(wrong),
        }
    }

    /// Whether somebody is in a view.
    pub fn is_active(&self, record: &ViewRecord) -> bool {
        let looked = self.flock(&record.name, FlockOperation::NonBlockingLockShared);
        !matches!(looked, Ok(Some(_))) || self.in_use(record)
    }

    /// Whether a process is in the mount namespace of a view, or the router shows it to one.
    fn in_use(&self, record: &ViewRecord) -> bool {
        namespace_now(record).is_some_and(|namespace| processes_in(namespace).next().is_some())
            || record.shown_to.as_ref().is_some_and(|shown_to| {
                shown_to.living().next().is_some() || self.lock_served(&record.name).is_err()
            })
    }

    /// Removes a view in which nobody is, with what was changed in it.
    ///
    /// # Errors
    /// There is none of that name, it is in use, or something of it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<()> {
        let Some((_lock, _)) = self.hold(name, PATIENCE)? else {
            return Err(BackendError::new(ErrorKind::State, format!("the view `{name}` is in use")));
        };
        self.delete(name)
    }

    /// Removes the views that were not to be kept and have nobody in them any more; `all`: the kept ones too. Returns their names.
    ///
    /// # Errors
    /// They cannot be listed, or something of one cannot be removed.
    pub fn prune(&self, all: bool) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for record in self.list()?.into_iter().filter(|record| all || !record.keep) {
            match self.hold(&record.name, Duration::ZERO) {
                Ok(Some((_lock, record))) if all || !record.keep => {
                    self.delete(&record.name)?;
                    removed.push(record.name);
                }
                Ok(_) => {}
                // It went by itself.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// What [`Views::prune`] would remove now.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn unused(&self, all: bool) -> Result<Vec<String>> {
        let mut records = self.list()?;
        records.retain(|record| (all || !record.keep) && !self.is_active(record));
        Ok(records.into_iter().map(|record| record.name).collect())
    }

    /// What was changed in a view, sorted by path.
    ///
    /// # Errors
    /// The store or the scratch cannot be read.
    pub fn changes(&self, record: &ViewRecord) -> Result<Vec<Change>> {
        let Some(scratch) = self.scratch(record) else { return Ok(Vec::new()) };
        crate::changes(&self.tree(&self.store()?, record)?, &scratch.upper)
    }

    /// Makes an image of what a view shows: a layer of what was changed on top of its stack. The view goes on as it is.
    ///
    /// # Errors
    /// The view has no scratch, a name or an instruction is none, or the store fails.
    pub fn commit(&self, record: &ViewRecord, options: &CommitOptions) -> Result<Digest> {
        let Some(scratch) = self.scratch(record) else {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("the view `{}` cannot be edited", record.name),
            )
            .hint("views that are made with --edit can"));
        };
        let store = self.store()?;
        let request = CommitRequest {
            name: &record.name,
            image: Some(record.image),
            layers: &record.layers,
            command: &record.command,
            options,
        };
        // What is one user's on this disk is root's in the image, as in images that were made without privileges.
        let map = |id, kind| match (record.owner, kind) {
            (Some((uid, _)), IdKind::User) if id == uid => 0,
            (Some((_, gid)), IdKind::Group) if id == gid => 0,
            _ => id,
        };
        let changes = Changes::Upper { directory: &scratch.upper, lower: &record.layers, map: &map };
        Ok(store.commit(&request, changes)?.id)
    }

    pub(crate) fn store(&self) -> Result<Store> {
        Store::open(&self.home).map_err(|error| BackendError::caused("cannot open the store", error))
    }

    pub(crate) fn tree(&self, store: &Store, record: &ViewRecord) -> Result<PathBuf> {
        let layers: Vec<Digest> = record.base.iter().chain(&record.layers).copied().collect();
        store.merged_tree(&layers).map_err(|error| {
            BackendError::caused(format!("cannot merge the layers of `{}`", record.reference), error)
        })
    }

    fn directory(&self, name: &str) -> PathBuf {
        self.home.views().join(name)
    }

    /// What the view's server had to say.
    fn log(&self, name: &str) -> PathBuf {
        self.directory(name).join("log")
    }

    pub(crate) fn scratch(&self, record: &ViewRecord) -> Option<Scratch> {
        let directory = self.directory(&record.name);
        let work = match record.generation {
            0 => directory.join("work"),
            generation => directory.join(format!("work-{generation}")),
        };
        let upper = directory.join("upper");
        record.editable.then_some(Scratch { upper, work, volatile: !record.keep })
    }

    pub(crate) fn write(&self, record: &ViewRecord) -> Result<()> {
        let directory = self.directory(&record.name);
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&directory)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.persist(directory.join("view.json"))?;
            Ok(())
        };
        write()
            .map_err(|error| BackendError::caused(format!("cannot write to {}", directory.display()), error))
    }

    /// The lock of a view in which nobody is, and its record. `None` if somebody is.
    ///
    /// Who has the lock although nobody is there will not have it for long: it is the view's keeper after the last process,
    /// or who looks. That is waited for, `patience` at most.
    fn hold(&self, name: &str, patience: Duration) -> Result<Option<(File, ViewRecord)>> {
        let limit = Instant::now() + patience;
        loop {
            let record = self.find(name)?;
            let lock = match self.lock(name) {
                // It went between the two.
                Err(error) if !self.directory(name).exists() => return self.find(name).and(Err(error)),
                lock => lock?,
            };
            if self.in_use(&record) {
                return Ok(None);
            }
            match lock {
                // What was read before the lock was had may have been another's last word.
                Some(lock) => return Ok(Some((lock, self.find(name)?))),
                None if Instant::now() >= limit => return Ok(None),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// `None` if somebody else has it.
    fn lock(&self, name: &str) -> Result<Option<File>> {
        self.flock(name, FlockOperation::NonBlockingLockExclusive)
    }

    fn flock(&self, name: &str, operation: FlockOperation) -> Result<Option<File>> {
        let path = self.directory(name).join("lock");
        let failed = |error| BackendError::caused(format!("cannot lock {}", path.display()), error);
        let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
        match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Nobody is in a view any more: it goes, or stays if it is to be kept.
    fn end(&self, mut record: ViewRecord) -> Result<()> {
        if record.keep {
            (record.namespace, record.boot) = (None, None);
            self.write(&record)
        } else {
            self.delete(&record.name)
        }
    }

    fn delete(&self, name: &str) -> Result<()> {
        let directory = self.directory(name);
        remove_all(&directory)
            .map_err(|error| BackendError::caused(format!("cannot remove {}", directory.display()), error))
    }
}

/// The mount namespace of a view, if it may be there still: after a boot, its number is another one's.
fn namespace_now(record: &ViewRecord) -> Option<u64> {
    record.namespace.filter(|_| record.boot.is_none() || record.boot == boot())
}

/// Which boot of the host this is.
fn boot() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim_end().to_owned())
}

/// The processes in a mount namespace, but for this one.
fn processes_in(namespace: u64) -> impl Iterator<Item = u32> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(move |pid| *pid != own && namespace_of(Path::new(&format!("/proc/{pid}"))) == Some(namespace))
}

/// The inode of a process's mount namespace, where this user may know it.
fn namespace_of(process: &Path) -> Option<u64> {
    fs::metadata(process.join("ns/mnt")).ok().map(|metadata| metadata.ino())
}

/// Removes a directory of this user's, in which there may be directories that not even he may write to.
fn remove_all(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        other => return other,
    }
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    fs::remove_dir_all(directory)
}

fn check_name(name: &str) -> Result<()> {
    let good = name.bytes().enumerate().all(|(index, byte)| {
        byte.is_ascii_alphanumeric() || (index > 0 && matches!(byte, b'_' | b'.' | b'-'))
    });
    if name.is_empty() || name.len() > NAME_MOST || !good {
        let what = format!("`{name}` is no name for a view");
        return Err(BackendError::new(ErrorKind::Invalid, what)
            .hint("letters, digits, `_`, `.` and `-`, beginning with one of the first two"));
    }
    Ok(())
}
