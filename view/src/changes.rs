//! Where an overlay's upper directory differs from the tree below it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, Change, ChangeKind};
use kiln_erofs::{Attributes, FileType, Image, ImageError, Inode};
use memmap2::Mmap;

/// A directory of the view that may differ from the tree's.
struct Directory<'a> {
    path: Vec<u8>,
    /// The scratch's.
    upper: Option<PathBuf>,
    /// The tree's that is seen in it. Another one than that of its path if it was renamed.
    shown: Option<Inode<'a>>,
    /// What the tree has of that path.
    base: Option<Inode<'a>>,
}

/// What there is of a name.
#[derive(Default)]
struct Entry<'a> {
    upper: Option<(PathBuf, Metadata)>,
    shown: Option<Inode<'a>>,
    base: Option<Inode<'a>>,
}

/// Lists what `upper` (in overlayfs form: whiteouts, opaque and redirected directories) changes in the merged tree `tree`,
/// sorted by path. A directory is modified when something in it is.
///
/// # Errors
/// If the tree cannot be read, or the upper directory cannot be walked.
pub fn changes(tree: &Path, upper: &Path) -> Result<Vec<Change>, BackendError> {
    let bytes = map(tree)?;
    let damaged = |error| damaged(tree, error);
    let image = Image::open(&bytes).map_err(damaged)?;
    let root = Some(image.root().map_err(damaged)?);
    let shown = root.filter(|_| mark(upper, "opaque").as_deref() != Some(b"y"));

    let mut changes = Vec::new();
    let mut pending = vec![Directory { path: Vec::new(), upper: Some(upper.to_owned()), shown, base: root }];
    while let Some(directory) = pending.pop() {
        for (name, entry) in entries(&image, &directory, tree)? {
            let path = [&directory.path[..], b"/", &name].concat();
            let hidden = entry.upper.as_ref().is_some_and(|(_, metadata)| is_whiteout(metadata));
            let visible = if hidden { false } else { entry.upper.is_some() || entry.shown.is_some() };
            let same = entry.upper.is_none() && number(&entry.shown) == number(&entry.base);
            let kind = match (visible, entry.base.is_some()) {
                (true, true) if same => continue,
                (true, true) => ChangeKind::Modified,
                (true, false) => ChangeKind::Added,
                (false, true) => ChangeKind::Deleted,
                (false, false) => continue,
            };
            changes.push(Change { path: path.clone(), kind });
            let base = entry.base.filter(is_directory);
            match entry.upper {
                Some((upper, metadata)) if metadata.is_dir() => {
                    let shown = if mark(&upper, "opaque").as_deref() == Some(b"y") {
                        None
                    } else {
                        match mark(&upper, "redirect") {
                            Some(target) if target.starts_with(b"/") => {
                                walk(&image, root, &target).map_err(damaged)?
                            }
                            Some(name) => walk(&image, directory.shown, &name).map_err(damaged)?,
                            None => entry.shown,
                        }
                    };
                    let shown = shown.filter(is_directory);
                    pending.push(Directory { path, upper: Some(upper), shown, base });
                }
                None if visible && entry.shown.as_ref().is_some_and(is_directory) => {
                    pending.push(Directory { path, upper: None, shown: entry.shown, base });
                }
                _ => {}
            }
        }
    }
    changes.sort();
    Ok(changes)
}

/// The names of a directory that may differ.
fn entries<'a>(
    image: &Image<'a>,
    directory: &Directory<'a>,
    tree: &Path,
) -> Result<BTreeMap<Vec<u8>, Entry<'a>>, BackendError> {
    let damaged = |error| damaged(tree, error);
    let mut entries: BTreeMap<Vec<u8>, Entry<'a>> = BTreeMap::new();
    if let Some(upper) = &directory.upper {
        for entry in fs::read_dir(upper).map_err(|error| failed(upper, error))? {
            let entry = entry.map_err(|error| failed(upper, error))?;
            let metadata = entry.metadata().map_err(|error| failed(&entry.path(), error))?;
            let name = entry.file_name().into_encoded_bytes();
            entries.entry(name).or_default().upper = Some((entry.path(), metadata));
        }
    }
    if number(&directory.shown) == number(&directory.base) {
        // Nothing but what the scratch has can differ.
        for (name, entry) in &mut entries {
            entry.base = child(image, &directory.base, name).map_err(damaged)?;
            entry.shown = entry.base;
        }
        return Ok(entries);
    }
    for (lower, of_base) in [(&directory.shown, false), (&directory.base, true)] {
        for entry in lower.iter().flat_map(|inode| inode.entries(0)) {
            let entry = entry.map_err(damaged)?;
            let inode = image.inode(entry.nid).map_err(damaged)?;
            let known = entries.entry(entry.name.to_vec()).or_default();
            *if of_base { &mut known.base } else { &mut known.shown } = Some(inode);
        }
    }
    Ok(entries)
}

fn number(inode: &Option<Inode<'_>>) -> Option<u64> {
    inode.as_ref().map(Inode::nid)
}

fn is_directory(inode: &Inode<'_>) -> bool {
    inode.file_type() == FileType::Directory
}

fn child<'a>(
    image: &Image<'a>,
    directory: &Option<Inode<'a>>,
    name: &[u8],
) -> Result<Option<Inode<'a>>, ImageError> {
    let Some(directory) = directory.filter(is_directory) else { return Ok(None) };
    directory.lookup(name)?.map(|entry| image.inode(entry.nid)).transpose()
}

fn walk<'a>(
    image: &Image<'a>,
    from: Option<Inode<'a>>,
    path: &[u8],
) -> Result<Option<Inode<'a>>, ImageError> {
    let mut here = from;
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        here = child(image, &here, name)?;
    }
    Ok(here)
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

fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// A mark of overlayfs. Only those are believed that this process's mounts make: the others are whatever a program in one
/// has set.
pub(crate) fn mark(directory: &Path, name: &str) -> Option<Vec<u8>> {
    let prefix = if has_trusted_marks() { "trusted" } else { "user" };
    xattr::get(directory, OsStr::from_bytes(format!("{prefix}.overlay.{name}").as_bytes())).ok().flatten()
}

#[cfg(target_os = "linux")]
fn has_trusted_marks() -> bool {
    crate::userns::is_root_of_host()
}

#[cfg(not(target_os = "linux"))]
fn has_trusted_marks() -> bool {
    false
}
