//! Directories in which kernels are made before they can be seen.
//!
//! Each is locked for as long as somebody works in it; one that nobody holds was left by a process that was killed, and
//! the next one that makes a directory removes it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{BootError, Result};

/// What names of unfinished things begin with.
const PREFIX: &str = ".making-";

/// A directory to work in, removed with all that is in it when this is dropped.
#[derive(Debug)]
pub(crate) struct Staging {
    directory: TempDir,
    /// Held, so that others leave the directory alone.
    held: File,
}

impl Staging {
    /// A new one in `parent`.
    pub(crate) fn begin(parent: &Path) -> Result<Self> {
        let lock = lock(parent)?;
        let made = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent);
        let directory = made.map_err(BootError::doing("make a directory in", parent))?;
        let held = File::open(directory.path()).map_err(BootError::doing("open", directory.path()))?;
        held.lock().map_err(BootError::doing("lock", directory.path()))?;
        drop(lock);
        Ok(Self { directory, held })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Brings what is in it to the disk, so that a name which is given to it then never names half of it.
    pub(crate) fn settle(&self) -> Result<()> {
        #[cfg(target_os = "linux")]
        let settled = rustix::fs::syncfs(&self.held).map_err(std::io::Error::from);
        #[cfg(not(target_os = "linux"))]
        let settled = self.held.sync_all();
        settled.map_err(BootError::doing("write out", self.path()))
    }
}

/// Held while names in `parent` are given or taken: for an instant only. What others left there is removed.
pub(crate) fn lock(parent: &Path) -> Result<File> {
    fs::create_dir_all(parent).map_err(BootError::doing("make", parent))?;
    let path = parent.join(".lock");
    let file = File::create(&path).map_err(BootError::doing("make", &path))?;
    file.lock().map_err(BootError::doing("lock", &path))?;
    sweep(parent)?;
    Ok(file)
}

/// A name in `parent` for something that is about to be renamed or removed.
pub(crate) fn name_for(parent: &Path, what: &str) -> PathBuf {
    parent.join(format!("{PREFIX}{what}-{}", std::process::id()))
}

fn sweep(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).map_err(BootError::doing("list", parent))? {
        let path = entry.map_err(BootError::doing("list", parent))?.path();
        let is_ours =
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
        if !is_ours {
            continue;
        }
        let is_link = path.is_symlink();
        let removed = match File::open(&path).map(|file| (file.try_lock(), file)) {
            _ if is_link => fs::remove_file(&path),
            Ok((Err(TryLockError::WouldBlock), _)) => continue,
            _ => fs::remove_dir_all(&path),
        };
        removed.map_err(BootError::doing("remove", &path))?;
    }
    Ok(())
}
