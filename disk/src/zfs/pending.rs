//! Copies whose content is settled in a snapshot that nobody sees.

use kiln_contract::{BackendError, DiskId, PendingDisk, SnapshotName};

use super::ZfsDisks;
use crate::staging::Staging;
use crate::{DiskError, Result};

/// What is left to do for a copy.
#[derive(Debug)]
pub(super) enum Rest {
    Clone { snapshot: String, id: DiskId },
    Name { base: String, id: DiskId, name: SnapshotName },
}

/// A copy of which there is a snapshot that nobody sees.
#[derive(Debug)]
pub(super) struct PendingVolume {
    pub(super) disks: ZfsDisks,
    /// Its token is the snapshot's. `None` when it is finished.
    pub(super) staging: Option<Staging>,
    pub(super) rest: Rest,
}

impl PendingVolume {
    fn finish_copy(&self) -> Result<()> {
        let disks = &self.disks;
        match &self.rest {
            Rest::Clone { snapshot, id } => {
                disks.refuse_taken(&disks.listing()?, id)?;
                let purpose = format!("create the disk `{id}`");
                disks.clone_volume(&purpose, snapshot, id, &disks.volume(id))
            }
            Rest::Name { base, id, name } => {
                let listing = disks.listing()?;
                if listing.snapshots_of(id).iter().any(|(_, has)| *has == name) {
                    return Err(DiskError::SnapshotExists { disk: id.clone(), snapshot: name.clone() });
                }
                let named = format!("{}@snap-{name}", disks.volume(id));
                disks.zfs(&format!("save `{name}` of `{id}`"), &["rename", base, &named]).map(drop)
            }
        }
    }
}

impl PendingDisk for PendingVolume {
    fn finish(mut self: Box<Self>) -> std::result::Result<(), BackendError> {
        let finished = self.finish_copy();
        if finished.is_ok() {
            self.staging = None;
        }
        Ok(finished?)
    }
}

impl Drop for PendingVolume {
    fn drop(&mut self) {
        if self.staging.take().is_some() {
            self.disks.take_away_unneeded();
        }
    }
}
