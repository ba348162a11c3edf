//! Writable disks of machines, and how they are copied without copying.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;

use crate::{BackendError, InstanceId};

/// The longest name of a disk or a snapshot, in bytes. With a suffix it is still a file's name (255 bytes), and with
/// the name of a dataset before it still a ZFS name (255 bytes).
const LONGEST: usize = 100;

/// Text that cannot be the name of a disk or of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` cannot be the name of a {what} (letters, digits, `_`, `.` and `-`, beginning with a letter or digit, \
     at most {LONGEST} bytes)"
)]
pub struct DiskNameError {
    what: &'static str,
    text: String,
}

fn checked(what: &'static str, text: &str) -> Result<String, DiskNameError> {
    let valid = text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.len() <= LONGEST
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(DiskNameError { what, text: text.chars().take(2 * LONGEST).collect() })
    }
}

/// Names one disk among those of a home: the id of the machine that it belongs to, or another name that its owner
/// chose (a volume's). It is always a file's name that needs no escaping, and never begins with a dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(String);

impl DiskId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DiskId {
    type Err = DiskNameError;

    fn from_str(text: &str) -> Result<Self, DiskNameError> {
        checked("disk", text).map(Self)
    }
}

impl From<&InstanceId> for DiskId {
    fn from(id: &InstanceId) -> Self {
        Self(id.as_str().to_owned())
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names one snapshot among those of a disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotName(String);

impl SnapshotName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotName {
    type Err = DiskNameError;

    fn from_str(text: &str) -> Result<Self, DiskNameError> {
        checked("snapshot", text).map(Self)
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A saved state of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSnapshot {
    /// Its name.
    pub name: SnapshotName,
    /// When it was made.
    pub created: Timestamp,
    /// The size that the disk had, in bytes. A restore brings that back too.
    pub size: u64,
}

/// What a disk takes, in bytes, counted from extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskUsage {
    /// The size that the machine sees.
    pub logical: u64,
    /// What would be freed if only this disk were removed, with its snapshots.
    pub exclusive: u64,
    /// What it or its snapshots share with others.
    pub shared: u64,
}

/// What all disks of a back end take.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DisksUsage {
    /// Each disk, by name.
    pub disks: Vec<(DiskId, DiskUsage)>,
    /// What they take together, in bytes: what several of them share is counted once.
    pub taken: u64,
}

/// A copy whose content is settled, but which nobody can see yet. Dropped, it leaves nothing.
///
/// Between the two steps a machine that was paused for its copy can run again: what takes long in finishing (putting the
/// copy on the storage) no longer cares what happens to the original.
pub trait PendingDisk: Send {
    /// Puts the copy on the storage and makes it visible, at once and whole.
    ///
    /// # Errors
    /// Its name was taken in the meantime, or its disk removed; the storage fails.
    fn finish(self: Box<Self>) -> Result<(), BackendError>;
}

/// Keeps the writable disks of machines.
///
/// Everything here is atomic: whatever happens to the calling process or to the host, a disk, a copy or a snapshot is
/// whole or not there. What a process leaves that was killed is taken away when the back end is opened the next time.
///
/// Nothing here knows whether a machine is using a disk. A running machine's disk may be copied (pause it, so that the
/// copy is of one instant) and grown; it must not be restored or removed.
pub trait DiskBackend: Send + Sync {
    /// The back end's name, as `kiln init` takes it.
    fn name(&self) -> &'static str;

    /// Whether copies share their blocks with the original. If not, a clone or a snapshot takes the time and the room of
    /// all that the disk holds.
    fn copies_on_write(&self) -> bool;

    /// Makes a disk of `size` bytes, rounded up to whole blocks (4 or 16 KiB), with an empty ext4 that its machine grows to that size.
    /// Returns the path to give to a hypervisor: a file or a block device, in raw format.
    ///
    /// # Errors
    /// The name is taken; the size is below or above what the file system can have; no room.
    fn create(&self, id: &DiskId, size: u64) -> Result<PathBuf, BackendError>;

    /// The path of a disk, as [`create`](Self::create) gave it.
    ///
    /// # Errors
    /// There is no such disk.
    fn path(&self, id: &DiskId) -> Result<PathBuf, BackendError>;

    /// A directory for other large files that belong to a disk (a machine's memory). Where files can be copied by sharing
    /// blocks, it is on one file system with all disks. It exists as long as the disk does, and vanishes with it.
    ///
    /// # Errors
    /// There is no such disk.
    fn directory(&self, id: &DiskId) -> Result<PathBuf, BackendError>;

    /// All disks, by name.
    ///
    /// # Errors
    /// They cannot be listed.
    fn list(&self) -> Result<Vec<DiskId>, BackendError>;

    /// Puts on the storage what the host still has of a disk in its caches only. Copying waits for this: called just
    /// before a machine is paused, it makes the pause short.
    ///
    /// # Errors
    /// There is no such disk; the storage fails.
    fn flush(&self, id: &DiskId) -> Result<(), BackendError>;

    /// Copies `source`, or its snapshot, for `id`. The copy is of the instant of the call.
    ///
    /// # Errors
    /// There is no such disk or snapshot; the name is taken; no room.
    fn start_clone(
        &self,
        source: &DiskId,
        snapshot: Option<&SnapshotName>,
        id: &DiskId,
    ) -> Result<Box<dyn PendingDisk>, BackendError>;

    /// [`start_clone`](Self::start_clone) and all that follows. Returns the path of the new disk.
    ///
    /// # Errors
    /// As both steps.
    fn clone_disk(
        &self,
        source: &DiskId,
        snapshot: Option<&SnapshotName>,
        id: &DiskId,
    ) -> Result<PathBuf, BackendError> {
        self.start_clone(source, snapshot, id)?.finish()?;
        self.path(id)
    }

    /// Saves the disk as it is at the instant of the call.
    ///
    /// # Errors
    /// There is no such disk; it has a snapshot of that name; no room.
    fn start_snapshot(&self, id: &DiskId, name: &SnapshotName) -> Result<Box<dyn PendingDisk>, BackendError>;

    /// [`start_snapshot`](Self::start_snapshot) and all that follows.
    ///
    /// # Errors
    /// As both steps.
    fn snapshot(&self, id: &DiskId, name: &SnapshotName) -> Result<(), BackendError> {
        self.start_snapshot(id, name)?.finish()
    }

    /// The snapshots of a disk, oldest first.
    ///
    /// # Errors
    /// There is no such disk.
    fn snapshots(&self, id: &DiskId) -> Result<Vec<DiskSnapshot>, BackendError>;

    /// Removes a snapshot. Clones that were made from it stay as they are.
    ///
    /// # Errors
    /// There is no such disk or snapshot.
    fn delete_snapshot(&self, id: &DiskId, name: &SnapshotName) -> Result<(), BackendError>;

    /// Puts a disk back to what it was at a snapshot, its size included. All snapshots stay. No machine may be using it.
    ///
    /// # Errors
    /// There is no such disk or snapshot; no room.
    fn restore(&self, id: &DiskId, name: &SnapshotName) -> Result<(), BackendError>;

    /// The size of a disk, in bytes.
    ///
    /// # Errors
    /// There is no such disk.
    fn size(&self, id: &DiskId) -> Result<u64, BackendError>;

    /// Grows a disk to `size` bytes, rounded up to whole blocks (4 or 16 KiB). Its machine may be running: hypervisor and guest then have to
    /// be told.
    ///
    /// # Errors
    /// There is no such disk; `size` is less than it has, or more than its file system can have.
    fn resize(&self, id: &DiskId, size: u64) -> Result<(), BackendError>;

    /// Whether [`rename`](Self::rename) works.
    fn can_rename(&self) -> bool {
        false
    }

    /// Gives a disk another name, with its snapshots and its directory; a machine that is using it goes on. Returns its path
    /// from now on.
    ///
    /// # Errors
    /// There is no such disk; the name is taken; this back end cannot.
    fn rename(&self, id: &DiskId, _to: &DiskId) -> Result<PathBuf, BackendError> {
        Err(BackendError::unsupported(format!("cannot rename the disk `{id}` on {}", self.name())))
    }

    /// What each disk takes, and what all take together. Reads the extents of all of them.
    ///
    /// # Errors
    /// Something cannot be read.
    fn usage(&self) -> Result<DisksUsage, BackendError>;

    /// Removes a disk with its snapshots and its directory. Removing what is not there is no error.
    ///
    /// # Errors
    /// It cannot be removed.
    fn remove(&self, id: &DiskId) -> Result<(), BackendError>;

    /// [`remove`](Self::remove) that does not wait for the room to be free: the disk is gone for everybody, and its blocks
    /// are given back by and by. Freeing many takes a file system longer than a short machine lives.
    ///
    /// # Errors
    /// It cannot be removed.
    fn discard(&self, id: &DiskId) -> Result<(), BackendError> {
        self.remove(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_of_files_that_need_no_escaping() {
        for good in ["a", "7", "before-upgrade_2.1", "A.b", &"x".repeat(100)] {
            assert_eq!(good.parse::<DiskId>().unwrap().as_str(), good);
            assert_eq!(good.parse::<SnapshotName>().unwrap().as_str(), good);
        }
        for bad in
            ["", ".", "..", ".tmp", "-a", "a/b", "a b", "a@b", "a:b", "ä", "a\0", "a\n", &"x".repeat(101)]
        {
            assert!(bad.parse::<DiskId>().is_err(), "{bad:?}");
            let error = bad.parse::<SnapshotName>().unwrap_err().to_string();
            assert!(error.contains("name of a snapshot"), "{error}");
        }
        let id = InstanceId::random();
        assert_eq!(DiskId::from(&id).as_str(), id.as_str());
    }
}
