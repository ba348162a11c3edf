//! How a stack is seen as a file system.

use std::path::{Path, PathBuf};

use crate::{BackendError, Change};

/// A tree to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewRequest {
    /// The merged tree, a metadata-only EROFS image.
    pub tree: PathBuf,
    /// The directory of objects.
    pub objects: PathBuf,
    /// Where it is to be seen.
    pub target: PathBuf,
    /// Where changes go; read-only without.
    pub scratch: Option<Scratch>,
}

/// Where an editable view keeps its changes: an overlay's two directories, on one file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scratch {
    /// What was changed, in overlayfs form.
    pub upper: PathBuf,
    /// The overlay's own; empty when nothing is mounted.
    pub work: PathBuf,
    /// The changes are thrown away when the view goes: nothing need be written back (overlayfs `volatile`). Without it,
    /// every unmount waits until the whole file system below is synced.
    pub volatile: bool,
}

/// Shows stacks.
pub trait ViewBackend: Send + Sync {
    /// The back end's name: `overlay`, `fuse`, `router`.
    fn name(&self) -> &'static str;
    /// Mounts a view. It is there when this returns.
    fn mount(&self, request: &ViewRequest) -> Result<(), BackendError>;
    /// Shows another stack in place of the one that is mounted at `request.target`.
    fn remount(&self, _request: &ViewRequest) -> Result<(), BackendError> {
        Err(BackendError::unsupported(format!("the {} view cannot be remounted", self.name())))
    }
    /// Takes a view away. Taking away what is not there is no error.
    fn unmount(&self, target: &Path) -> Result<(), BackendError>;
    /// What was changed in a view with a scratch.
    fn changes(&self, request: &ViewRequest) -> Result<Vec<Change>, BackendError>;
}
