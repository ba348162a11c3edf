//! Disks that are files.
//!
//! ```text
//! disks/
//!   <disk>/
//!     disk.img               the disk, raw and sparse, mode 0600
//!     snapshots/<name>.img   saved states, mode 0400; a state's time is the file's
//!     files/                 other large files that belong to the disk
//!   .tmp/<random>/           what is being made or removed, held by an flock; swept when nobody holds it
//! ```
//!
//! Whatever is new is put together below `.tmp`, put on the storage, and renamed to its place: a disk as its whole directory,
//! a snapshot and what is restored as one file. Whatever is removed is renamed into `.tmp` first. So nothing is ever seen
//! half-made or half-removed, and all three back ends that keep files (`reflink`, `btrfs`, `sparse`) find each other's
//! disks: they differ in how a file is copied, and in what `disks/` is.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use jiff::Timestamp;
use kiln_contract::{BackendError, DiskBackend, DiskId, DiskSnapshot, DisksUsage, PendingDisk, SnapshotName};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use crate::copy::{Copying, copy, explain};
use crate::error::Context as _;
use crate::staging::{Staging, remove_at_once, remove_behind, set_aside, sweep, sync_directory};
use crate::template::{self, Identity};
use crate::{DiskError, Result, room, size, usage};

const IMAGE: &str = "disk.img";
const SNAPSHOTS: &str = "snapshots";
const FILES: &str = "files";
const TMP: &str = ".tmp";
const SUFFIX: &str = ".img";

/// Disks that are files below one directory.
#[derive(Debug, Clone)]
pub(crate) struct FileDisks {
    root: PathBuf,
    name: &'static str,
    how: Copying,
}

impl FileDisks {
    /// Those below `root`, which is made if it is not there, known as the back end `name`. Takes away what killed
    /// processes left.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub(crate) fn open(root: PathBuf, name: &'static str, how: Copying) -> Result<Self> {
        let tmp = root.join(TMP);
        if let Some(home) = root.parent() {
            fs::create_dir_all(home).doing("create", home)?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&tmp).doing("create", &tmp)?;
        sweep(&tmp)?;
        Ok(Self { root, name, how })
    }

    fn staging(&self) -> Result<Staging> {
        Staging::new(&self.root.join(TMP))
    }

    fn home(&self, id: &DiskId) -> PathBuf {
        self.root.join(id.as_str())
    }

    fn image(&self, id: &DiskId) -> PathBuf {
        self.home(id).join(IMAGE)
    }

    fn snapshot_file(&self, id: &DiskId, name: &SnapshotName) -> PathBuf {
        self.home(id).join(SNAPSHOTS).join(format!("{name}{SUFFIX}"))
    }

    fn open_image(&self, id: &DiskId, write: bool) -> Result<File> {
        let path = self.image(id);
        match OpenOptions::new().read(true).write(write).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(DiskError::NotFound { disk: id.clone() })
            }
            opened => opened.doing("open", &path),
        }
    }

    fn open_snapshot(&self, id: &DiskId, name: &SnapshotName) -> Result<File> {
        let path = self.snapshot_file(id, name);
        match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Err(self.no_snapshot(id, name)),
            opened => opened.doing("open", &path),
        }
    }

    fn no_snapshot(&self, id: &DiskId, name: &SnapshotName) -> DiskError {
        match self.list_snapshots(id) {
            Ok(snapshots) => DiskError::NoSnapshot {
                disk: id.clone(),
                snapshot: name.clone(),
                others: snapshots.into_iter().map(|snapshot| snapshot.name).collect(),
            },
            Err(error) => error,
        }
    }

    /// Keeps others from growing or restoring a disk until the result is dropped.
    fn lock(&self, id: &DiskId) -> Result<File> {
        let path = self.home(id);
        let gone = || DiskError::NotFound { disk: id.clone() };
        let directory = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(gone()),
            opened => opened.doing("open", &path)?,
        };
        flock(&directory, FlockOperation::LockExclusive).doing("lock", &path)?;
        // Removed while this waited, and perhaps made anew.
        let mine = directory.metadata().doing("read", &path)?;
        match fs::metadata(&path) {
            Ok(now) if (now.dev(), now.ino()) == (mine.dev(), mine.ino()) => Ok(directory),
            _ => Err(gone()),
        }
    }

    fn create_disk(&self, id: &DiskId, size: u64) -> Result<PathBuf> {
        let size = size::of_new(size)?;
        self.refuse_taken(id)?;
        let image = |image: &Path| {
            let file = File::create_new(image).doing("create", image)?;
            file.set_len(size).doing("set the size of", image)?;
            let identity = Identity::random().doing("choose a UUID for", image)?;
            template::write_ext4(&file, &identity).doing("write", image)?;
            Ok(file)
        };
        match self.staging().and_then(|staging| self.put_together(&staging, id, image)) {
            Err(error) if error.is_full() => Err(DiskError::DiskFull {
                path: self.root.clone(),
                needed: template::WRITTEN,
                available: room::available(&self.root)?,
            }),
            made => made.map(|()| self.image(id)),
        }
    }

    fn refuse_taken(&self, id: &DiskId) -> Result<()> {
        let path = self.home(id);
        match fs::symlink_metadata(&path) {
            Ok(_) => Err(DiskError::Exists { disk: id.clone() }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).doing("read", &path),
        }
    }

    /// Makes the directory of a disk around the image that `make` makes, puts all of it on the storage and makes it seen.
    fn put_together(
        &self,
        staging: &Staging,
        id: &DiskId,
        make: impl FnOnce(&Path) -> Result<File>,
    ) -> Result<()> {
        let new = staging.path("new");
        for directory in [new.clone(), new.join(SNAPSHOTS), new.join(FILES)] {
            DirBuilder::new().mode(0o700).create(&directory).doing("create", &directory)?;
        }
        let image = new.join(IMAGE);
        let file = make(&image)?;
        settle(&file, &image, 0o600)?;
        sync_directory(&new)?;
        let home = self.home(id);
        match fs::rename(&new, &home) {
            Err(error)
                if [ErrorKind::DirectoryNotEmpty, ErrorKind::AlreadyExists].contains(&error.kind()) =>
            {
                return Err(DiskError::Exists { disk: id.clone() });
            }
            renamed => renamed.doing("create", &home)?,
        }
        sync_directory(&self.root)
    }

    fn start_copy(&self, source: File, target: Target) -> Result<PendingCopy> {
        let staging = self.staging().map_err(|error| explain(error, self.how, &source, &self.root))?;
        let copied = copy(self.how, &source, &staging.path(IMAGE));
        let copied = copied.map_err(|error| error.told_of(&self.root))?;
        Ok(PendingCopy { disks: self.clone(), source, staging, copied, target })
    }

    fn list_snapshots(&self, id: &DiskId) -> Result<Vec<DiskSnapshot>> {
        let directory = self.home(id).join(SNAPSHOTS);
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(DiskError::NotFound { disk: id.clone() });
            }
            entries => entries.doing("read", &directory)?,
        };
        let mut snapshots = Vec::new();
        for entry in entries {
            let entry = entry.doing("read", &directory)?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)?.parse().ok()) else {
                continue;
            };
            // Deleted meanwhile.
            let Ok(metadata) = entry.metadata() else { continue };
            let modified = metadata.modified().ok().and_then(|time| Timestamp::try_from(time).ok());
            snapshots.push(DiskSnapshot {
                name,
                created: modified.unwrap_or(Timestamp::UNIX_EPOCH),
                size: metadata.len(),
            });
        }
        snapshots.sort_by(|one, other| (one.created, &one.name).cmp(&(other.created, &other.name)));
        Ok(snapshots)
    }

    fn restore_disk(&self, id: &DiskId, name: &SnapshotName) -> Result<()> {
        let _lock = self.lock(id)?;
        let pending =
            self.start_copy(self.open_snapshot(id, name)?, Target::Restored { disk: id.clone() })?;
        pending.finish_copy()
    }

    fn grow(&self, id: &DiskId, wanted: u64) -> Result<()> {
        let _lock = self.lock(id)?;
        let image = self.open_image(id, true)?;
        let path = self.image(id);
        let has = image.metadata().doing("read", &path)?.len();
        let wanted = size::of_grown(|| format!("the disk `{id}`"), has, wanted)?;
        if wanted > has {
            image.set_len(wanted).and_then(|()| image.sync_all()).doing("grow", &path)?;
        }
        Ok(())
    }

    fn list_disks(&self) -> Result<Vec<DiskId>> {
        let mut disks = Vec::new();
        for entry in fs::read_dir(&self.root).doing("read", &self.root)? {
            let name = entry.doing("read", &self.root)?.file_name();
            disks.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        disks.sort();
        Ok(disks)
    }

    fn usage_of_all(&self) -> Result<DisksUsage> {
        let mut owners = Vec::new();
        for id in self.list_disks()? {
            let mut files = vec![self.image(&id)];
            for directory in [SNAPSHOTS, FILES] {
                files_below(&self.home(&id).join(directory), &mut files)?;
            }
            owners.push((id, files));
        }
        let (each, taken) = usage::of_owners(owners.iter().map(|(_, files)| files.as_slice()))?;
        let sized = owners.into_iter().zip(each).filter_map(|((id, _), usage)| Some((id, usage?)));
        Ok(DisksUsage { disks: sized.collect(), taken })
    }

    fn remove_disk(&self, id: &DiskId) -> Result<()> {
        if remove_at_once(&self.home(id), &self.root.join(TMP))? {
            sync_directory(&self.root)?;
        }
        Ok(())
    }

    fn rename_disk(&self, id: &DiskId, to: &DiskId) -> Result<PathBuf> {
        let (from, home) = (self.home(id), self.home(to));
        match renameat_with(CWD, &from, CWD, &home, RenameFlags::NOREPLACE) {
            Err(rustix::io::Errno::EXIST) => return Err(DiskError::Exists { disk: to.clone() }),
            Err(rustix::io::Errno::NOENT) => return Err(DiskError::NotFound { disk: id.clone() }),
            renamed => renamed.doing("rename", &from)?,
        }
        sync_directory(&self.root)?;
        Ok(self.image(to))
    }

    fn delete(&self, id: &DiskId, name: &SnapshotName) -> Result<()> {
        let path = self.snapshot_file(id, name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(self.no_snapshot(id, name)),
            removed => removed.doing("remove", &path)?,
        }
        sync_directory(&self.home(id).join(SNAPSHOTS))
    }
}

/// Sets what a copy may have from its original, and puts the file on the storage.
fn settle(file: &File, path: &Path, mode: u32) -> Result<()> {
    let now = SystemTime::now();
    file.set_permissions(Permissions::from_mode(mode))
        .and_then(|()| file.set_modified(now))
        .and_then(|()| file.sync_all())
        .doing("write to disk", path)
}

/// All regular files below a directory that may be vanishing.
fn files_below(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.doing("read", directory)?,
    };
    for entry in entries {
        let entry = entry.doing("read", directory)?;
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path(), files)?,
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
    Ok(())
}

/// What a copy becomes.
#[derive(Debug)]
enum Target {
    Disk { disk: DiskId },
    Snapshot { disk: DiskId, name: SnapshotName },
    Restored { disk: DiskId },
}

/// A copy in a staging directory.
#[derive(Debug)]
struct PendingCopy {
    disks: FileDisks,
    source: File,
    staging: Staging,
    copied: File,
    target: Target,
}

impl PendingCopy {
    fn finish_copy(self) -> Result<()> {
        let Self { disks, source, staging, copied, target } = self;
        let put = put_in_place(&disks, &staging, copied, &target);
        drop(staging);
        put.map_err(|error| explain(error, disks.how, &source, &disks.root))
    }
}

fn put_in_place(disks: &FileDisks, staging: &Staging, copied: File, target: &Target) -> Result<()> {
    let made = staging.path(IMAGE);
    match target {
        Target::Disk { disk } => disks.put_together(staging, disk, |image| {
            fs::rename(&made, image).doing("move", &made)?;
            Ok(copied)
        }),
        Target::Snapshot { disk, name } => {
            settle(&copied, &made, 0o400)?;
            let to = disks.snapshot_file(disk, name);
            match renameat_with(CWD, &made, CWD, &to, RenameFlags::NOREPLACE) {
                Err(rustix::io::Errno::EXIST) => {
                    return Err(DiskError::SnapshotExists { disk: disk.clone(), snapshot: name.clone() });
                }
                Err(rustix::io::Errno::NOENT) => return Err(DiskError::NotFound { disk: disk.clone() }),
                renamed => renamed.doing("create", &to)?,
            }
            sync_directory(&disks.home(disk).join(SNAPSHOTS))
        }
        Target::Restored { disk } => {
            settle(&copied, &made, 0o600)?;
            let to = disks.image(disk);
            match fs::rename(&made, &to) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Err(DiskError::NotFound { disk: disk.clone() });
                }
                renamed => renamed.doing("replace", &to)?,
            }
            sync_directory(&disks.home(disk))
        }
    }
}

impl PendingDisk for PendingCopy {
    fn finish(self: Box<Self>) -> std::result::Result<(), BackendError> {
        Ok(self.finish_copy()?)
    }
}

impl DiskBackend for FileDisks {
    fn name(&self) -> &'static str {
        self.name
    }

    fn copies_on_write(&self) -> bool {
        self.how == Copying::Reflink
    }

    fn create(&self, id: &DiskId, size: u64) -> std::result::Result<PathBuf, BackendError> {
        Ok(self.create_disk(id, size)?)
    }

    fn path(&self, id: &DiskId) -> std::result::Result<PathBuf, BackendError> {
        self.open_image(id, false)?;
        Ok(self.image(id))
    }

    fn directory(&self, id: &DiskId) -> std::result::Result<PathBuf, BackendError> {
        self.open_image(id, false)?;
        Ok(self.home(id).join(FILES))
    }

    fn list(&self) -> std::result::Result<Vec<DiskId>, BackendError> {
        Ok(self.list_disks()?)
    }

    fn flush(&self, id: &DiskId) -> std::result::Result<(), BackendError> {
        let image = self.open_image(id, false)?;
        Ok(image.sync_data().doing("write to disk", self.image(id))?)
    }

    fn start_clone(
        &self,
        source: &DiskId,
        snapshot: Option<&SnapshotName>,
        id: &DiskId,
    ) -> std::result::Result<Box<dyn PendingDisk>, BackendError> {
        self.refuse_taken(id)?;
        let original = match snapshot {
            Some(name) => self.open_snapshot(source, name)?,
            None => self.open_image(source, false)?,
        };
        Ok(Box::new(self.start_copy(original, Target::Disk { disk: id.clone() })?))
    }

    fn start_snapshot(
        &self,
        id: &DiskId,
        name: &SnapshotName,
    ) -> std::result::Result<Box<dyn PendingDisk>, BackendError> {
        let original = self.open_image(id, false)?;
        if self.snapshot_file(id, name).exists() {
            return Err(DiskError::SnapshotExists { disk: id.clone(), snapshot: name.clone() }.into());
        }
        Ok(Box::new(self.start_copy(original, Target::Snapshot { disk: id.clone(), name: name.clone() })?))
    }

    fn snapshots(&self, id: &DiskId) -> std::result::Result<Vec<DiskSnapshot>, BackendError> {
        Ok(self.list_snapshots(id)?)
    }

    fn delete_snapshot(&self, id: &DiskId, name: &SnapshotName) -> std::result::Result<(), BackendError> {
        Ok(self.delete(id, name)?)
    }

    fn restore(&self, id: &DiskId, name: &SnapshotName) -> std::result::Result<(), BackendError> {
        Ok(self.restore_disk(id, name)?)
    }

    fn size(&self, id: &DiskId) -> std::result::Result<u64, BackendError> {
        let image = self.open_image(id, false)?;
        Ok(image.metadata().doing("read", self.image(id))?.len())
    }

    fn resize(&self, id: &DiskId, size: u64) -> std::result::Result<(), BackendError> {
        Ok(self.grow(id, size)?)
    }

    fn can_rename(&self) -> bool {
        true
    }

    fn rename(&self, id: &DiskId, to: &DiskId) -> std::result::Result<PathBuf, BackendError> {
        Ok(self.rename_disk(id, to)?)
    }

    fn usage(&self) -> std::result::Result<DisksUsage, BackendError> {
        Ok(self.usage_of_all()?)
    }

    fn remove(&self, id: &DiskId) -> std::result::Result<(), BackendError> {
        Ok(self.remove_disk(id)?)
    }

    fn discard(&self, id: &DiskId) -> std::result::Result<(), BackendError> {
        if let Some(aside) = set_aside(&self.home(id), &self.root.join(TMP))? {
            remove_behind(&aside);
        }
        Ok(())
    }
}
