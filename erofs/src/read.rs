//! Images in memory.

use std::collections::HashMap;

use kiln_contract::Digest;

use crate::format::{
    BLOCK, BLOCK_BITS, COMPAT_CHECKSUM, INCOMPAT_KNOWN, KILN_MAGIC, SLOT, SUPER_MAGIC, SUPER_OFFSET,
    SUPER_SIZE, VERSION, superblock_checksum,
};
use crate::inode::Inode;
use crate::{Content, Data, FileType, ImageError, NodeId, Time, Tree};

/// An inode number as the kernel shows it: EROFS's nid, the place of the inode in units of 32 bytes.
pub type Nid = u64;

/// An image in memory, mostly a mapped file. Nothing is parsed up front but the superblock; everything else is read
/// where it lies, and checked when it is.
///
/// A hostile image yields [`ImageError`], at once or later; no method panics, loops or takes more memory than
/// the image's size justifies.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    pub(crate) bytes: &'a [u8],
    /// Where nid 0 would be.
    pub(crate) metadata_at: u64,
    /// Where shared xattrs are.
    pub(crate) shared_xattrs_at: u64,
    pub(crate) epoch: Time,
    root: Nid,
    inodes: u64,
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

impl<'a> Image<'a> {
    /// Reads the superblock.
    ///
    /// # Errors
    /// It is none, is damaged, or asks for features that only other writers' images have.
    pub fn open(bytes: &'a [u8]) -> Result<Self, ImageError> {
        if bytes.len() < BLOCK as usize {
            return Err(ImageError::NotErofs);
        }
        let superblock = &bytes[SUPER_OFFSET..SUPER_OFFSET + SUPER_SIZE];
        if u32_at(superblock, 0) != SUPER_MAGIC {
            return Err(ImageError::NotErofs);
        }
        if bytes.starts_with(KILN_MAGIC) && u32_at(bytes, 8) > VERSION {
            return Err(ImageError::Version { found: u32_at(bytes, 8), known: VERSION });
        }
        if u32::from(superblock[12]) != BLOCK_BITS {
            return Err(ImageError::Unsupported { what: "blocks of another size than 4096 bytes" });
        }
        if u32_at(superblock, 8) & COMPAT_CHECKSUM != 0 {
            let found = u32_at(superblock, 4);
            let expected = superblock_checksum(&bytes[..BLOCK as usize]);
            if found != expected {
                return Err(ImageError::Checksum { found, expected });
            }
        }
        if u32_at(superblock, 80) & !INCOMPAT_KNOWN != 0 {
            return Err(ImageError::Unsupported { what: "incompatible features that are not known" });
        }
        let nanoseconds = u32_at(superblock, 32);
        if nanoseconds >= 1_000_000_000 {
            return Err(ImageError::Unsupported { what: "an epoch that is no time" });
        }
        Ok(Self {
            bytes,
            metadata_at: u64::from(u32_at(superblock, 40)) * BLOCK,
            shared_xattrs_at: u64::from(u32_at(superblock, 44)) * BLOCK,
            epoch: Time { seconds: u64_at(superblock, 24).cast_signed(), nanoseconds },
            root: u16_at(superblock, 14).into(),
            inodes: u64_at(superblock, 16),
        })
    }

    /// The root directory.
    ///
    /// # Errors
    /// It is damaged, or no directory.
    pub fn root(&self) -> Result<Inode<'a>, ImageError> {
        let root = self.inode(self.root)?;
        if root.file_type() == FileType::Directory {
            Ok(root)
        } else {
            Err(ImageError::Inode { nid: self.root, what: "the root is not a directory" })
        }
    }

    /// The root's number.
    pub fn root_nid(&self) -> Nid {
        self.root
    }

    /// Any inode. A number that was not found in a directory mostly gives an error, but may give nonsense.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn inode(&self, nid: Nid) -> Result<Inode<'a>, ImageError> {
        Inode::read(*self, nid)
    }

    /// Number of inodes that the superblock states.
    pub fn inode_count(&self) -> u64 {
        self.inodes
    }

    /// Length of the image in bytes.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Never: there is a root at least.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn slice(&self, offset: u64, length: u64, what: &'static str) -> Result<&'a [u8], ImageError> {
        let range = offset
            .checked_add(length)
            .and_then(|end| Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?));
        range.and_then(|range| self.bytes.get(range)).ok_or(ImageError::Truncated { what, offset })
    }

    /// The whole image as a tree. Files whose data are embedded are hashed.
    ///
    /// # Errors
    /// Anything in it is damaged; directories form a loop or have two names; parts overlap so that the tree would
    /// be far larger than the image.
    pub fn to_tree(&self) -> Result<Tree, ImageError> {
        Unfolding {
            image: *self,
            nodes: vec![NOT_SEEN; (self.len() / SLOT) as usize + 1],
            digests: HashMap::new(),
            entry_budget: self.len(),
            // Shared xattrs and equal files stand once and count for each that has them.
            shared_budget: self.len().saturating_mul(16).saturating_add(1 << 20),
        }
        .run()
    }
}

/// In the table of nodes, where ids are one more than they are: fresh zero pages cost nothing.
const NOT_SEEN: u32 = 0;

/// A tree being made from an image.
struct Unfolding<'a> {
    image: Image<'a>,
    /// Node by nid: an eighth of the image at most.
    nodes: Vec<u32>,
    /// Of embedded data, by place and size.
    digests: HashMap<(u64, u64), Digest>,
    /// Bytes that entries, and the inodes they lead to, may still take. In a sound image none of them overlap.
    entry_budget: u64,
    /// Bytes that may still be hashed or copied from shared places.
    shared_budget: u64,
}

impl<'a> Unfolding<'a> {
    fn run(mut self) -> Result<Tree, ImageError> {
        let root = self.image.root()?;
        let mut tree = Tree::new(root.attributes()?);
        // An inode that could be read lies in the image, and so does its number in this table.
        self.nodes[root.nid() as usize] = NodeId::ROOT.0 + 1;
        let mut stack = vec![(root, NodeId::ROOT)];
        while let Some((directory, id)) = stack.pop() {
            for entry in directory.entries(0) {
                let entry = entry?;
                spend(&mut self.entry_budget, 12 + entry.name.len() as u64)?;
                let wrong = |what| ImageError::Directory { nid: directory.nid(), what };
                let known = usize::try_from(entry.nid).ok().and_then(|nid| self.nodes.get(nid));
                if let Some(known) = known.and_then(|known| known.checked_sub(1)) {
                    tree.link(id, entry.name, NodeId(known)).map_err(|error| match error {
                        crate::TreeError::DirectoryLink(_) => ImageError::Loop { nid: entry.nid },
                        _ => wrong("an entry cannot be there"),
                    })?;
                    continue;
                }
                let inode = self.image.inode(entry.nid)?;
                if inode.file_type() != entry.file_type {
                    return Err(wrong("an entry has another type than its inode"));
                }
                spend(&mut self.entry_budget, inode.header_size())?;
                let (xattrs, object, xattr_bytes) = inode.read_xattrs()?;
                spend(&mut self.shared_budget, xattr_bytes)?;
                let content = self.content(&inode, object)?;
                let child = tree
                    .add(id, entry.name, content, inode.attributes_with(xattrs))
                    .map_err(|_| wrong("an entry cannot be there"))?;
                self.nodes[entry.nid as usize] = child.0 + 1;
                if inode.file_type() == FileType::Directory {
                    stack.push((inode, child));
                }
            }
        }
        Ok(tree)
    }

    fn content(&mut self, inode: &Inode<'a>, object: Option<Digest>) -> Result<Content, ImageError> {
        match inode.file_type() {
            FileType::Regular if object.is_none() => return self.data(inode).map(Content::Regular),
            FileType::Symlink => spend(&mut self.shared_budget, inode.size())?,
            _ => {}
        }
        inode.content(object)
    }

    fn data(&mut self, inode: &Inode<'a>) -> Result<Data, ImageError> {
        let Some(place) = inode.blocks_at() else { return inode.data() };
        let size = inode.size();
        if let Some(digest) = self.digests.get(&(place, size)) {
            return Ok(Data::Object { digest: *digest, size });
        }
        spend(&mut self.shared_budget, size.min(self.image.len()))?;
        let data = inode.data()?;
        if let Data::Object { digest, .. } = data {
            self.digests.insert((place, size), digest);
        }
        Ok(data)
    }
}

pub(crate) fn spend(budget: &mut u64, bytes: u64) -> Result<(), ImageError> {
    *budget = budget.checked_sub(bytes).ok_or(ImageError::Overlap)?;
    Ok(())
}
