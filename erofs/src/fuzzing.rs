//! What fuzzers and robustness tests run: everything that the reader can do, on any bytes.

use crate::format::{BLOCK, SUPER_OFFSET};
use crate::{Image, ImageError, write::seal};

/// Reads everything in `bytes`, as an image and, if they are not one only because of the checksum, with the
/// checksum corrected. Whatever comes out, it must come out in time that is linear in the length, and without a panic.
pub fn walk(bytes: &[u8]) -> Result<usize, ImageError> {
    match Image::open(bytes) {
        Ok(image) => walk_image(&image),
        Err(ImageError::Checksum { .. }) => {
            let mut sealed = bytes.to_vec();
            seal(&mut sealed);
            Image::open(&sealed).and_then(|image| walk_image(&image))
        }
        Err(error) => Err(error),
    }
}

/// Corrects the checksum of what a test changed in the first block. Too short an image is left alone.
pub fn reseal(bytes: &mut [u8]) {
    if bytes.len() >= (BLOCK as usize).max(SUPER_OFFSET) {
        seal(bytes);
    }
}

fn walk_image(image: &Image<'_>) -> Result<usize, ImageError> {
    // Inodes at places to which no directory leads, too.
    let places = image.len() / 32;
    for nid in (0..places).step_by(places as usize / 64 + 1).chain([places, u64::MAX / 32, u64::MAX]) {
        let Ok(inode) = image.inode(nid) else { continue };
        let _ = (inode.device(), inode.links(), inode.size());
        let _ = inode.symlink_target();
        let _ = inode.xattr(b"user.x");
        let _ = inode.parent();
        let _ = inode.lookup(b"x");
        let _ = inode.entries(3).take(16).count();
    }
    let tree = image.to_tree()?;
    let root = image.root()?;
    for (position, entry) in root.entries(0).enumerate() {
        let entry = entry?;
        assert_eq!(root.lookup(entry.name)?, Some(entry), "a sorted directory finds its entries");
        assert_eq!(root.entries(position).next(), Some(Ok(entry)), "positions count entries");
    }
    Ok(tree.len())
}
