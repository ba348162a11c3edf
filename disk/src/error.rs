//! What disks can fail with.

use std::io;
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, ByteSize, DiskId, ErrorKind, SnapshotName};

/// What disks can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A system call failed.
    #[error("cannot {doing} `{}`: {source}", path.display())]
    Io {
        /// What was being done: a verb.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no such disk.
    #[error("there is no disk `{disk}`")]
    NotFound {
        /// What was asked for.
        disk: DiskId,
    },
    /// The disk has no such snapshot.
    #[error("the disk `{disk}` has no snapshot `{snapshot}`")]
    NoSnapshot {
        /// The disk.
        disk: DiskId,
        /// What was asked for.
        snapshot: SnapshotName,
        /// What it has.
        others: Vec<SnapshotName>,
    },
    /// The name is taken.
    #[error("there is a disk `{disk}` already")]
    Exists {
        /// The name.
        disk: DiskId,
    },
    /// The snapshot's name is taken.
    #[error("the disk `{disk}` has a snapshot `{snapshot}` already")]
    SnapshotExists {
        /// The disk.
        disk: DiskId,
        /// The name.
        snapshot: SnapshotName,
    },
    /// A size that disks cannot have.
    #[error(
        "a disk cannot have {} ({size} bytes): it has at least {} and at most {}",
        ByteSize(*size), ByteSize(crate::template::SMALLEST), ByteSize(crate::template::LARGEST)
    )]
    BadSize {
        /// What was asked for.
        size: u64,
    },
    /// Disks and pools only grow.
    #[error(
        "cannot shrink {what} from {} to {} ({size} to {wanted} bytes): it can only grow",
        ByteSize(*size), ByteSize(*wanted)
    )]
    Shrink {
        /// Which disk or pool.
        what: String,
        /// The size that it has.
        size: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// No room for the data. Nothing of it is kept.
    #[error(
        "no space left in `{}`: {} more needed ({} to be written, {} free)",
        path.display(), ByteSize(needed.saturating_sub(*available)), ByteSize(*needed), ByteSize(*available)
    )]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes that were free, without what was written in vain.
        available: u64,
    },
    /// No room for what a file system itself notes about a copy that shares its data. Nothing of it is kept.
    #[error("no space left in `{}` for a copy, though it shares all data ({} free)", path.display(), ByteSize(*available))]
    NoRoomToShare {
        /// Where.
        path: PathBuf,
        /// Bytes that were free.
        available: u64,
    },
    /// Files cannot share blocks there.
    #[error("{file_system} at `{}` cannot share blocks between files: {source}", path.display())]
    NoReflinks {
        /// Where it was tried.
        path: PathBuf,
        /// Which file system is there.
        file_system: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program that does the work is not installed.
    #[error("`{program}` is needed to {purpose}, and it was not found in PATH or the usual places")]
    ProgramMissing {
        /// The program.
        program: String,
        /// What for.
        purpose: String,
    },
    /// A program failed.
    #[error("cannot {purpose}: {program} says: {said}")]
    ProgramFailed {
        /// The program.
        program: String,
        /// What was being done.
        purpose: String,
        /// What it wrote to standard error, or how it ended.
        said: String,
    },
    /// A program wrote what this one does not understand.
    #[error("{program} gave what cannot be read: {what}")]
    Unreadable {
        /// The program.
        program: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// Something about the pool or the dataset that keeps the disks.
    #[error("{what}")]
    Place {
        /// What is wrong, one sentence.
        what: String,
        /// What kind of failure.
        kind: ErrorKind,
        /// What the user can do.
        hint: Option<String>,
    },
}

impl DiskError {
    pub(crate) fn place(kind: ErrorKind, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Place { what: what.into(), kind, hint: Some(hint.into()) }
    }

    /// A lack of room, told of `place` and not of a directory in it that is gone already.
    pub(crate) fn told_of(mut self, place: &Path) -> Self {
        if let Self::DiskFull { path, .. }
        | Self::NoRoomToShare { path, .. }
        | Self::NoReflinks { path, .. } = &mut self
        {
            place.clone_into(path);
        }
        self
    }

    /// Whether nothing but a lack of room was in the way.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } | Self::NoSnapshot { .. } => ErrorKind::NotFound,
            Self::Exists { .. } | Self::SnapshotExists { .. } => ErrorKind::Conflict,
            Self::BadSize { .. } | Self::Shrink { .. } => ErrorKind::Invalid,
            Self::NoReflinks { .. } | Self::ProgramMissing { .. } => ErrorKind::Unsupported,
            Self::Place { kind, .. } => *kind,
            _ => ErrorKind::Failed,
        }
    }

    /// What the user can do about it, where there is something: a line of its own.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoSnapshot { others, .. } if !others.is_empty() => {
                let names: Vec<&str> = others.iter().map(SnapshotName::as_str).collect();
                Some(format!("it has {}", names.join(", ")))
            }
            Self::DiskFull { .. } | Self::NoRoomToShare { .. } => {
                Some("`kiln system df` tells what takes the room".into())
            }
            Self::NoReflinks { .. } => {
                Some("`kiln init` can make a pool whose disks share blocks on any file system".into())
            }
            Self::ProgramMissing { program, .. } => {
                let package = match program.as_str() {
                    "mkfs.btrfs" | "btrfs" => "btrfs-progs",
                    "zfs" => "zfsutils-linux",
                    _ => "mount",
                };
                Some(format!("install the package `{package}`"))
            }
            Self::Place { hint, .. } => hint.clone(),
            _ => None,
        }
    }
}

impl From<DiskError> for BackendError {
    fn from(error: DiskError) -> Self {
        let told = Self::new(error.kind(), error.to_string());
        match error.hint() {
            Some(hint) => told.hint(hint),
            None => told,
        }
    }
}

/// Whether an error says that a disk or a quota is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What the functions of this room return.
pub type Result<T> = std::result::Result<T, DiskError>;

/// Adds to a failed system call what it was for.
pub(crate) trait Context<T> {
    fn doing(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn doing(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| DiskError::Io { doing, path: path.as_ref().to_owned(), source: source.into() })
    }
}
