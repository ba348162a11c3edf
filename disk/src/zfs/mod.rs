//! Disks that are ZFS volumes.
//!
//! ```text
//! <dataset>/<disk>              a disk; the property kiln:disk of every volume tells whose it is
//! <dataset>/<disk>@snap-<name>  a saved state
//! <dataset>/<disk>@base-<token> what clones were made from
//! <dataset>/making:<token>      being made
//! <dataset>/old:<token>         what was a disk until that was restored or removed, kept while snapshots on it are needed
//! disks/<disk>/files/           other files that belong to a disk, in the home
//! disks/.tmp/<token>/           held by an flock while whatever has this token is being done
//! ```
//!
//! ZFS rolls back only to the last snapshot, and destroys nothing that has clones. So a restore never rolls back: it clones the
//! snapshot, renames the disk to `old:…` and the clone to the disk; a snapshot stays where it was made, and belongs to the disk
//! by the property. A removed disk becomes an `old:…` of nobody, and goes when the last clone that stands on it does. Such
//! volumes are rolled back to their last snapshot: what they wrote later nobody needs. What killed processes left is finished
//! or taken away when the back end is opened the next time.
//!
//! The kernel renames devices after `zfs rename` has ended, in the order in which it was asked to; until then a device may
//! have a name that another volume has already, and a volume made with that name gets no device. So whoever renames waits
//! until the device has the new name.

mod devices;
mod leavings;
mod listing;
mod pending;
#[cfg(test)]
mod tests;
mod usage;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use kiln_contract::{
    BackendError, DiskBackend, DiskId, DiskSnapshot, DisksUsage, ErrorKind as Kind, Home, PendingDisk,
    SnapshotName,
};

use self::devices::{Devices, HostDevices};
use self::listing::{COLUMNS, Listing, Role, Volume};
use self::pending::{PendingVolume, Rest};
use crate::error::Context as _;
use crate::programs::{HostPrograms, Programs};
use crate::staging::{Staging, remove_at_once, sweep};
use crate::template::{self, Identity};
use crate::{DiskError, Result, size};

/// A new disk takes less than this, in bytes.
const LEAST_ROOM: u64 = 256 << 10;

/// The volumes' block, in bytes: sizes are multiples of it.
const BLOCK: u64 = 16 << 10;

/// Disks that are volumes of a ZFS dataset.
#[derive(Debug, Clone)]
pub(crate) struct ZfsDisks {
    dataset: String,
    root: PathBuf,
    devices: Arc<dyn Devices>,
    programs: Arc<dyn Programs>,
}

impl ZfsDisks {
    /// Those below `dataset`, which exists. Finishes or takes away what killed processes left.
    ///
    /// # Errors
    /// There is no such dataset, or no `zfs`; this is not root.
    pub(crate) fn open(home: &Home, dataset: &str) -> Result<Self> {
        Self::with(home.disks(), dataset, Arc::new(HostDevices), Arc::new(HostPrograms))
    }

    /// Whether there could be disks below `dataset`.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub(crate) fn examine(home: &Home, dataset: &str) -> Result<()> {
        Self::below(home.disks(), dataset, Arc::new(HostDevices), Arc::new(HostPrograms)).map(drop)
    }

    fn below(
        root: PathBuf,
        dataset: &str,
        devices: Arc<dyn Devices>,
        programs: Arc<dyn Programs>,
    ) -> Result<Self> {
        check_dataset(dataset)?;
        let disks = Self { dataset: dataset.to_owned(), root, devices, programs };
        disks.look_at_dataset().map(|()| disks)
    }

    fn with(
        root: PathBuf,
        dataset: &str,
        devices: Arc<dyn Devices>,
        programs: Arc<dyn Programs>,
    ) -> Result<Self> {
        let disks = Self::below(root, dataset, devices, programs)?;
        let tmp = disks.tmp();
        if let Some(home) = disks.root.parent() {
            fs::create_dir_all(home).doing("create", home)?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&tmp).doing("create", &tmp)?;
        sweep(&tmp)?;
        disks.recover()?;
        Ok(disks)
    }

    fn look_at_dataset(&self) -> Result<()> {
        let arguments = ["list", "-H", "-o", "type", &self.dataset];
        let hint = format!("`zfs create -o canmount=off {}` makes one", self.dataset);
        match self.zfs("look at the dataset for disks", &arguments) {
            Ok(kind) if kind.trim() == "filesystem" => Ok(()),
            Ok(kind) => {
                let what = format!(
                    "`{}` is a {}, and disks need a file system's dataset",
                    self.dataset,
                    kind.trim()
                );
                Err(DiskError::place(Kind::Invalid, what, hint))
            }
            Err(DiskError::ProgramFailed { said, .. }) if said.contains("does not exist") => {
                let what = format!("there is no ZFS dataset `{}`", self.dataset);
                Err(DiskError::place(Kind::NotFound, what, hint))
            }
            Err(error) => Err(error),
        }
    }

    fn zfs(&self, purpose: &str, arguments: &[&str]) -> Result<String> {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        self.programs.run(purpose, "zfs", &arguments)
    }

    fn listing(&self) -> Result<Listing> {
        let arguments = ["list", "-H", "-p", "-r", "-t", "volume,snapshot", "-o", COLUMNS, &self.dataset];
        Listing::parse(&self.dataset, &self.zfs("list disks", &arguments)?)
    }

    fn tmp(&self) -> PathBuf {
        self.root.join(".tmp")
    }

    /// The tokens of what is being done, by this process or another.
    fn alive(&self) -> Result<BTreeSet<String>> {
        let tmp = self.tmp();
        let entries = fs::read_dir(&tmp).doing("read", &tmp)?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    fn volume(&self, name: impl std::fmt::Display) -> String {
        format!("{}/{name}", self.dataset)
    }

    /// Puts on the storage what the host has of a disk in its caches: snapshots know nothing of it.
    fn flush_volume(&self, id: &DiskId) -> Result<()> {
        let path = self.wait_for_device(&self.volume(id))?;
        let device = File::open(&path).doing("open", &path)?;
        device.sync_data().doing("write to disk", &path)
    }

    fn find<'l>(&self, listing: &'l Listing, id: &DiskId) -> Result<&'l Volume> {
        listing.live(id).ok_or_else(|| DiskError::NotFound { disk: id.clone() })
    }

    fn refuse_taken(&self, listing: &Listing, id: &DiskId) -> Result<()> {
        if listing.live(id).is_some() { Err(DiskError::Exists { disk: id.clone() }) } else { Ok(()) }
    }

    /// The full name of a disk's snapshot, and whether it has clones.
    fn find_snapshot(&self, listing: &Listing, id: &DiskId, name: &SnapshotName) -> Result<(String, bool)> {
        self.find(listing, id)?;
        let all = listing.snapshots_of(id);
        match all.iter().find(|(_, has)| *has == name) {
            Some((snapshot, _)) => Ok((snapshot.name.clone(), !snapshot.clones.is_empty())),
            None => Err(DiskError::NoSnapshot {
                disk: id.clone(),
                snapshot: name.clone(),
                others: all.into_iter().map(|(_, name)| name.clone()).collect(),
            }),
        }
    }

    fn begin(&self) -> Result<(Staging, String)> {
        let staging = Staging::new(&self.tmp())?;
        let token = staging.name();
        Ok((staging, token))
    }

    fn create_volume(&self, id: &DiskId, wanted: u64) -> Result<PathBuf> {
        let size = size::of_new(wanted)?.next_multiple_of(BLOCK).to_string();
        self.refuse_taken(&self.listing()?, id)?;
        let (staging, token) = self.begin()?;
        let made = self.volume(format_args!("making:{token}"));
        let purpose = format!("create the disk `{id}`");
        let whose = format!("kiln:disk={id}");
        let block = BLOCK.to_string();
        let create = ["create", "-s", "-b", &block, "-o", "volmode=dev", "-o", &whose, "-V", &size, &made];
        let put = self.zfs(&purpose, &create).and_then(|_| {
            let device = self.wait_for_device(&made)?;
            let file = OpenOptions::new().write(true).open(&device).doing("open", &device)?;
            let identity = Identity::random().doing("choose a UUID for", &device)?;
            let written = template::write_ext4(&file, &identity).and_then(|()| file.sync_all());
            written.doing("write", &device).map_err(|error| self.or_full(error))?;
            drop(file);
            self.rename_to_disk(&purpose, &made, id)
        });
        drop(staging);
        if put.is_err() {
            self.take_away_unneeded();
        }
        put
    }

    /// What was in the way of writing: volumes tell a lack of room as an I/O error.
    fn or_full(&self, error: DiskError) -> DiskError {
        let asked = ["list", "-H", "-p", "-o", "available", &self.dataset];
        let available = self.zfs("look for room", &asked).ok().and_then(|text| text.trim().parse().ok());
        match available {
            Some(available) if available < LEAST_ROOM => {
                DiskError::DiskFull { path: self.dataset.clone().into(), needed: LEAST_ROOM, available }
            }
            _ => error,
        }
    }

    /// Makes a volume a disk. If there is one of that name, it stays as it is.
    fn rename_to_disk(&self, purpose: &str, from: &str, id: &DiskId) -> Result<PathBuf> {
        match self.rename(purpose, from, &self.volume(id)) {
            Err(DiskError::ProgramFailed { said, .. }) if said.contains("already exists") => {
                Err(DiskError::Exists { disk: id.clone() })
            }
            renamed => renamed,
        }
    }

    /// Makes a volume of a snapshot, for a disk. It is there with its device or not at all.
    fn clone_volume(&self, purpose: &str, snapshot: &str, id: &DiskId, to: &str) -> Result<()> {
        let whose = format!("kiln:disk={id}");
        self.zfs(purpose, &["clone", "-o", "volmode=dev", "-o", &whose, snapshot, to])?;
        self.wait_for_device(to).map(drop).inspect_err(|_| {
            if let Err(error) = self.destroy(to, Instant::now()) {
                tracing::debug!(to, %error, "it stays");
            }
        })
    }

    /// Makes a snapshot that nobody sees, as the base of something.
    fn base(&self, purpose: &str, id: &DiskId, token: &str) -> Result<String> {
        self.flush_volume(id)?;
        let base = format!("{}@base-{token}", self.volume(id));
        self.zfs(purpose, &["snapshot", &base])?;
        Ok(base)
    }

    fn restore_volume(&self, id: &DiskId, name: &SnapshotName) -> Result<()> {
        let (snapshot, _) = self.find_snapshot(&self.listing()?, id, name)?;
        let (staging, token) = self.begin()?;
        let purpose = format!("restore the disk `{id}`");
        let made = self.volume(format_args!("making:{token}"));
        let old = self.volume(format_args!("old:{token}"));
        let put = self.clone_volume(&purpose, &snapshot, id, &made).and_then(|()| {
            self.rename(&purpose, &self.volume(id), &old)?;
            self.rename_to_disk(&purpose, &made, id)
        });
        if put.is_err() && self.listing().is_ok_and(|listing| listing.live(id).is_none()) {
            // If that fails too, whoever opens the disks next finishes the restore.
            if let Err(error) = self.rename(&purpose, &old, &self.volume(id)) {
                tracing::warn!(%error, disk = %id, "the disk is not in its place");
            }
        }
        drop(staging);
        self.take_away_unneeded();
        put.map(drop)
    }

    fn delete(&self, id: &DiskId, name: &SnapshotName) -> Result<()> {
        let (snapshot, has_clones) = self.find_snapshot(&self.listing()?, id, name)?;
        let purpose = format!("remove the snapshot `{name}` of `{id}`");
        if !has_clones {
            return self.zfs(&purpose, &["destroy", &snapshot]).map(drop);
        }
        // Its clones stand on it: it stays without its name until they are gone.
        let (_staging, token) = self.begin()?;
        let volume = snapshot.split('@').next().unwrap_or_default();
        self.zfs(&purpose, &["rename", &snapshot, &format!("{volume}@base-{token}")]).map(drop)
    }

    fn grow(&self, id: &DiskId, wanted: u64) -> Result<()> {
        let listing = self.listing()?;
        let has = self.find(&listing, id)?.size;
        let what = || format!("the disk `{id}`");
        // What was rounded up once may be asked for again.
        if wanted.checked_next_multiple_of(BLOCK) == Some(has) {
            return Ok(());
        }
        let size = size::of_grown(what, has, wanted)?.next_multiple_of(BLOCK);
        let purpose = format!("grow the disk `{id}`");
        self.zfs(&purpose, &["set", &format!("volsize={size}"), &self.volume(id)]).map(drop)
    }

    fn remove_volume(&self, id: &DiskId) -> Result<()> {
        let purpose = format!("remove the disk `{id}`");
        let listing = self.listing()?;
        let mut nameless: Vec<String> = listing
            .volumes
            .iter()
            .filter(|volume| volume.disk.as_ref() == Some(id) && matches!(volume.role, Role::Old(_)))
            .map(|volume| volume.name.clone())
            .collect();
        if listing.live(id).is_some() {
            let mut token = [0; 8];
            getrandom::fill(&mut token).map_err(io::Error::other).doing("choose a name in", &self.root)?;
            let old = self.volume(format_args!("old:{:016x}", u64::from_ne_bytes(token)));
            self.rename(&purpose, &self.volume(id), &old)?;
            nameless.push(old);
        }
        if !nameless.is_empty() {
            let volumes = nameless.iter().map(String::as_str);
            let inherit: Vec<&str> = ["inherit", "kiln:disk"].into_iter().chain(volumes).collect();
            self.zfs(&purpose, &inherit)?;
        }
        remove_at_once(&self.root.join(id.as_str()), &self.tmp())?;
        self.take_away_unneeded();
        Ok(())
    }
}

/// Whether text can be a dataset's name, so that none is taken for an option or a snapshot.
fn check_dataset(name: &str) -> Result<()> {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte))
    };
    if name.len() <= 100 && name.split('/').all(part) {
        return Ok(());
    }
    let what = format!("`{name}` cannot be the name of a ZFS dataset for disks");
    Err(DiskError::place(Kind::Invalid, what, "a pool and a path in it, such as tank/kiln"))
}

impl DiskBackend for ZfsDisks {
    fn name(&self) -> &'static str {
        "zfs"
    }

    fn copies_on_write(&self) -> bool {
        true
    }

    fn create(&self, id: &DiskId, size: u64) -> std::result::Result<PathBuf, BackendError> {
        Ok(self.create_volume(id, size)?)
    }

    fn path(&self, id: &DiskId) -> std::result::Result<PathBuf, BackendError> {
        self.find(&self.listing()?, id)?;
        Ok(self.wait_for_device(&self.volume(id))?)
    }

    fn directory(&self, id: &DiskId) -> std::result::Result<PathBuf, BackendError> {
        self.find(&self.listing()?, id)?;
        let path = self.root.join(id.as_str()).join("files");
        DirBuilder::new().recursive(true).mode(0o700).create(&path).doing("create", &path)?;
        Ok(path)
    }

    fn list(&self) -> std::result::Result<Vec<DiskId>, BackendError> {
        let mut disks: Vec<DiskId> = self
            .listing()?
            .volumes
            .into_iter()
            .filter_map(|volume| match volume.role {
                Role::Live(id) => Some(id),
                _ => None,
            })
            .collect();
        disks.sort();
        Ok(disks)
    }

    fn flush(&self, id: &DiskId) -> std::result::Result<(), BackendError> {
        self.find(&self.listing()?, id)?;
        Ok(self.flush_volume(id)?)
    }

    fn start_clone(
        &self,
        source: &DiskId,
        snapshot: Option<&SnapshotName>,
        id: &DiskId,
    ) -> std::result::Result<Box<dyn PendingDisk>, BackendError> {
        let listing = self.listing()?;
        self.refuse_taken(&listing, id)?;
        let (staging, token) = self.begin()?;
        let snapshot = match snapshot {
            Some(name) => self.find_snapshot(&listing, source, name)?.0,
            None => {
                self.find(&listing, source)?;
                self.base(&format!("copy the disk `{source}`"), source, &token)?
            }
        };
        let rest = Rest::Clone { snapshot, id: id.clone() };
        Ok(Box::new(PendingVolume { disks: self.clone(), staging: Some(staging), rest }))
    }

    fn start_snapshot(
        &self,
        id: &DiskId,
        name: &SnapshotName,
    ) -> std::result::Result<Box<dyn PendingDisk>, BackendError> {
        let listing = self.listing()?;
        self.find(&listing, id)?;
        if listing.snapshots_of(id).iter().any(|(_, has)| *has == name) {
            return Err(DiskError::SnapshotExists { disk: id.clone(), snapshot: name.clone() }.into());
        }
        let (staging, token) = self.begin()?;
        let base = self.base(&format!("save the disk `{id}`"), id, &token)?;
        let rest = Rest::Name { base, id: id.clone(), name: name.clone() };
        Ok(Box::new(PendingVolume { disks: self.clone(), staging: Some(staging), rest }))
    }

    fn snapshots(&self, id: &DiskId) -> std::result::Result<Vec<DiskSnapshot>, BackendError> {
        let listing = self.listing()?;
        self.find(&listing, id)?;
        let snapshots = listing.snapshots_of(id).into_iter().map(|(snapshot, name)| DiskSnapshot {
            name: name.clone(),
            created: Timestamp::from_second(snapshot.created).unwrap_or(Timestamp::UNIX_EPOCH),
            size: snapshot.size,
        });
        Ok(snapshots.collect())
    }

    fn delete_snapshot(&self, id: &DiskId, name: &SnapshotName) -> std::result::Result<(), BackendError> {
        Ok(self.delete(id, name)?)
    }

    fn restore(&self, id: &DiskId, name: &SnapshotName) -> std::result::Result<(), BackendError> {
        Ok(self.restore_volume(id, name)?)
    }

    fn size(&self, id: &DiskId) -> std::result::Result<u64, BackendError> {
        Ok(self.find(&self.listing()?, id)?.size)
    }

    fn resize(&self, id: &DiskId, size: u64) -> std::result::Result<(), BackendError> {
        Ok(self.grow(id, size)?)
    }

    fn usage(&self) -> std::result::Result<DisksUsage, BackendError> {
        Ok(usage::usage(&self.listing()?))
    }

    fn remove(&self, id: &DiskId) -> std::result::Result<(), BackendError> {
        Ok(self.remove_volume(id)?)
    }
}
