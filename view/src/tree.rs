//! A merged tree's file.

use std::fs::File;
use std::path::Path;

use kiln_contract::BackendError;
use kiln_erofs::Image;
use memmap2::Mmap;

/// Maps a tree, and sees that it begins like one.
///
/// # Errors
/// It cannot be read, or is none.
pub(crate) fn map(tree: &Path) -> Result<Mmap, BackendError> {
    let cannot = |error| BackendError::caused(format!("cannot read the tree {}", tree.display()), error);
    let file = File::open(tree).map_err(cannot)?;
    // SAFETY: trees are immutable once they are in the store. Whoever truncates one all the same ends this process.
    let bytes = unsafe { Mmap::map(&file) }.map_err(cannot)?;
    Image::open(&bytes).and_then(|image| image.root()).map_err(|error| {
        BackendError::caused(format!("cannot read the tree {}", tree.display()), error)
            .hint("`kiln system check --repair` finds and repairs what is damaged in the store")
    })?;
    Ok(bytes)
}
