//! All that the kernel shows of a tree.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use kiln_contract::{Digest, Hasher};

/// What there is to know of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    /// Of what is no directory: overlays count the entries of directories in another way.
    links: u64,
    size: u64,
    device: u64,
    target: Vec<u8>,
    content: Option<Digest>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    first: Vec<u8>,
}

/// Every path below `root`, `/` being the root itself.
pub(crate) fn listing(root: &Path) -> BTreeMap<Vec<u8>, Shown> {
    let (mut all, mut first) = (BTreeMap::new(), BTreeMap::new());
    // Sorted, so that the first path of an inode is the same one everywhere.
    let mut stack = vec![b"/".to_vec()];
    while let Some(path) = stack.pop() {
        let at = root.join(std::ffi::OsStr::from_bytes(&path[1..]));
        let metadata = std::fs::symlink_metadata(&at).unwrap();
        if metadata.is_dir() {
            let below = std::fs::read_dir(&at).unwrap().map(|entry| {
                let name = entry.unwrap().file_name();
                let separator = if path == b"/" { &b""[..] } else { b"/" };
                [&path, separator, name.as_bytes()].concat()
            });
            let mut below: Vec<_> = below.collect();
            below.sort_by(|a, b| b.cmp(a));
            stack.extend(below);
        }
        let same = first.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.clone()).clone();
        all.insert(path, shown(&at, &metadata, same));
    }
    all
}

fn shown(at: &Path, metadata: &std::fs::Metadata, first: Vec<u8>) -> Shown {
    let kind = metadata.file_type();
    let (is_directory, is_file) = (kind.is_dir(), kind.is_file());
    let kind = match kind {
        kind if kind.is_dir() => "directory",
        kind if kind.is_file() => "file",
        kind if kind.is_symlink() => "symlink",
        kind if kind.is_char_device() => "character device",
        kind if kind.is_block_device() => "block device",
        kind if kind.is_fifo() => "pipe",
        _ => "socket",
    };
    let xattrs = xattr::list(at).unwrap().map(|name| {
        let value = xattr::get(at, &name).unwrap().unwrap_or_default();
        (name.as_bytes().to_vec(), value)
    });
    Shown {
        kind,
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        links: if is_directory { 0 } else { metadata.nlink() },
        size: if is_directory { 0 } else { metadata.len() },
        device: metadata.rdev(),
        target: std::fs::read_link(at)
            .map(|target| target.as_os_str().as_bytes().to_vec())
            .unwrap_or_default(),
        content: is_file.then(|| digest(at)),
        xattrs: xattrs.collect(),
        first,
    }
}

fn digest(path: &Path) -> Digest {
    let mut hasher = Hasher::new();
    std::io::copy(&mut File::open(path).unwrap(), &mut hasher).unwrap();
    hasher.finish()
}
