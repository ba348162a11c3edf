//! From the files of a tree back to the directories that have them.
//!
//! A tree only leads down, and the kernel asks for files by number. What is to be copied up needs its names: one pass
//! over the tree, made when the first file is, keeps eight bytes for each.

use kiln_erofs::{FileType, Image, ImageError, Nid};
use std::collections::HashSet;

/// Pairs of a file and a directory that has it, sorted.
#[derive(Debug)]
pub(super) struct Parents(Vec<(u32, u32)>);

impl Parents {
    /// Goes through the whole tree.
    ///
    /// # Errors
    /// It is damaged.
    pub(super) fn of(image: &Image<'_>) -> Result<Self, ImageError> {
        let small = |nid: Nid| {
            u32::try_from(nid).map_err(|_| ImageError::Inode { nid, what: "the tree is larger than 128 GiB" })
        };
        let mut pairs = Vec::new();
        let mut seen = HashSet::from([image.root_nid()]);
        let mut pending = vec![image.root_nid()];
        while let Some(directory) = pending.pop() {
            let parent = small(directory)?;
            for entry in image.inode(directory)?.entries(0) {
                let entry = entry?;
                if entry.file_type != FileType::Directory {
                    pairs.push((small(entry.nid)?, parent));
                } else if seen.insert(entry.nid) {
                    pending.push(entry.nid);
                }
            }
        }
        pairs.sort_unstable();
        pairs.dedup();
        pairs.shrink_to_fit();
        Ok(Self(pairs))
    }

    /// The directories that have a file.
    pub(super) fn parents(&self, nid: Nid) -> impl Iterator<Item = Nid> {
        let nid = u32::try_from(nid).unwrap_or(u32::MAX);
        let from = self.0.partition_point(|(file, _)| *file < nid);
        self.0[from..].iter().take_while(move |(file, _)| *file == nid).map(|(_, parent)| Nid::from(*parent))
    }
}
