//! What takes how much room.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::error::Context as _;
use crate::extents::exclusive_bytes;
use crate::gc::objects_of;
use crate::tag::files_below;
use crate::{Result, Store};

/// What a store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Images, by id.
    pub images: u64,
    /// Layers.
    pub layers: u64,
    /// Objects.
    pub objects: u64,
    /// Bytes that the objects take on the disk. Holes take none.
    pub object_bytes: u64,
    /// Bytes that the files of all images would take if each image were unpacked for itself.
    pub logical_bytes: u64,
    /// Bytes of layers' trees and split streams, and of blobs, tags and records.
    pub metadata_bytes: u64,
    /// Image disks.
    pub image_disks: u64,
    /// Bytes that only image disks have: they share the rest with objects, where the file system can do that.
    pub image_disk_bytes: u64,
    /// Bytes of caches, all of which can be made again: merged trees and image disks.
    pub render_bytes: u64,
}

impl Store {
    /// Counts what the store holds. Reads every layer's tree: tens of milliseconds for some 100,000 files.
    ///
    /// # Errors
    /// Something cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let layout = &self.layout;
        let mut usage = Usage::default();
        for image in self.images()? {
            usage.images += 1;
            for layer in &image.layers {
                let mut seen = HashSet::new();
                for (digest, size) in objects_of(&self.layer_tree(layer)?)? {
                    // Hard links and copies within one layer: copies would be unpacked, but links are far more.
                    if seen.insert(digest) {
                        usage.logical_bytes += size;
                    }
                }
            }
        }
        for path in files_below(&layout.objects())? {
            usage.objects += 1;
            usage.object_bytes += std::fs::metadata(&path).doing("read", &path)?.blocks() * 512;
        }
        for directory in [layout.layers(), layout.diffs(), layout.blobs(), layout.images(), layout.tags()] {
            for path in files_below(&directory)? {
                usage.layers += u64::from(path.extension().is_some_and(|extension| extension == "erofs"));
                usage.metadata_bytes += std::fs::metadata(&path).doing("read", &path)?.len();
            }
        }
        for path in self.lazy_paths()? {
            usage.metadata_bytes += std::fs::metadata(&path).doing("read", &path)?.len();
        }
        for path in self.image_disks()? {
            usage.image_disks += 1;
            usage.image_disk_bytes += exclusive_bytes(&path)?;
        }
        usage.render_bytes += usage.image_disk_bytes;
        for path in files_below(&layout.merged())? {
            let metadata = std::fs::metadata(&path).doing("read", &path)?;
            // A merged tree that is a layer's own takes nothing.
            if metadata.nlink() == 1 {
                usage.render_bytes += metadata.len();
            }
        }
        Ok(usage)
    }
}

/// Bytes of all files below a path; what cannot be read counts nothing.
pub(crate) fn tree_bytes(path: &Path) -> u64 {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return 0 };
    if !metadata.is_dir() {
        return metadata.len();
    }
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    entries.flatten().map(|entry| tree_bytes(&entry.path())).sum()
}
