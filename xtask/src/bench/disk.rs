//! The filesystem that all contenders work on.
//!
//! First a fresh ext4 as distributions make it, in a file: figures then do not depend on what the host's own is and on
//! what was deleted there lately. (An ext4 without a journal, as some build machines have, looks at every inode that was
//! deleted in the last minutes before it gives out a new one.) Then the host's own, which says what that costs here.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::shell::{Outcome, capture};

static MOUNTED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The mounted filesystem; unmounted and deleted when dropped.
pub(crate) struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    /// Makes it and mounts it; [`directory`] is on it from then on.
    pub(crate) fn mount() -> Outcome<Self> {
        let directory = tempfile::Builder::new()
            .prefix("kiln-bench-")
            .tempdir_in("/var/tmp")
            .map_err(|error| format!("cannot make a directory in /var/tmp: {error}"))?;
        let (file, point) = (directory.path().join("disk"), directory.path().join("mounted"));
        std::fs::create_dir(&point).map_err(|error| format!("cannot make {}: {error}", point.display()))?;
        capture(Command::new("truncate").args(["--size", "12G"]).arg(&file))?;
        capture(
            Command::new("mkfs.ext4")
                .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
                .arg(&file),
        )?;
        capture(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&point))?;
        let disk = Self { directory };
        *MOUNTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(point);
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        *MOUNTED.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let _ = Command::new("umount").arg(self.directory.path().join("mounted")).output();
    }
}

/// Where the contenders keep what they make: on the mounted [`Disk`], or on the host's own filesystem.
pub(crate) fn directory() -> PathBuf {
    let mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    mounted.clone().unwrap_or_else(|| "/var/tmp".into())
}

/// What the host's own filesystem is.
pub(crate) fn of_host() -> String {
    let ask = |what: &str| {
        let found =
            capture(Command::new("findmnt").args(["-n", "-o", what, "-T", "/var/tmp"])).unwrap_or_default();
        found.trim().to_owned()
    };
    let (kind, source) = (ask("FSTYPE"), ask("SOURCE"));
    let device = source.rsplit('/').next().unwrap_or_default();
    let journal = |name: &str| Path::new("/proc/fs/jbd2").join(name).exists();
    if kind == "ext4" && !journal(&format!("{device}-8")) {
        "ext4 without a journal".to_owned()
    } else {
        kind
    }
}
