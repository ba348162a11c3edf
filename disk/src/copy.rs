//! The two ways in which a file is copied.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

#[cfg(target_os = "macos")]
use crate::apfs as leaf;
use crate::error::{Context as _, is_full};
#[cfg(not(target_os = "macos"))]
use crate::reflink as leaf;
use crate::{DiskError, Result, room, sparse};

/// How a file is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copying {
    /// The copy shares all blocks with the original until one of them is written to.
    Reflink,
    /// All that the file holds is copied; holes stay holes.
    Sparse,
}

/// Whether files in `directory` can share blocks. Where there is no room to try it, the file system's name decides.
///
/// # Errors
/// [`DiskError::NoReflinks`], with what the system said.
pub(crate) fn probe_reflink(directory: &Path) -> Result<()> {
    match leaf::probe(directory) {
        Err(error) if is_full(&error) && room::usually_shares(directory) => Ok(()),
        probed => probed.map_err(|source| no_reflinks(directory, source)),
    }
}

fn no_reflinks(path: &Path, source: io::Error) -> DiskError {
    DiskError::NoReflinks { path: path.to_owned(), file_system: room::file_system(path), source }
}

/// Copies `from` to the new file `to`, which is not put on the storage by this. A failure leaves nothing, and says how much
/// room was missing if that was what failed.
pub(crate) fn copy(how: Copying, from: &File, to: &Path) -> Result<File> {
    let directory = to.parent().unwrap_or(to);
    let copied = match how {
        Copying::Reflink => reflink(from, to, directory),
        Copying::Sparse => sparse_copy(from, to, directory),
    };
    copied.map_err(|error| explain(error, how, from, directory))
}

#[cfg(target_os = "macos")]
fn reflink(from: &File, to: &Path, directory: &Path) -> Result<File> {
    leaf::clone_to(from, to).map_err(|source| no_reflinks_or(source, to, directory))?;
    OpenOptions::new().read(true).write(true).open(to).doing("open", to)
}

#[cfg(not(target_os = "macos"))]
fn reflink(from: &File, to: &Path, directory: &Path) -> Result<File> {
    create(to, |file| leaf::copy(from, file).map_err(|source| no_reflinks_or(source, to, directory)))
}

/// What a file system says that cannot share blocks, or not between these two files; everything else is another failure.
fn no_reflinks_or(source: io::Error, to: &Path, directory: &Path) -> DiskError {
    use rustix::io::Errno;
    match Errno::from_io_error(&source) {
        Some(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            no_reflinks(directory, source)
        }
        _ => DiskError::Io { doing: "write the copy", path: to.to_owned(), source },
    }
}

fn sparse_copy(from: &File, to: &Path, directory: &Path) -> Result<File> {
    // What cannot fit is not begun: a file system that is full even for a moment hurts everybody on it.
    if !room::may_take_less(directory) {
        let needed = sparse::data_bytes(from).doing("read the original of", to)?;
        let available = room::available(directory)?;
        if needed > available {
            return Err(DiskError::DiskFull { path: directory.to_owned(), needed, available });
        }
    }
    create(to, |file| sparse::copy(from, file).doing("write the copy", to))
}

/// Makes a new file and lets `fill` fill it. If that fails, the file goes.
fn create(path: &Path, fill: impl FnOnce(&File) -> Result<()>) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.doing("create", path)?;
    fill(&file).inspect_err(|_| drop(fs::remove_file(path)))?;
    Ok(file)
}

/// A lack of room with its numbers, measured when what was written in vain is gone; other errors as they are.
pub(crate) fn explain(error: DiskError, how: Copying, from: &File, directory: &Path) -> DiskError {
    if !error.is_full() {
        return error;
    }
    let path = directory.to_owned();
    match (how, room::available(directory), sparse::data_bytes(from)) {
        (Copying::Reflink, Ok(available), _) => DiskError::NoRoomToShare { path, available },
        (Copying::Sparse, Ok(available), Ok(needed)) => DiskError::DiskFull { path, needed, available },
        _ => error,
    }
}

/// Copies a file: by sharing blocks where the file system can, otherwise by copying what is in it. `to` appears at once and
/// whole, readable and writable by its owner only, but may not yet be on the storage. A process that is
/// killed meanwhile leaves a file beside it whose name begins with `.copy-`.
///
/// # Errors
/// `to` exists; `from` cannot be read; no room, with how much was missing.
pub fn copy_file(from: &Path, to: &Path) -> Result<Copying> {
    let source = File::open(from).doing("open", from)?;
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut how = Copying::Reflink;
    let mut failure = None;
    let staged = tempfile::Builder::new().prefix(".copy-").make_in(parent, |path| {
        let copied = match copy(Copying::Reflink, &source, path) {
            Err(DiskError::NoReflinks { .. }) => {
                how = Copying::Sparse;
                copy(Copying::Sparse, &source, path)
            }
            copied => copied,
        };
        copied.map_err(|error| {
            let kind = match &error {
                // Makes `make_in` try another name.
                DiskError::Io { source, .. } => source.kind(),
                _ => io::ErrorKind::Other,
            };
            failure = Some(error);
            kind.into()
        })
    });
    let staged = staged.map_err(|error| {
        failure.unwrap_or(DiskError::Io { doing: "create a file in", path: parent.to_owned(), source: error })
    })?;
    staged.persist_noclobber(to).map_err(|error| error.error).doing("create", to)?;
    Ok(how)
}
