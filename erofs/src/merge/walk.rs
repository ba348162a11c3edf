//! The first pass: what there is in the merged tree, in the order of its inodes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io;
use std::ops::Range;

use super::table::{Fields, Record, Table, Taken};
use super::{Charge, Layers, MergeError, Met, NO_LAYER};
use crate::dirents::Entries;
use crate::layout::Cut;
use crate::read::spend;
use crate::write::type_number;
use crate::{Entry, FileType, Image, Inode, Nid};

/// A node of the merged tree; its index is its place among the inodes.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Node {
    /// The inode whose attributes and content it has: layer and number there.
    pub(super) layer: u32,
    pub(super) nid: Nid,
    pub(super) links: u32,
    /// The directory in which it was met.
    pub(super) parent: u32,
    /// Of a directory: its entries and their number.
    pub(super) entries: u64,
    pub(super) count: u32,
    /// Of a directory: what it is made of.
    sources: u64,
    source_count: u32,
    /// Where it goes: inode number, first block of its own (one more; zero for none), how it is cut.
    pub(super) placed: u32,
    pub(super) block: u32,
    pub(super) cut: Cut,
}

impl Node {
    /// Of a directory: where its entries are.
    pub(super) fn range(&self) -> Range<u64> {
        self.entries..self.entries + u64::from(self.count)
    }
}

impl Record for Node {
    const SIZE: usize = 64;

    fn put(&self, bytes: &mut Fields<'_>) {
        bytes
            .u32(self.layer)
            .u64(self.nid)
            .u32(self.links)
            .u32(self.parent)
            .u64(self.entries)
            .u32(self.count);
        bytes.u64(self.sources).u32(self.source_count).u32(self.placed).u32(self.block);
        bytes.u32(self.cut.full_blocks).u32(self.cut.last.into()).u8(self.cut.inline.into());
    }

    fn get(bytes: &mut Taken<'_>) -> Self {
        Self {
            layer: bytes.u32(),
            nid: bytes.u64(),
            links: bytes.u32(),
            parent: bytes.u32(),
            entries: bytes.u64(),
            count: bytes.u32(),
            sources: bytes.u64(),
            source_count: bytes.u32(),
            placed: bytes.u32(),
            block: bytes.u32(),
            cut: Cut { full_blocks: bytes.u32(), last: bytes.u32() as u16, inline: bytes.u8() != 0 },
        }
    }
}

/// A name in a directory of the merged tree.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Named {
    pub(super) node: u32,
    /// Where the name's bytes are: layer, offset, length.
    pub(super) layer: u32,
    pub(super) at: u64,
    pub(super) length: u8,
    /// As directories tell it.
    pub(super) file_type: u8,
}

impl Record for Named {
    const SIZE: usize = 18;

    fn put(&self, bytes: &mut Fields<'_>) {
        bytes.u32(self.node).u32(self.layer).u64(self.at).u8(self.length).u8(self.file_type);
    }

    fn get(bytes: &mut Taken<'_>) -> Self {
        Self {
            node: bytes.u32(),
            layer: bytes.u32(),
            at: bytes.u64(),
            length: bytes.u8(),
            file_type: bytes.u8(),
        }
    }
}

/// A layer's directory that a merged one is made of.
#[derive(Debug, Default, Clone, Copy)]
struct Source {
    layer: u32,
    nid: Nid,
}

impl Record for Source {
    const SIZE: usize = 12;

    fn put(&self, bytes: &mut Fields<'_>) {
        bytes.u32(self.layer).u64(self.nid);
    }

    fn get(bytes: &mut Taken<'_>) -> Self {
        Self { layer: bytes.u32(), nid: bytes.u64() }
    }
}

/// The node that a layer's inode with several names became, and one; zero for none.
#[derive(Debug, Default, Clone, Copy)]
struct Linked(u32);

impl Record for Linked {
    const SIZE: usize = 4;

    fn put(&self, bytes: &mut Fields<'_>) {
        bytes.u32(self.0);
    }

    fn get(bytes: &mut Taken<'_>) -> Self {
        Self(bytes.u32())
    }
}

/// The merged tree as the first pass finds it.
pub(super) struct Walk<'s, 'a> {
    layers: Layers<'s, 'a>,
    pub(super) nodes: Table<'s, Node>,
    pub(super) entries: Table<'s, Named>,
    sources: Table<'s, Source>,
    /// By layer and inode number in it: links across layers go by name, those inside one by this.
    linked: Table<'s, Linked>,
    linked_from: Vec<u64>,
    /// Bytes that entries may still take. In sound images none of them overlap, and no directory is met twice.
    budget: u64,
    /// Bytes that extended attributes may still take, which may be shared.
    shared_budget: u64,
}

/// What directories of several layers make together.
struct Union<'a> {
    /// The layer whose attributes it has.
    attributes: Option<(u32, Inode<'a>)>,
    /// Whose entries it has, uppermost first.
    sources: Vec<Source>,
}

impl<'s, 'a> Walk<'s, 'a> {
    pub(super) fn new(layers: Layers<'s, 'a>, scratch: &'s dyn Fn() -> io::Result<File>) -> Self {
        let bytes: u64 = layers.images.iter().map(Image::len).sum();
        let mut next = 0;
        let linked_from = layers
            .images
            .iter()
            .map(|image| {
                let from = next;
                next += image.len() / crate::format::SLOT + 1;
                from
            })
            .collect();
        Self {
            layers,
            nodes: Table::new(scratch),
            entries: Table::new(scratch),
            sources: Table::new(scratch),
            linked: Table::new(scratch),
            linked_from,
            budget: bytes,
            shared_budget: bytes.saturating_mul(16).saturating_add(1 << 20),
        }
    }

    pub(super) fn run<E: From<MergeError>>(&mut self, charge: &mut Charge<'_, E>) -> Result<(), E> {
        let images = self.layers.images;
        let mut roots = Vec::with_capacity(images.len());
        for (layer, image) in images.iter().enumerate().rev() {
            let root = image.root().map_err(|source| MergeError::Image { layer, source })?;
            roots.push((layer as u32, root));
        }
        let root = self.unite(&mut roots.into_iter().map(Ok), true)?;
        let (layer, nid) = root.attributes.map_or((NO_LAYER, 0), |(layer, inode)| (layer, inode.nid()));
        let node = Node { layer, nid, links: 2, ..Node::default() };
        self.add_directory(node, &root.sources)?;
        self.list(0, charge)?;
        // The entries of a directory that are not looked through yet; and so of each directory above it.
        let mut ahead = Vec::new();
        ahead.push(self.node(0)?.range());
        while let Some(rest) = ahead.last_mut() {
            let Some(index) = rest.next() else {
                ahead.pop();
                continue;
            };
            let entry = self.entries.get(index).map_err(MergeError::Scratch)?;
            if entry.file_type == type_number(FileType::Directory) {
                self.list(entry.node, charge)?;
                ahead.push(self.node(entry.node)?.range());
            }
        }
        Ok(())
    }

    pub(super) fn node(&mut self, node: u32) -> Result<Node, MergeError> {
        self.nodes.get(node.into()).map_err(MergeError::Scratch)
    }

    /// The bytes of a name.
    pub(super) fn name(&self, entry: &Named) -> &'a [u8] {
        let at = entry.at as usize;
        &self.layers.images[entry.layer as usize].bytes[at..at + usize::from(entry.length)]
    }

    /// Lists a directory: a merge of its sorted sources, in which of equal names the uppermost decides.
    fn list<E: From<MergeError>>(&mut self, directory: u32, charge: &mut Charge<'_, E>) -> Result<(), E> {
        let mut node = self.node(directory)?;
        node.entries = self.entries.len();
        let mut sources = self.open_sources(&node)?;
        // The least name first, and of equal ones the uppermost.
        let mut next = BinaryHeap::with_capacity(sources.len());
        for place in 0..sources.len() {
            self.advance(&mut sources, place, &mut next)?;
        }
        let mut same: Vec<(u32, Entry<'a>)> = Vec::new();
        while let Some(Reverse((name, place))) = next.pop() {
            same.clear();
            let mut place = place;
            loop {
                same.extend(sources[place].current.map(|entry| (sources[place].layer, entry)));
                self.advance(&mut sources, place, &mut next)?;
                match next.peek() {
                    Some(Reverse((other, _))) if *other == name => {
                        if let Some(Reverse((_, other))) = next.pop() {
                            place = other;
                        }
                    }
                    _ => break,
                }
            }
            let Some((found, file_type)) = self.decide(directory, &same, &mut node.links, charge)? else {
                continue;
            };
            let layer = same.first().map_or(0, |(layer, _)| *layer);
            let base = self.layers.images[layer as usize].bytes.as_ptr().addr();
            let at = (name.as_ptr().addr() - base) as u64;
            let file_type = type_number(file_type);
            let entry = Named { node: found, layer, at, length: name.len() as u8, file_type };
            self.entries.push(&entry).map_err(MergeError::Scratch)?;
            node.count = node.count.checked_add(1).ok_or(MergeError::too_large())?;
        }
        self.nodes.set(directory.into(), &node).map_err(MergeError::Scratch)?;
        Ok(())
    }

    fn open_sources(&mut self, node: &Node) -> Result<Vec<Listing<'a>>, MergeError> {
        let mut opened = Vec::with_capacity(node.source_count as usize);
        for index in node.sources..node.sources + u64::from(node.source_count) {
            let source = self.sources.get(index).map_err(MergeError::Scratch)?;
            let inode = self.layers.inode(source.layer, source.nid)?;
            opened.push(Listing { layer: source.layer, entries: inode.entries(0), current: None });
        }
        Ok(opened)
    }

    /// The next entry of one source.
    fn advance(
        &mut self,
        sources: &mut [Listing<'a>],
        place: usize,
        next: &mut BinaryHeap<Reverse<(&'a [u8], usize)>>,
    ) -> Result<(), MergeError> {
        let source = &mut sources[place];
        let layer = source.layer;
        let damaged = |source| MergeError::Image { layer: layer as usize, source };
        source.current = source.entries.next().transpose().map_err(damaged)?;
        if let Some(entry) = source.current {
            spend(&mut self.budget, 12 + entry.name.len() as u64).map_err(damaged)?;
            next.push(Reverse((entry.name, place)));
        }
        Ok(())
    }

    /// What becomes of a name that these layers have, the uppermost first. `None` if it was removed.
    fn decide<E: From<MergeError>>(
        &mut self,
        parent: u32,
        same: &[(u32, Entry<'a>)],
        parent_links: &mut u32,
        charge: &mut Charge<'_, E>,
    ) -> Result<Option<(u32, FileType)>, E> {
        let Some((layer, entry)) = same.first().copied() else { return Ok(None) };
        let inode = self.layers.entry(layer, &entry)?;
        if inode.is_whiteout() {
            return Ok(None);
        }
        let file_type = inode.file_type();
        let node = Node { layer, nid: entry.nid, links: 1, parent, ..Node::default() };
        if file_type == FileType::Directory {
            let layers = self.layers;
            let mut found = same.iter().map(|(layer, entry)| Ok((*layer, layers.entry(*layer, entry)?)));
            let union = self.unite(&mut found, false)?;
            let (layer, inode) = union.attributes.unwrap_or((layer, inode));
            self.meet(layer, entry.name, &inode, charge)?;
            *parent_links = parent_links.saturating_add(1);
            let node = Node { layer, nid: inode.nid(), links: 2, ..node };
            return Ok(Some((self.add_directory(node, &union.sources)?, file_type)));
        }
        if inode.links() < 2 {
            self.meet(layer, entry.name, &inode, charge)?;
            return Ok(Some((self.add(node)?, file_type)));
        }
        // An inode that could be read lies in the image, and so does its number in its part of the table.
        let place = self.linked_from[layer as usize] + entry.nid;
        if let Some(known) = self.linked.get(place).map_err(MergeError::Scratch)?.0.checked_sub(1) {
            charge(layer as usize, entry.name, Met::Link)?;
            let mut first = self.node(known)?;
            first.links = first.links.saturating_add(1);
            self.nodes.set(known.into(), &first).map_err(MergeError::Scratch)?;
            return Ok(Some((known, file_type)));
        }
        self.meet(layer, entry.name, &inode, charge)?;
        let node = self.add(node)?;
        self.linked.set(place, &Linked(node + 1)).map_err(MergeError::Scratch)?;
        Ok(Some((node, file_type)))
    }

    /// Follows the directories of one name down to where one is opaque or something else hides the rest. The
    /// attributes are those of the uppermost that was not only implied; of the lowest, or none for the root, if all were.
    fn unite(
        &self,
        found: &mut dyn Iterator<Item = Result<(u32, Inode<'a>), MergeError>>,
        is_root: bool,
    ) -> Result<Union<'a>, MergeError> {
        let mut union = Union { attributes: None, sources: Vec::new() };
        let (mut stated, mut opaque, mut lowest) = (false, false, None);
        for item in found {
            let (layer, inode) = item?;
            if inode.file_type() != FileType::Directory {
                break;
            }
            let xattr = |name| {
                inode.xattr(name).map_err(|source| MergeError::Image { layer: layer as usize, source })
            };
            lowest = Some((layer, inode));
            if !stated && xattr(self.layers.implied)?.is_none() {
                union.attributes = lowest;
                stated = true;
            }
            if !opaque {
                union.sources.push(Source { layer, nid: inode.nid() });
                opaque = xattr(crate::xattr::OPAQUE)? == Some(b"y");
            }
            if stated && opaque {
                break;
            }
        }
        if !stated && !is_root {
            union.attributes = lowest;
        }
        Ok(union)
    }

    fn meet<E: From<MergeError>>(
        &mut self,
        layer: u32,
        name: &[u8],
        inode: &Inode<'a>,
        charge: &mut Charge<'_, E>,
    ) -> Result<(), E> {
        let damaged = |source| MergeError::Image { layer: layer as usize, source };
        spend(&mut self.shared_budget, inode.header_size()).map_err(damaged)?;
        charge(layer as usize, name, Met::Node(inode))
    }

    fn add_directory(&mut self, mut node: Node, sources: &[Source]) -> Result<u32, MergeError> {
        node.sources = self.sources.len();
        node.source_count = sources.len() as u32;
        for source in sources {
            self.sources.push(source).map_err(MergeError::Scratch)?;
        }
        self.add(node)
    }

    fn add(&mut self, node: Node) -> Result<u32, MergeError> {
        // One less, since tables count from one.
        let id = u32::try_from(self.nodes.len() + 1).map_err(|_| MergeError::too_large())? - 1;
        self.nodes.push(&node).map_err(MergeError::Scratch)?;
        Ok(id)
    }
}

/// A directory of a layer on its way through.
struct Listing<'a> {
    layer: u32,
    entries: Entries<'a>,
    current: Option<Entry<'a>>,
}
