//! The instances of a home: their directories, their records, their names (`names` module).
//!
//! An instance's directory is its lock: who holds an exclusive `flock(2)` on the directory itself may change its
//! record, which is replaced by a rename, so that a reader sees the old one or the new one.
//!
//! What an interrupted `create`, `rename` or `forget` leaves is told apart from what is alive by that lock: a directory
//! without a record, or a name whose instance does not say that it has it, is dead unless somebody holds the lock.

mod names;

use std::fs::{self, File};
use std::io::{self, ErrorKind as IoKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use kiln_contract::{
    Attachment, BackendError, ErrorKind, HealthState, HealthStatus, Home, InstanceDir, InstanceId,
    InstanceRecord, InstanceSpec, InstanceStatus, ProcessId,
};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, openat};

use crate::process;
use names::check_name;

/// How old a directory without a record must be before it is swept: its maker may be about to lock it.
const HALF_MADE: Duration = Duration::from_secs(10);

/// The instances of a home.
#[derive(Debug, Clone)]
pub struct Instances {
    home: Home,
}

/// An instance whose record only the holder of this value may change.
#[derive(Debug)]
pub struct Locked {
    dir: OwnedFd,
    path: PathBuf,
    id: InstanceId,
}

impl Instances {
    /// Nothing is opened or read by this.
    pub fn of(home: &Home) -> Self {
        Self { home: home.clone() }
    }

    /// The home that they are in.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The directory of one of them.
    pub fn dir(&self, id: &InstanceId) -> InstanceDir {
        self.home.instance(id)
    }

    /// Makes an instance: takes its name, writes its record. `volumes` are the anonymous ones that it owns.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a name that can be none, [`ErrorKind::Conflict`] for one that is taken. Nothing is left then.
    pub fn create(&self, spec: &InstanceSpec, volumes: Vec<String>) -> Result<InstanceRecord, BackendError> {
        check_name(&spec.name)?;
        let id = InstanceId::random();
        let record = InstanceRecord {
            format: InstanceRecord::FORMAT,
            id: id.clone(),
            spec: spec.clone(),
            status: InstanceStatus::Created,
            created: Timestamp::now(),
            started: None,
            exit: None,
            process: None,
            supervisor: None,
            maker: spec.transient.then(process::this),
            boot: spec.transient.then(|| process::boot_id().to_owned()),
            addresses: Vec::new(),
            ports: Vec::new(),
            cgroup: None,
            restarts: 0,
            health: None,
            volumes,
            stopped_by_user: false,
            parent: None,
        };
        let dir = self.dir(&id);
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        if let Err(error) = builder.create(dir.path()) {
            if error.kind() != IoKind::NotFound {
                return Err(failed("make", dir.path(), error));
            }
            for parent in [self.home.instances(), self.home.names()] {
                fs::create_dir_all(&parent).map_err(|error| failed("make", &parent, error))?;
            }
            builder.create(dir.path()).map_err(|error| failed("make", dir.path(), error))?;
        }
        let made = self.lock(&id).and_then(|locked| {
            self.take_name(&spec.name, &id)?;
            locked.write(&record).inspect_err(|_| self.drop_name(&spec.name, &id))
        });
        if let Err(error) = made {
            let _ = fs::remove_dir_all(dir.path());
            return Err(error);
        }
        Ok(record)
    }

    /// Its record, as it was last written.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] if a newer program wrote it.
    pub fn read(&self, id: &InstanceId) -> Result<InstanceRecord, BackendError> {
        let path = self.dir(id).record();
        match read_record(&path) {
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err(no_such(id.short())),
            Err(error) => Err(error),
        }
    }

    /// Waits for its lock and takes it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn lock(&self, id: &InstanceId) -> Result<Locked, BackendError> {
        match self.lock_how(id, FlockOperation::LockExclusive) {
            Ok(Some(locked)) => Ok(locked),
            Ok(None) => Err(no_such(id.short())),
            Err(error) => Err(failed("lock", self.dir(id).path(), error)),
        }
    }

    fn lock_how(&self, id: &InstanceId, how: FlockOperation) -> io::Result<Option<Locked>> {
        let path = self.dir(id).path().to_owned();
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let dir = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(dir) => dir,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        rustix::io::retry_on_intr(|| flock(&dir, how))?;
        Ok(Some(Locked { dir, path, id: id.clone() }))
    }

    /// Changes its record under its lock; the new record.
    ///
    /// # Errors
    /// What [`Self::lock`] and [`Self::read`] say, and `change`: the record then stays as it is.
    pub fn update(
        &self,
        id: &InstanceId,
        change: impl FnOnce(&mut InstanceRecord) -> Result<(), BackendError>,
    ) -> Result<InstanceRecord, BackendError> {
        let locked = self.lock(id)?;
        let mut record = locked.read()?;
        change(&mut record)?;
        locked.write(&record)?;
        Ok(record)
    }

    /// Writes that a run begins: to be called when the workload's process is there and before its command runs.
    ///
    /// # Errors
    /// If the record cannot be written; it then says nothing of the run.
    pub fn begin_run(
        &self,
        id: &InstanceId,
        process: ProcessId,
        cgroup: Option<String>,
        network: Attachment,
    ) -> Result<InstanceRecord, BackendError> {
        self.update(id, |record| {
            record.status = InstanceStatus::Running;
            record.started = Some(Timestamp::now());
            record.exit = None;
            record.process = Some(process);
            record.cgroup = cgroup;
            record.addresses = network.addresses;
            record.ports = network.ports;
            record.health = record.spec.health.as_ref().map(|_| HealthStatus {
                state: HealthState::Starting,
                failing: 0,
                last_output: String::new(),
            });
            Ok(())
        })
    }

    /// The ids of all that have a directory.
    ///
    /// # Errors
    /// If the directory of instances cannot be read; one that is missing has none.
    pub fn ids(&self) -> Result<Vec<InstanceId>, BackendError> {
        let path = self.home.instances();
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == IoKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list", &path, error)),
        };
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok()).collect())
    }

    /// All records, oldest first. Directories that an interrupted `create` or `forget` left are swept; a record that
    /// cannot be read is passed over, so that one damaged instance does not hide the others.
    ///
    /// # Errors
    /// As for [`Self::ids`].
    pub fn all(&self) -> Result<Vec<InstanceRecord>, BackendError> {
        let mut records = Vec::new();
        for id in self.ids()? {
            match read_record(&self.dir(&id).record()) {
                Ok(Some(record)) => records.push(record),
                Ok(None) => self.sweep(&id),
                Err(error) => tracing::warn!(id = id.short(), "{error}"),
            }
        }
        records.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(records)
    }

    fn sweep(&self, id: &InstanceId) {
        let path = self.dir(id).path().to_owned();
        let old = fs::metadata(&path)
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age > HALF_MADE));
        if !old {
            return;
        }
        if let Ok(Some(locked)) = self.lock_how(id, FlockOperation::NonBlockingLockExclusive)
            && matches!(read_record(&locked.path.join("instance.json")), Ok(None))
        {
            tracing::debug!(id = id.short(), "sweeping what an interrupted command left");
            let _ = fs::remove_dir_all(&path);
        }
    }

    /// Finds one by its full id, its name, or a prefix of its id that fits no other.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Conflict`] for a prefix that fits several, with their names.
    pub fn find(&self, text: &str) -> Result<InstanceRecord, BackendError> {
        if let Ok(id) = text.parse::<InstanceId>() {
            return self.read(&id);
        }
        if check_name(text).is_ok()
            && let Some(id) = self.holder(text)
            && let Some(record) = read_record(&self.dir(&id).record())?
            && record.spec.name == text
        {
            return Ok(record);
        }
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        {
            return Err(no_such(text));
        }
        let mut found = Vec::new();
        for id in self.ids()?.into_iter().filter(|id| id.as_str().starts_with(text)) {
            found.extend(read_record(&self.dir(&id).record())?);
        }
        match found.len() {
            0 => Err(no_such(text)),
            1 => Ok(found.remove(0)),
            _ => {
                let candidates: Vec<_> = found
                    .iter()
                    .map(|record| format!("{} ({})", record.id.short(), record.spec.name))
                    .collect();
                Err(BackendError::new(
                    ErrorKind::Conflict,
                    format!("`{text}` fits several instances: {}", candidates.join(", ")),
                )
                .hint("give more digits of the id, or the name"))
            }
        }
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// As for [`Self::create`]; it then keeps its name.
    pub fn rename(&self, id: &InstanceId, name: &str) -> Result<(), BackendError> {
        check_name(name)?;
        let locked = self.lock(id)?;
        let mut record = locked.read()?;
        if record.spec.name == name {
            return Ok(());
        }
        self.take_name(name, id)?;
        let old = std::mem::replace(&mut record.spec.name, name.to_owned());
        locked.write(&record).inspect_err(|_| self.drop_name(name, id))?;
        self.drop_name(&old, id);
        Ok(())
    }

    /// Removes its record, its name and all its files. Its root must not be mounted where this process sees it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it was started meanwhile; or files of it cannot be removed.
    pub fn forget(&self, record: &InstanceRecord) -> Result<(), BackendError> {
        let dir = self.dir(&record.id);
        let locked = match self.lock(&record.id) {
            Ok(locked) => locked,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        // Looked at again: it may have been started since it was found not to run.
        if let Ok(now) = locked.read()
            && is_supervised(&now)
            && now.supervisor != Some(process::this())
        {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("cannot remove instance {}: it was started meanwhile", now.spec.name),
            ));
        }
        // From here on it is gone for everybody, even if this process is killed before the rest is.
        match fs::remove_file(dir.record()) {
            Ok(()) => {}
            Err(error) if error.kind() == IoKind::NotFound => {}
            Err(error) => return Err(failed("remove", &dir.record(), error)),
        }
        self.drop_name(&record.spec.name, &record.id);
        match fs::remove_dir_all(dir.path()) {
            Err(error) if error.kind() != IoKind::NotFound => Err(failed("remove", dir.path(), error)),
            _ => Ok(()),
        }
    }
}

impl Locked {
    /// The record.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none any more; [`ErrorKind::Unsupported`] if a newer program wrote it.
    pub fn read(&self) -> Result<InstanceRecord, BackendError> {
        read_record(&self.path.join("instance.json"))?.ok_or_else(|| no_such(self.id.short()))
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// If it cannot be written; the old one then stays.
    pub fn write(&self, record: &InstanceRecord) -> Result<(), BackendError> {
        let path = self.path.join("instance.json");
        let fail = |error: io::Error| failed("write", &path, error);
        let bytes = serde_json::to_vec(record).map_err(|error| fail(error.into()))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let file = openat(&self.dir, "instance.json.new", flags, Mode::from_raw_mode(0o600))
            .map_err(|error| fail(error.into()))?;
        io::Write::write_all(&mut File::from(file), &bytes).map_err(fail)?;
        rustix::fs::renameat(&self.dir, "instance.json.new", &self.dir, "instance.json")
            .map_err(|error| fail(error.into()))
    }
}

fn read_record(path: &Path) -> Result<Option<InstanceRecord>, BackendError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), IoKind::NotFound | IoKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(failed("read", path, error)),
    };
    /// The one field that every version of the format has.
    #[derive(serde::Deserialize)]
    struct Format {
        format: u32,
    }
    match serde_json::from_slice::<InstanceRecord>(&bytes) {
        Ok(record) if record.format <= InstanceRecord::FORMAT => Ok(Some(record)),
        parsed => match serde_json::from_slice::<Format>(&bytes) {
            Ok(Format { format }) if format > InstanceRecord::FORMAT => Err(BackendError::new(
                ErrorKind::Unsupported,
                format!(
                    "cannot read {}: its format is {format}, this program knows up to {}",
                    path.display(),
                    InstanceRecord::FORMAT
                ),
            )
            .hint("use the newer kiln that made it")),
            _ => Err(BackendError::new(
                ErrorKind::Failed,
                match parsed {
                    Err(error) => format!("cannot read {}: {error}", path.display()),
                    Ok(_) => format!("cannot read {}: not an instance's record", path.display()),
                },
            )
            .hint("remove the directory that it is in if the instance is not needed")),
        },
    }
}

fn no_such(text: &str) -> BackendError {
    BackendError::new(ErrorKind::NotFound, format!("no such instance: {text}"))
        .hint("`kiln ps -a` lists all instances")
}

/// Whether what a record says of processes, control groups and their like was said in this boot of the host: else all
/// of it is gone.
pub fn is_of_this_boot(record: &InstanceRecord) -> bool {
    record.boot.as_deref() == Some(process::boot_id())
}

/// Whether a record's supervisor lives.
pub fn is_supervised(record: &InstanceRecord) -> bool {
    is_of_this_boot(record) && record.supervisor.is_some_and(process::alive)
}

/// A failed operation on a file.
pub fn failed(doing: &str, path: &Path, error: io::Error) -> BackendError {
    BackendError::caused(format!("cannot {doing} {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_fixtures::instance_spec;

    pub(super) fn fresh() -> (tempfile::TempDir, Instances) {
        let dir = tempfile::tempdir().unwrap();
        let instances = Instances::of(&Home::at(dir.path()));
        (dir, instances)
    }

    #[test]
    fn instances_are_found_by_id_name_and_unique_prefix() {
        let (_dir, instances) = fresh();
        let all: Vec<_> = (0..17)
            .map(|n| instances.create(&instance_spec(&format!("n{n}")), Vec::new()).unwrap())
            .collect();
        for record in &all {
            for text in [record.id.as_str(), record.id.short(), &record.spec.name] {
                assert_eq!(instances.find(text).unwrap().id, record.id, "{text}");
            }
        }
        // Seventeen ids cannot all begin with different digits.
        let twice = all
            .iter()
            .map(|record| &record.id.as_str()[..1])
            .find(|digit| all.iter().filter(|record| record.id.as_str().starts_with(digit)).count() > 1)
            .unwrap();
        assert_eq!(instances.find(twice).unwrap_err().kind(), ErrorKind::Conflict);
        for text in ["", "..", "n17", "../names/n1", "zz"] {
            assert_eq!(instances.find(text).unwrap_err().kind(), ErrorKind::NotFound, "{text}");
        }
    }

    #[test]
    fn what_was_started_meanwhile_is_not_removed() {
        let (_dir, instances) = fresh();
        let stale = instances.create(&instance_spec("a"), Vec::new()).unwrap();
        let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let claimed = instances.update(&stale.id, |record| {
            record.supervisor = process::identify(other.id());
            record.boot = Some(process::boot_id().to_owned());
            Ok(())
        });
        let refused = instances.forget(&stale).unwrap_err();
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(refused.kind(), ErrorKind::State);
        assert_eq!(instances.read(&stale.id).unwrap(), claimed.unwrap());
        instances.forget(&stale).unwrap();
    }

    #[test]
    fn a_record_of_a_newer_format_is_refused_with_both_versions() {
        let (_dir, instances) = fresh();
        let record = instances.create(&instance_spec("a"), Vec::new()).unwrap();
        fs::write(instances.dir(&record.id).record(), r#"{"format": 7, "new": true}"#).unwrap();
        let error = instances.read(&record.id).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("format is 7"), "{error}");
        assert!(instances.all().unwrap().is_empty());
    }
}
