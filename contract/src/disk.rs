//! Writable disks of machines, and how they are copied without copying.

use std::path::{Path, PathBuf};

use crate::{BackendError, InstanceId};

/// What a disk takes, in bytes, counted from extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskUsage {
    /// The size that the machine sees.
    pub logical: u64,
    /// What would be freed if only this disk were removed.
    pub exclusive: u64,
    /// What it shares with other disks.
    pub shared: u64,
}

/// Keeps the writable disks of machines.
pub trait DiskBackend: Send + Sync {
    /// The back end's name, as `kiln init` takes it.
    fn name(&self) -> &'static str;
    /// Makes a disk of `size` bytes for `id` from the template at `from`. Returns the path to give to a hypervisor.
    fn create(&self, id: &InstanceId, from: &Path, size: u64) -> Result<PathBuf, BackendError>;
    /// Makes a copy-on-write copy of `source`'s disk for `id`.
    fn clone_disk(&self, source: &InstanceId, id: &InstanceId) -> Result<PathBuf, BackendError>;
    /// Saves the disk of `id` under `name`.
    fn snapshot(&self, _id: &InstanceId, _name: &str) -> Result<(), BackendError> {
        Err(BackendError::unsupported(format!("the {} disk back end has no snapshots", self.name())))
    }
    /// Puts the disk of `id` back to the snapshot `name`.
    fn restore(&self, _id: &InstanceId, _name: &str) -> Result<(), BackendError> {
        Err(BackendError::unsupported(format!("the {} disk back end has no snapshots", self.name())))
    }
    /// Grows the disk of `id` to `size` bytes. Never shrinks.
    fn resize(&self, id: &InstanceId, size: u64) -> Result<(), BackendError>;
    /// What the disk of `id` takes.
    fn usage(&self, id: &InstanceId) -> Result<DiskUsage, BackendError>;
    /// Removes the disk of `id` and its snapshots. Removing what is not there is no error.
    fn remove(&self, id: &InstanceId) -> Result<(), BackendError>;
}
