//! Snapshots, and what else changes a machine between two of its lives.
//!
//! A snapshot is one of the machine's disk, and perhaps `snapshots/<name>/` in its directory with what was
//! [saved](crate::saved) of its memory. It is there when the disk's is: that is made last and removed first.

use std::fs;
use std::path::PathBuf;

use kiln_contract::{
    BackendError, DiskBackend, DiskId, DiskSnapshot, ErrorKind, InstanceId, InstanceRecord, Snapshot,
    SnapshotName, SnapshotOptions,
};
use kiln_instance::{Instances, Locked, is_supervised};
use kiln_link::message::Request;

use crate::backend::Machines;
use crate::beginning::disks;
use crate::door::{self, Ask, Copy};
use crate::saved::{self, Saved};
use crate::{plan, stream};

/// Where the memory of a machine's snapshot is.
fn memory(instances: &Instances, id: &InstanceId, name: &SnapshotName) -> PathBuf {
    instances.dir(id).path().join("snapshots").join(name.as_str())
}

fn named(name: &str) -> Result<SnapshotName, BackendError> {
    name.parse().map_err(|error| {
        BackendError::caused(format!("`{name}` cannot be the name of a snapshot"), error)
            .of_kind(ErrorKind::Invalid)
    })
}

/// A machine that does not run, and will not while this value lives.
pub(crate) struct Still {
    pub(crate) record: InstanceRecord,
    pub(crate) disk: DiskId,
    _locked: Locked,
}

impl Machines {
    pub(crate) fn still(&self, id: &InstanceId, doing: &str) -> Result<Still, BackendError> {
        self.verbs().truth(id)?;
        let locked = self.instances().lock(id)?;
        let record = self.instances().read(id)?;
        if is_supervised(&record) {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("cannot {doing} machine {}: it is {}", record.spec.name, record.status),
            )
            .hint(format!("stop it first: `kiln stop {}`", record.spec.name)));
        }
        Ok(Still { record, disk: DiskId::from(id), _locked: locked })
    }

    pub(crate) fn make_snapshot(
        &self,
        id: &InstanceId,
        options: &SnapshotOptions,
    ) -> Result<(), BackendError> {
        let name = named(&options.name)?;
        let record = self.verbs().truth(id)?;
        if !is_supervised(&record) {
            return self.snapshot_still(id, &name, options.memory);
        }
        let disks = disks(self.home())?;
        let disk = DiskId::from(id);
        if disks.snapshots(&disk)?.iter().any(|other| other.name == name) {
            return Err(exists(&record, &name));
        }
        let directory = options.memory.then(|| memory(self.instances(), id, &name));
        if let Some(directory) = &directory {
            self.verbs().ready_for_exec(id)?;
            // What a killed process left: no snapshot of that name is there.
            saved::remove(directory)?;
            fs::create_dir_all(directory).map_err(crate::template::failed("make", directory))?;
        } else if record.status == kiln_contract::InstanceStatus::Running {
            self.ask(id, &Request::Sync)?;
        }
        let text = directory.as_ref().map(|path| crate::template::in_utf8(path)).transpose()?;
        let question = Ask::Save { directory: text, disk: Copy::Snapshot(name.as_str().to_owned()) };
        let dir = self.instances().dir(id);
        let outcome = stream::runtime()?.block_on(door::ask(&dir, &question));
        match (outcome, directory) {
            (Err(error), Some(directory)) => {
                // The disk's is made last: if it is there, only the answer was lost, or it is somebody else's.
                let is_there = |all: Vec<DiskSnapshot>| all.iter().any(|other| other.name == name);
                if disks.snapshots(&disk).is_ok_and(|all| !is_there(all)) {
                    saved::remove(&directory)?;
                }
                Err(error)
            }
            (outcome, _) => outcome.map(drop),
        }
    }

    fn snapshot_still(&self, id: &InstanceId, name: &SnapshotName, memory: bool) -> Result<(), BackendError> {
        let still = self.still(id, "save")?;
        let waiting = Saved::load(&plan::saved(&self.instances().dir(id)));
        if memory && waiting.is_none() {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("machine {} has no memory to save: it does not run", still.record.spec.name),
            )
            .hint("leave out --memory to save its disk"));
        }
        let disks = disks(self.home())?;
        if disks.path(&still.disk).is_err() {
            return Err(never_started(&still.record, "save"));
        }
        let directory = self::memory(self.instances(), id, name);
        if let Some(waiting) = waiting.filter(|_| memory) {
            if disks.snapshots(&still.disk)?.iter().any(|other| other.name == *name) {
                return Err(exists(&still.record, name));
            }
            saved::remove(&directory)?;
            let parent = directory.parent().unwrap_or(&directory);
            fs::create_dir_all(parent).map_err(crate::template::failed("make", parent))?;
            waiting.copy_to(&directory)?;
        }
        disks.snapshot(&still.disk, name)
    }

    pub(crate) fn list_snapshots(&self, id: &InstanceId) -> Result<Vec<Snapshot>, BackendError> {
        let disks = disks(self.home())?;
        let disk = DiskId::from(id);
        if disks.path(&disk).is_err() {
            return Ok(Vec::new());
        }
        let whole = |snapshot: DiskSnapshot| Snapshot {
            memory: Saved::load(&memory(self.instances(), id, &snapshot.name))
                .and_then(|saved| saved.own_memory()),
            name: snapshot.name.to_string(),
            created: snapshot.created,
            disk_size: snapshot.size,
        };
        Ok(disks.snapshots(&disk)?.into_iter().map(whole).collect())
    }

    pub(crate) fn restore_snapshot(
        &self,
        id: &InstanceId,
        name: &str,
        force: bool,
    ) -> Result<(), BackendError> {
        let name = named(name)?;
        let disks = disks(self.home())?;
        self.find_snapshot(&*disks, id, &name)?;
        if force {
            self.verbs().stop(id, Some(std::time::Duration::ZERO))?;
        }
        let still = self.still(id, "put back")?;
        let waiting = plan::saved(&self.instances().dir(id));
        // Its memory fits the disk that it has now, and no other.
        saved::remove(&waiting)?;
        disks.restore(&still.disk, &name)?;
        match Saved::load(&memory(self.instances(), id, &name)) {
            Some(saved) => saved.copy_to(&waiting).map(drop),
            None => Ok(()),
        }
    }

    pub(crate) fn delete_snapshot(&self, id: &InstanceId, name: &str) -> Result<(), BackendError> {
        let name = named(name)?;
        let disks = disks(self.home())?;
        self.find_snapshot(&*disks, id, &name)?;
        disks.delete_snapshot(&DiskId::from(id), &name)?;
        saved::remove(&memory(self.instances(), id, &name))
    }

    fn find_snapshot(
        &self,
        disks: &dyn DiskBackend,
        id: &InstanceId,
        name: &SnapshotName,
    ) -> Result<(), BackendError> {
        let record = self.instances().read(id)?;
        let disk = DiskId::from(id);
        let all = if disks.path(&disk).is_ok() { disks.snapshots(&disk)? } else { Vec::new() };
        if all.iter().any(|snapshot| snapshot.name == *name) {
            return Ok(());
        }
        let what = format!("machine {} has no snapshot `{name}`", record.spec.name);
        let names: Vec<_> = all.iter().map(|snapshot| snapshot.name.as_str()).collect();
        let hint = match names.as_slice() {
            [] => format!("it has none yet: `kiln snapshot create {}` makes one", record.spec.name),
            names => format!("it has {}", names.join(", ")),
        };
        Err(BackendError::new(ErrorKind::NotFound, what).hint(hint))
    }

    pub(crate) fn grow(&self, id: &InstanceId, size: u64) -> Result<(), BackendError> {
        let size = size.next_multiple_of(4096);
        let record = self.verbs().truth(id)?;
        let disks = disks(self.home())?;
        let disk = DiskId::from(id);
        let runs = is_supervised(&record);
        if !runs && Saved::load(&plan::saved(&self.instances().dir(id))).is_some() {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("cannot grow the disk of machine {}: its memory is saved", record.spec.name),
            )
            .hint("start it, and grow its disk while it runs"));
        }
        if runs {
            self.verbs().ready_for_exec(id)?;
        }
        if disks.path(&disk).is_ok() {
            disks.resize(&disk, size)?;
        } else if size < plan::disk_size(&record.spec) {
            return Err(BackendError::new(ErrorKind::Invalid, "a disk can grow, and cannot shrink"));
        }
        if runs {
            let dir = self.instances().dir(id);
            stream::runtime()?.block_on(door::ask(&dir, &Ask::Grown { size }))?;
        }
        self.instances().update(id, |record| {
            record.spec.machine.disk = Some(kiln_contract::ByteSize(size));
            Ok(())
        })?;
        Ok(())
    }

    /// Refuses what a machine whose memory is saved cannot have: it goes on as it was.
    pub(crate) fn check_update(
        &self,
        id: &InstanceId,
        update: &kiln_contract::Update,
    ) -> Result<(), BackendError> {
        let record = self.instances().read(id)?;
        let mut spec = record.spec.clone();
        update.apply(&mut spec);
        plan::shape(&spec)?;
        if let Some(name) = &update.kernel {
            kiln_boot::Kernels::open(self.home()).find(name)?;
        }
        let changes = update.cpus.is_some() || update.memory.is_some() || update.kernel.is_some();
        if changes && Saved::load(&plan::saved(&self.instances().dir(id))).is_some() {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("cannot change machine {}: its memory is saved as it is", spec.name),
            )
            .hint("start and stop it first"));
        }
        Ok(())
    }
}

fn exists(record: &InstanceRecord, name: &SnapshotName) -> BackendError {
    BackendError::new(
        ErrorKind::Conflict,
        format!("machine {} has a snapshot `{name}` already", record.spec.name),
    )
    .hint("choose another name, or remove it with `kiln snapshot rm`")
}

pub(crate) fn never_started(record: &InstanceRecord, doing: &str) -> BackendError {
    BackendError::new(
        ErrorKind::State,
        format!("machine {} has never been started: there is nothing to {doing}", record.spec.name),
    )
}
