//! Where an overlay's upper directory differs from the tree below it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, Change, ChangeKind};
use kiln_erofs::{Attributes, FileType, Image, ImageError, Inode};
use memmap2::Mmap;

/// Lists what `upper` (in overlayfs form: whiteouts, opaque directories) changes in the merged tree `tree`, sorted by path.
/// A directory is modified when something in it is.
///
/// # Errors
/// If the tree cannot be read, or the upper directory cannot be walked.
pub fn changes(tree: &Path, upper: &Path) -> Result<Vec<Change>, BackendError> {
    let bytes = map(tree)?;
    let damaged = |error| damaged(tree, error);
    let image = Image::open(&bytes).map_err(damaged)?;

    let mut changes = Vec::new();
    let mut pending: Vec<(PathBuf, Vec<u8>, Option<Inode<'_>>)> =
        vec![(upper.to_owned(), Vec::new(), Some(image.root().map_err(damaged)?))];
    while let Some((directory, path, below)) = pending.pop() {
        let opaque = is_opaque(&directory);
        let mut seen = HashSet::new();
        for entry in fs::read_dir(&directory).map_err(|error| failed(&directory, error))? {
            let entry = entry.map_err(|error| failed(&directory, error))?;
            let metadata = entry.metadata().map_err(|error| failed(&entry.path(), error))?;
            let name = entry.file_name();
            let full = [&path[..], b"/", name.as_bytes()].concat();
            let lower = match &below {
                Some(inode) => lookup(&image, inode, &name).map_err(damaged)?,
                None => None,
            };
            if is_whiteout(&metadata) {
                if lower.is_some() {
                    changes.push(Change { path: full, kind: ChangeKind::Deleted });
                }
                continue;
            }
            let kind = if lower.is_some() { ChangeKind::Modified } else { ChangeKind::Added };
            changes.push(Change { path: full.clone(), kind });
            if metadata.is_dir() {
                let lower = lower.filter(|inode| inode.file_type() == FileType::Directory);
                pending.push((entry.path(), full, lower));
            }
            seen.insert(name.into_encoded_bytes());
        }
        if let Some(inode) = below.filter(|_| opaque) {
            for entry in inode.entries(0) {
                let name = entry.map_err(damaged)?.name;
                if !seen.contains(name) {
                    changes
                        .push(Change { path: [&path[..], b"/", name].concat(), kind: ChangeKind::Deleted });
                }
            }
        }
    }
    changes.sort();
    Ok(changes)
}

/// The owner, mode, time and extended attributes of a tree's root.
///
/// # Errors
/// If the tree cannot be read.
pub fn root_attributes(tree: &Path) -> Result<Attributes, BackendError> {
    let bytes = map(tree)?;
    let read = || Image::open(&bytes)?.root()?.attributes();
    read().map_err(|error| damaged(tree, error))
}

fn map(tree: &Path) -> Result<Mmap, BackendError> {
    let file = File::open(tree).map_err(|error| failed(tree, error))?;
    // SAFETY: trees are immutable once they are in the store; a mapping of one cannot change below us.
    unsafe { Mmap::map(&file) }.map_err(|error| failed(tree, error))
}

fn failed(path: &Path, error: std::io::Error) -> BackendError {
    BackendError::caused(format!("cannot read {}", path.display()), error)
}

fn damaged(tree: &Path, error: ImageError) -> BackendError {
    BackendError::caused(format!("the tree {} is damaged", tree.display()), error)
}

fn lookup<'a>(
    image: &Image<'a>,
    directory: &Inode<'a>,
    name: &OsStr,
) -> Result<Option<Inode<'a>>, ImageError> {
    if directory.file_type() != FileType::Directory {
        return Ok(None);
    }
    directory.lookup(name.as_bytes())?.map(|entry| image.inode(entry.nid)).transpose()
}

fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn is_opaque(directory: &Path) -> bool {
    ["trusted.overlay.opaque", "user.overlay.opaque"]
        .iter()
        .any(|name| matches!(xattr::get(directory, name), Ok(Some(value)) if value == b"y"))
}
