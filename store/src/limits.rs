//! What a tree may take.
//!
//! A layer's tree is made in memory, and a stack's is brought there to be exported or made a disk. What it takes there follows the *number* of
//! things in it and the *length* of their names, not the bytes of its files, and a tar of some megabytes, compressed
//! a thousand times over, can have very many of both. So everything that adds to a tree is charged to a [`Budget`]
//! before it is added, at what it costs in the worst case: tables double when they are full, and for that moment they
//! are there once and a half again.

use kiln_contract::ByteSize;
use kiln_erofs::{Attributes, Content, Data};

use crate::{Result, StoreError};

/// What one layer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportLimits {
    /// Bytes of all files of one layer, unpacked. Without a limit only the holes of sparse files have one,
    /// [`ImportLimits::HOLES`]: they cost an attacker nothing.
    pub max_size: Option<u64>,
    /// Entries of its tar.
    pub max_entries: u64,
    /// Bytes of memory for its tree: entries and the directories on the way to them, names, extended attributes, link
    /// targets, maps of sparse files. What is counted is the most that the tree may take, of which a usual one takes
    /// half; buffers (some 50 MiB, whatever the layer) come on top.
    pub max_memory: u64,
}

impl ImportLimits {
    /// How many bytes of zeros a layer may have in holes if there is no `max_size`: 64 GiB.
    pub const HOLES: u64 = 64 << 30;
    /// `max_entries` by default: four times as many as the largest layers are known to have.
    pub const ENTRIES: u64 = 4_000_000;
    /// `max_memory` by default, 2 GiB: a million entries with a label each take some 1.2 GiB of it.
    pub const MEMORY: u64 = 2 << 30;
}

impl Default for ImportLimits {
    fn default() -> Self {
        Self { max_size: None, max_entries: Self::ENTRIES, max_memory: Self::MEMORY }
    }
}

/// One of the [`ImportLimits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// [`ImportLimits::max_size`].
    Size,
    /// [`ImportLimits::max_entries`].
    Entries,
    /// [`ImportLimits::max_memory`].
    Memory,
}

impl Limit {
    /// What a user can do who trusts the layer: which flag says more.
    #[must_use]
    pub fn hint(self) -> String {
        let flag = match self {
            Self::Size => "--max-size",
            Self::Entries => "--max-entries",
            Self::Memory => "--max-metadata",
        };
        format!("if you trust where it comes from, allow more with {flag}")
    }
}

/// A node: its record, its place in its directory, and its share in the tables of files, objects and the layout.
const NODE: u64 = 512;
/// A directory's own tables, which begin with room for several entries.
const DIRECTORY: u64 = 256;
/// A further name for a node.
const LINK: u64 = 64;
/// The first leaf of a node's table of extended attributes, and each of them in the fullest case beside its bytes.
const XATTRS: u64 = 512;
const XATTR: u64 = 160;
/// What the allocator adds to a string of its own.
const STRING: u64 = 32;
/// Names lie in one table of bytes.
const GROWTH: u64 = 3;
/// A record of a piece of a file in the tar.
const SEGMENT: u64 = 96;

/// What is left of the limits of one tree. Nothing is ever given back: a tree keeps what is removed from it.
#[derive(Debug)]
pub(crate) struct Budget {
    /// What it is for: `layer` or `stack`.
    subject: &'static str,
    limits: ImportLimits,
    entries: u64,
    /// Bytes of files with their holes, and of the holes alone.
    size: u64,
    holes: u64,
    memory: u64,
    /// Of a stack: what each layer took, the largest of these, and the layer of what is charged next.
    layers: Vec<u64>,
    largest: u64,
    layer: usize,
}

const LAYER: &str = "layer";
const STACK: &str = "stack";

impl Budget {
    /// Of a layer that is imported.
    pub(crate) fn of_layer(limits: ImportLimits) -> Self {
        Self {
            subject: LAYER,
            limits,
            entries: 0,
            size: 0,
            holes: 0,
            memory: 0,
            layers: Vec::new(),
            largest: 0,
            layer: 0,
        }
    }

    /// Of a stack of so many layers that are merged. Merging takes no memory, but what is done with a merged tree may.
    /// Its largest layer does not count: it was within its own limits when it came, which may have been others.
    pub(crate) fn of_stack(limits: ImportLimits, layers: usize) -> Self {
        Self { subject: STACK, layers: vec![0; layers], ..Self::of_layer(limits) }
    }

    /// What is charged from now on comes from this layer of a stack.
    pub(crate) fn in_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    /// Counts an entry of a tar.
    pub(crate) fn entry(&mut self) -> Result<()> {
        self.entries += 1;
        if self.entries > self.limits.max_entries {
            let what = format!("it has more than {} entries", self.limits.max_entries);
            return Err(self.too_large(what, Limit::Entries));
        }
        Ok(())
    }

    /// Counts bytes of a file, and of the holes in it, before any of them is read; of what follows the end of a tar, too.
    pub(crate) fn bytes(&mut self, path: &[u8], data: u64, holes: u64) -> Result<()> {
        self.size = self.size.saturating_add(data).saturating_add(holes);
        self.holes = self.holes.saturating_add(holes);
        let (what, size, max) = match self.limits.max_size {
            Some(max) => ("files take", self.size, max),
            None => ("holes in sparse files take", self.holes, ImportLimits::HOLES),
        };
        if size <= max {
            return Ok(());
        }
        let at = if path.is_empty() { String::new() } else { format!(" with `{}`", path.escape_ascii()) };
        let what = format!("its {what} {size} bytes{at}, at most {max} are allowed");
        Err(self.too_large(what, Limit::Size))
    }

    /// Entries so far.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Charges a node with its first name.
    pub(crate) fn node(&mut self, name: &[u8], content: &Content, attributes: &Attributes) -> Result<()> {
        let content = match content {
            Content::Directory => DIRECTORY,
            Content::Symlink(bytes) | Content::Regular(Data::Inline(bytes)) => STRING + bytes.len() as u64,
            _ => 0,
        };
        self.charge(NODE + GROWTH * name.len() as u64 + content)?;
        self.attributes(attributes)
    }

    /// Charges the attributes that a node gets in the place of others.
    pub(crate) fn attributes(&mut self, attributes: &Attributes) -> Result<()> {
        if attributes.xattrs.is_empty() {
            return Ok(());
        }
        let bytes: u64 =
            attributes.xattrs.iter().map(|(name, value)| XATTR + (name.len() + value.len()) as u64).sum();
        self.charge(XATTRS + bytes)
    }

    /// Charges a further name of a node.
    pub(crate) fn link(&mut self, name: &[u8]) -> Result<()> {
        self.charge(LINK + GROWTH * name.len() as u64)
    }

    /// Charges a path that is kept for later.
    pub(crate) fn path(&mut self, bytes: usize) -> Result<()> {
        self.charge(STRING + bytes as u64)
    }

    /// Charges the pieces of a file.
    pub(crate) fn segments(&mut self, count: usize) -> Result<()> {
        self.charge(SEGMENT * count as u64)
    }

    fn charge(&mut self, bytes: u64) -> Result<()> {
        self.memory = self.memory.saturating_add(bytes);
        if let Some(layer) = self.layers.get_mut(self.layer) {
            *layer = layer.saturating_add(bytes);
            self.largest = self.largest.max(*layer);
        }
        if self.memory - self.largest <= self.limits.max_memory {
            return Ok(());
        }
        let limit = ByteSize(self.limits.max_memory);
        let what = format!("its names, links and attributes need more than {limit} of memory");
        Err(self.too_large(what, Limit::Memory))
    }

    fn is_stack(&self) -> bool {
        self.subject == STACK
    }

    fn too_large(&self, what: String, limit: Limit) -> StoreError {
        let limit = Some(limit).filter(|_| !self.is_stack());
        StoreError::TooLarge { subject: self.subject, what, limit }
    }
}

#[cfg(test)]
mod tests {
    use kiln_contract::Home;

    use super::*;
    use crate::Store;
    use crate::merge::Caches;

    #[test]
    fn directories_and_stacks_have_limits_as_tars_have() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path().join("home"))).unwrap();
        let mut layers = Vec::new();
        for name in ["a", "b", "c"] {
            let root = dir.path().join(name);
            std::fs::create_dir(&root).unwrap();
            for file in 0..100 {
                std::fs::write(root.join(format!("{name}{file}")), "").unwrap();
            }
            layers.push(store.import_directory(&root).unwrap().layer);
        }
        let limits = |max_memory| ImportLimits { max_memory, ..ImportLimits::default() };
        // A hundred nodes fit, and no two hundred.
        let small = limits(100 << 10);
        let host = |limits| store.import_directory_within(&dir.path().join("a"), limits);
        assert_eq!(host(small).unwrap().entries, 101);
        let error = host(limits(50 << 10)).unwrap_err().to_string();
        assert!(error.starts_with("the layer is too large") && error.contains("50.0 KiB"), "{error}");
        let few = host(ImportLimits { max_entries: 99, ..small }).unwrap_err().to_string();
        assert!(few.contains("more than 99 entries"), "{few}");
        let merge = |layers: &[_], limits| {
            store.merge_within(layers, Caches::Ignored, limits).map(|(tree, budget)| (tree.len(), budget))
        };
        assert_eq!(merge(&layers[..1], small).unwrap().0, 101);
        // Whatever the largest layer takes was allowed when it came.
        assert_eq!(merge(&layers[..1], limits(0)).unwrap().0, 101);
        assert_eq!(merge(&layers[..2], small).unwrap().0, 201);
        let error = merge(&layers, small).unwrap_err().to_string();
        assert!(error.starts_with("the stack is too large") && error.contains("100.0 KiB"), "{error}");
        // A merged tree from which the next merge begins is charged as its layers were.
        let (_, whole) = merge(&layers, ImportLimits::default()).unwrap();
        store.merged_tree(&layers[..2]).unwrap();
        let (_, budget) = store.merge_within(&layers, Caches::Used, ImportLimits::default()).unwrap();
        assert_eq!(budget.memory, whole.memory);
    }
}
