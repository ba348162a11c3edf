use std::io;
use std::path::{Path, PathBuf};

use kiln_contract::{ByteSize, Digest, DigestError};

use crate::Limit;

/// What a store can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
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
    /// The stream that was being imported, or written to, failed.
    #[error("cannot {doing}: {source}")]
    Stream {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The file system of the store has no room for all of an import, or for an image disk. Nothing of it is kept.
    #[error(
        "no space left in `{}`: {} more needed ({} to be written, {} free)",
        path.display(), ByteSize(needed.saturating_sub(*available)), ByteSize(*needed),
        ByteSize(*available)
    )]
    DiskFull {
        /// The store.
        path: PathBuf,
        /// Bytes that would have been written.
        needed: u64,
        /// Bytes that were free once what was written of it had been removed.
        available: u64,
    },
    /// The file system of the store has no inodes left. Nothing of what was to be written is kept.
    #[error("no inodes left in `{}`: {needed} files to be written, {available} free", path.display())]
    NoInodes {
        /// The store.
        path: PathBuf,
        /// Files that would have been written.
        needed: u64,
        /// Inodes that were free.
        available: u64,
    },
    /// The store was written by a newer version.
    #[error(
        "the store `{}` has format {found}, and this program knows formats up to {known}: use a newer kiln",
        path.display()
    )]
    NewerFormat {
        /// The store.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest that this program knows.
        known: u32,
    },
    /// A file of the store is not what it should be.
    #[error("`{}` is damaged: {what}; `kiln system check --repair` may bring it back", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In what way.
        what: String,
    },
    /// An object is missing or damaged, and cannot be had again.
    #[error("the object {digest} cannot be fetched: {why}")]
    NotFetched {
        /// Which.
        digest: Digest,
        /// Why.
        why: String,
    },
    /// Bytes do not have the digest that was promised.
    #[error("{what} has digest {found}, expected {expected}")]
    DigestMismatch {
        /// What was being read.
        what: String,
        /// The promise.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// The archive is damaged, truncated or uses what is not supported.
    #[error("bad tar archive at byte {offset}: {what}")]
    Tar {
        /// Where in the uncompressed archive.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// An entry of an archive is refused.
    #[error("refused tar entry `{}`: {what}", path.escape_ascii())]
    Entry {
        /// Its name in the archive.
        path: Vec<u8>,
        /// Why.
        what: String,
    },
    /// A limit was exceeded.
    #[error("the {subject} is too large: {what}")]
    TooLarge {
        /// What is too large: `layer` or `stack`.
        subject: &'static str,
        /// In what, and by how much.
        what: String,
        /// The limit that a user may raise; `None` for a stack, whose layers were each within theirs.
        limit: Option<Limit>,
    },
    /// Nothing has that name.
    #[error("no such image: `{text}`")]
    NotFound {
        /// What was asked for.
        text: String,
        /// Names that look alike, best first.
        near: Vec<String>,
    },
    /// A tag has not that many versions.
    #[error("`{name}` has {versions} version(s): there is no `~{wanted}`")]
    NoSuchVersion {
        /// The tag.
        name: String,
        /// How many versions its history has.
        versions: usize,
        /// How far back was asked for.
        wanted: usize,
    },
    /// A prefix fits several images.
    #[error("`{text}` is ambiguous: {}", candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        text: String,
        /// What it could be.
        candidates: Vec<String>,
    },
    /// Text that is no image name.
    #[error("`{text}` is not an image name: {why}")]
    BadName {
        /// The text.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An image has several names, and was to be removed by its id.
    #[error("image {id} has several names ({}): remove them one by one, or force", names.join(", "))]
    SeveralNames {
        /// The image.
        id: Digest,
        /// Its names.
        names: Vec<String>,
    },
    /// Something that an image or a stack needs is not in the store.
    #[error("{what} {digest} is not in the store")]
    Missing {
        /// Blob, layer, object, …
        what: &'static str,
        /// Which.
        digest: Digest,
    },
    /// A manifest or config that makes no sense.
    #[error("bad {what}: {why}")]
    BadImage {
        /// Manifest or config.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A layer's tree cannot be read.
    #[error("the tree `{}` cannot be read: {source}", path.display())]
    Tree {
        /// The file.
        path: PathBuf,
        /// Why.
        source: kiln_erofs::ImageError,
    },
    /// A tree cannot be written.
    #[error("cannot write a tree: {0}")]
    WriteTree(#[from] kiln_erofs::WriteError),
    /// A file or a directory of the host was changed again each time that it was read.
    #[error("`{}` was being changed each of the {attempts} times that it was read", path.display())]
    Changing {
        /// Which.
        path: PathBuf,
        /// How often it was read.
        attempts: u32,
    },
    /// A variable of the environment makes no sense.
    #[error("{variable} is `{value}`: {what}")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// What it is.
        value: String,
        /// What it is to be.
        what: &'static str,
    },
    /// Which paths are to be in a layer makes no sense.
    #[error(transparent)]
    Selection(#[from] crate::SelectionError),
}

impl StoreError {
    /// What the user can do about it, where there is something: a line of its own.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { near, .. } if !near.is_empty() => Some(format!("there is {}", near.join(", "))),
            Self::DiskFull { .. } | Self::NoInodes { .. } => {
                Some("`kiln system prune` removes what nothing uses".to_owned())
            }
            Self::TooLarge { limit: Some(limit), .. } => Some(limit.hint()),
            Self::Changing { .. } => {
                Some("stop what writes to it, and try again; or leave it out with --exclude".to_owned())
            }
            _ => None,
        }
    }

    pub(crate) fn is_disk_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_full(source),
            Self::WriteTree(kiln_erofs::WriteError::Io(source)) => is_full(source),
            _ => false,
        }
    }
}

/// Whether an error says that a disk or a quota is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<DigestError> for StoreError {
    fn from(error: DigestError) -> Self {
        Self::BadImage { what: "digest", why: error.to_string() }
    }
}

/// What a store's functions return.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Adds to a failed system call what it was for.
pub(crate) trait Context<T> {
    fn doing(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn doing(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| StoreError::Io { doing, path: path.as_ref().to_owned(), source: source.into() })
    }
}
