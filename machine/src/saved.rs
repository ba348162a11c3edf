//! A machine that was saved: what another is restored from.
//!
//! ```text
//! <directory>/
//!   template.json        what the template was made from
//!   memory               the template's memory file: mapped by every machine that was ever restored over it
//!   state                the state of the devices
//!   delta                what the machine itself had changed of the memory; a template has none
//! ```
//!
//! A template is saved so, and so is every fork and snapshot of a machine that began with it: `memory` is then another name of
//! the same file, so that a template can be removed at any time, and the host has what they share in memory once.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_contract::{BackendError, Digest, ErrorKind, Hypervisor};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::template::{Disk, Shape, failed, sparse};

/// The version of `template.json`.
pub(crate) const FORMAT: u32 = 4;
/// The record's file.
pub(crate) const RECORD: &str = "template.json";
/// The memory file.
pub(crate) const MEMORY: &str = "memory";
pub(crate) const STATE: &str = "state";
pub(crate) const DELTA: &str = "delta";

/// What `template.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    pub(crate) format: u32,
    /// The digest of all that the template depends on: its name.
    pub key: Digest,
    /// When it was made.
    pub made: Timestamp,
    /// The kernel's name.
    pub kernel: String,
    /// The hypervisor, its version and accelerator.
    pub hypervisor: String,
    /// The machines that start from it.
    pub shape: Shape,
    /// What they have for a writable disk.
    pub disk: Disk,
    /// How long the guest took from the start of the hypervisor until it was ready, in milliseconds.
    pub boot_millis: u64,
    /// The digest of the template's devices' state, and the bytes of its changed memory. What is saved over it later has others.
    pub(crate) sum: Option<(Digest, u64)>,
    /// The digest of the memory file, as [`content`] has it; `None` until it is complete.
    pub(crate) memory_sum: Option<Digest>,
    /// The same of the memory that was changed over another template's; `None` if it is over none.
    pub(crate) delta_sum: Option<Digest>,
}

/// A saved machine that is whole.
#[derive(Debug, Clone)]
pub struct Saved {
    directory: PathBuf,
    record: TemplateRecord,
}

impl Saved {
    /// What is saved in a directory, if all of it is there.
    pub fn load(directory: &Path) -> Option<Self> {
        let bytes = fs::read(directory.join(RECORD)).ok()?;
        let record: TemplateRecord = serde_json::from_slice(&bytes).ok()?;
        let length = |name: &str| fs::metadata(directory.join(name)).map_or(0, |file| file.len());
        let whole = record.format == FORMAT && length(MEMORY) >= record.shape.memory && length(STATE) > 0;
        whole.then(|| Self { directory: directory.to_owned(), record })
    }

    /// The beginnings of a machine that boots, at `base`: memory in which nothing is yet. Its forks are saved over it as
    /// others are over their template.
    pub(crate) fn nothing(
        base: &Path,
        kernel: &str,
        hypervisor: &dyn Hypervisor,
        shape: Shape,
    ) -> Result<Self, BackendError> {
        remove(base)?;
        fs::create_dir(base).map_err(failed("make", base))?;
        sparse(&base.join(MEMORY), shape.memory)?;
        let record = TemplateRecord {
            format: FORMAT,
            key: Digest::of(base.as_os_str().as_encoded_bytes()),
            made: Timestamp::now(),
            kernel: kernel.to_owned(),
            hypervisor: hypervisor.fingerprint(),
            shape,
            disk: Disk::Own,
            boot_millis: 0,
            sum: None,
            memory_sum: None,
            delta_sum: None,
        };
        let path = base.join(RECORD);
        let json =
            serde_json::to_vec_pretty(&record).map_err(|error| failed("write", &path)(error.into()))?;
        fs::write(&path, json).map_err(failed("write", &path))?;
        Ok(Self { directory: base.to_owned(), record })
    }

    /// Whether a template is as it was made: a hypervisor that is given half of a state, or another, may say so or hang.
    pub(crate) fn is_as_made(&self) -> bool {
        self.record.sum.is_some() && self.record.sum == sum(&self.directory)
    }

    /// Whether a template's memory is known not to be what it was when it was made, or cannot be read. All of it is read: only
    /// to be asked when a restore has failed.
    pub(crate) fn is_damaged(&self) -> bool {
        let differs = |name: &str, made: Option<Digest>| {
            made.is_some_and(|made| content(&self.directory.join(name)).ok() != Some(made))
        };
        differs(MEMORY, self.record.memory_sum) || differs(DELTA, self.record.delta_sum)
    }

    /// Whether both have one memory file.
    pub(crate) fn shares_memory(&self, other: &Self) -> bool {
        let file = |saved: &Self| fs::metadata(saved.memory()).ok().map(|file| (file.dev(), file.ino()));
        file(self).is_some_and(|own| Some(own) == file(other))
    }

    /// What is known of its template.
    pub fn record(&self) -> &TemplateRecord {
        &self.record
    }

    /// The memory file.
    pub fn memory(&self) -> PathBuf {
        self.directory.join(MEMORY)
    }

    /// What a hypervisor restores.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Bytes that it takes on the storage.
    pub fn size(&self) -> u64 {
        let blocks = |name: &str| {
            fs::metadata(self.directory.join(name)).map_or(0, |file| file.blocks().saturating_mul(512))
        };
        // With changes of its own, it has the memory of another one below.
        let memory = if self.own_memory().is_some() { 0 } else { blocks(MEMORY) };
        memory + [RECORD, STATE, DELTA].map(blocks).iter().sum::<u64>()
    }

    /// Bytes of memory that are its own; `None` for a template.
    pub fn own_memory(&self) -> Option<u64> {
        fs::metadata(self.directory.join(DELTA)).ok().map(|file| file.len())
    }

    /// Keeps the template from being removed until the result is dropped.
    ///
    /// # Errors
    /// If the file system cannot lock files.
    pub(crate) fn hold(&self) -> Result<File, BackendError> {
        let path = self.directory.join(RECORD);
        let open = || {
            let file = File::open(&path)?;
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockShared))?;
            Ok(file)
        };
        open().map_err(failed("hold", &path))
    }

    /// Whether a machine runs from it.
    pub(crate) fn is_held(&self) -> bool {
        File::open(self.directory.join(RECORD))
            .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
    }

    /// Refuses what another hypervisor has saved.
    ///
    /// # Errors
    /// [`ErrorKind::State`].
    pub(crate) fn check(&self, hypervisor: &dyn Hypervisor) -> Result<(), BackendError> {
        if self.record.hypervisor == hypervisor.fingerprint() {
            return Ok(());
        }
        Err(BackendError::new(
            ErrorKind::State,
            format!("the machine was saved by another {}, or on another processor", hypervisor.name()),
        )
        .hint("`kiln start --cold` starts it from its disk, without what was in its memory"))
    }

    /// Gives `directory` what is common to all that is restored from this and saved again.
    pub(crate) fn lay_under(&self, directory: &Path) -> Result<(), BackendError> {
        for name in [RECORD, MEMORY] {
            link(&self.directory.join(name), &directory.join(name))?;
        }
        Ok(())
    }

    /// The same with names of its own at `base`, which stay when what was saved is used up. A template's stay anyway, as long
    /// as it is held.
    pub(crate) fn with_base(&self, base: &Path) -> Result<Self, BackendError> {
        remove(base)?;
        fs::create_dir(base).map_err(failed("make", base))?;
        self.lay_under(base)?;
        Ok(Self { directory: base.to_owned(), record: self.record.clone() })
    }

    /// Makes `directory` hold the same.
    ///
    /// # Errors
    /// If it is there, or on another file system. Nothing is left then.
    pub(crate) fn copy_to(&self, directory: &Path) -> Result<Self, BackendError> {
        let parent = directory.parent().unwrap_or(directory);
        let staging = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(parent)
            .map_err(failed("make a directory in", parent))?;
        self.lay_under(staging.path())?;
        for name in [STATE, DELTA] {
            let from = self.directory.join(name);
            if from.exists() {
                link(&from, &staging.path().join(name))?;
            }
        }
        fs::rename(staging.path(), directory).map_err(failed("make", directory))?;
        let _ = staging.keep();
        Ok(Self { directory: directory.to_owned(), record: self.record.clone() })
    }
}

/// What [`TemplateRecord::sum`] is of what a directory holds. The state is small enough to be read at each start; memory is
/// not, and only has its length.
pub(crate) fn sum(directory: &Path) -> Option<(Digest, u64)> {
    let state = fs::read(directory.join(STATE)).ok()?;
    let delta = fs::metadata(directory.join(DELTA)).map_or(0, |file| file.len());
    Some((Digest::of(&state), delta))
}

/// The digest of a file of memory: of its length, and of each page that is not all zeros, with its place.
pub(crate) fn content(path: &Path) -> io::Result<Digest> {
    const PAGE: usize = 4096;
    static ZEROS: [u8; PAGE] = [0; PAGE];
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut hasher = kiln_contract::Hasher::new();
    hasher.update(&length.to_le_bytes());
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < length {
        let wanted = usize::try_from(length - at).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        file.read_exact_at(&mut buffer[..wanted], at)?;
        for (page, place) in buffer[..wanted].chunks(PAGE).zip((at..).step_by(PAGE)) {
            if page != &ZEROS[..page.len()] {
                hasher.update(&place.to_le_bytes());
                hasher.update(page);
            }
        }
        at += wanted as u64;
    }
    Ok(hasher.finish())
}

/// Removes a directory with what is saved in it, if there is one.
pub(crate) fn remove(directory: &Path) -> Result<(), BackendError> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", directory)(error)),
        _ => Ok(()),
    }
}

fn link(from: &Path, to: &Path) -> Result<(), BackendError> {
    fs::hard_link(from, to).map_err(failed("link", to))
}
