//! Tar archives of directories that somebody else controls.
//!
//! Both directions of `kiln cp`, on the instance's side and on the host's, and the first filling of a volume, read or write
//! a tree whose owner is not trusted: a container may swap a directory for a symbolic link at any moment, and an archive
//! may say any name. Every path is therefore resolved by the kernel below a directory that is held open (`openat2(2)`),
//! never by string, and is made with calls that do not follow a link at its own name.

mod base;
mod entries;
mod pack;
mod unpack;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use base::{Base, Confine};
pub use pack::{Pack, Top, pack};
pub use unpack::{Archive, Devices, Unpack};

/// A failure that names the entry it happened at.
#[derive(Debug)]
pub struct ArchiveError {
    entry: PathBuf,
    doing: &'static str,
    source: io::Error,
}

impl ArchiveError {
    fn new(entry: impl Into<PathBuf>, doing: &'static str, source: impl Into<io::Error>) -> Self {
        Self { entry: entry.into(), doing, source: source.into() }
    }

    /// What kind of I/O error it was.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} `{}`", self.doing, self.entry.display())
    }
}

impl std::error::Error for ArchiveError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

#[cfg(test)]
mod tests;
