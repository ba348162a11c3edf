//! Copies that share all blocks until one of the two is written to: clonefile(2), on APFS.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, CloneFlags, fclonefileat};

/// Copies `from` to `to`, which must not exist.
pub(crate) fn clone_to(from: &File, to: &Path) -> io::Result<()> {
    Ok(fclonefileat(from, CWD, to, CloneFlags::empty())?)
}

/// Whether files in `directory` can share blocks: tries it.
pub(crate) fn probe(directory: &Path) -> io::Result<()> {
    let directory = tempfile::tempdir_in(directory)?;
    let from = directory.path().join("from");
    std::fs::write(&from, [1; 4096])?;
    clone_to(&File::open(&from)?, &directory.path().join("to"))
}
