//! Layers become one tree without being brought into memory.
//!
//! The images of the layers are read where they lie, and the merged one is written from front to back. In memory there
//! are one cursor a layer and directory being listed, the way from the root to that directory, and a few megabytes of
//! pages of tables ([`table`]); what else has to be remembered of a million entries is in files without names.
//!
//! 1. The walk: directories are listed in the order that the format has ([`mod@crate::format`], «Order»), each as
//!    a merge of the sorted directories it is made of. Every node gets its place among the inodes, and its links are
//!    counted ([`walk`]).
//! 2. The most common time is found, and every inode, block and directory gets its place, as [`crate::layout`] does
//!    it for trees in memory.
//! 3. All is written.
//!
//! The bytes are those that [`crate::write_metadata`] makes of the same tree.

mod table;
mod walk;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Write};

use crate::format::{BLOCK, SLOT, SUPER_OFFSET, SUPER_SIZE};
use crate::layout::{Body, Cut, Shape, shape, start_of};
use crate::write::{DirectoryWriter, Head, Listed, Output, Part, type_number, write_node};
use crate::{Attributes, Content, Entry, FileType, Image, ImageError, Inode, Nid, Time, WriteError};
use walk::{Named, Node, Walk};

/// Images to be merged.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'s, 'a> {
    /// The lowest first. Character devices 0:0 in them remove names of lower ones, and directories with
    /// `trusted.overlay.opaque` = `y` hide what lower ones hold, as overlayfs has it.
    pub images: &'s [Image<'a>],
    /// The extended attribute of directories whose own attributes give way to those of a lower layer. A merged tree
    /// has it not.
    pub implied: &'s [u8],
}

/// Something that the merged tree will have, told before it is kept.
#[derive(Debug, Clone, Copy)]
pub enum Met<'i> {
    /// A node under its first name: it will have what this inode has.
    Node(&'i Inode<'i>),
    /// A further name of a node.
    Link,
}

/// Hears of all that a merged tree will have: the layer and the name that it has it from. It may refuse.
pub type Charge<'c, E> = dyn FnMut(usize, &[u8], Met<'_>) -> Result<(), E> + 'c;

/// Why layers cannot be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// One of them is damaged.
    #[error("layer {layer}: {source}")]
    Image {
        /// Its place in the stack, from 0.
        layer: usize,
        /// In what way.
        source: ImageError,
    },
    /// The merged tree cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// What has no room in memory cannot be kept in a file.
    #[error("cannot use a temporary file: {0}")]
    Scratch(#[source] io::Error),
}

impl MergeError {
    fn too_large() -> Self {
        Self::Write(WriteError::TooLarge)
    }
}

/// In place of a layer: the root's attributes are nobody's.
const NO_LAYER: u32 = u32::MAX;

/// Merges layers and writes the tree, metadata-only. `scratch` makes a file that nobody else sees, to be read and
/// written; it is asked only for merges that are too large for memory. Returns the length, a multiple of 4096.
///
/// # Errors
/// [`MergeError`], and whatever `charge` refuses with.
pub fn merge<E: From<MergeError>>(
    layers: Layers<'_, '_>,
    scratch: &dyn Fn() -> io::Result<File>,
    charge: &mut Charge<'_, E>,
    out: impl Write,
) -> Result<u64, E> {
    let mut walk = Walk::new(layers, scratch);
    walk.run(charge)?;
    let epoch = choose_epoch(layers, &mut walk)?;
    let plan = place(layers, &mut walk, epoch)?;
    Ok(write(layers, &mut walk, &plan, out)?)
}

impl<'a> Layers<'_, 'a> {
    fn inode(&self, layer: u32, nid: Nid) -> Result<Inode<'a>, MergeError> {
        let layer = layer as usize;
        self.images[layer].inode(nid).map_err(|source| MergeError::Image { layer, source })
    }

    /// The inode of an entry, if it is what the entry says.
    fn entry(&self, layer: u32, entry: &Entry<'a>) -> Result<Inode<'a>, MergeError> {
        let inode = self.inode(layer, entry.nid)?;
        if inode.file_type() == entry.file_type {
            return Ok(inode);
        }
        let what = "an entry has another type";
        Err(MergeError::Image { layer: layer as usize, source: ImageError::Inode { nid: entry.nid, what } })
    }

    fn time(&self, node: &Node) -> Result<Time, MergeError> {
        if node.layer == NO_LAYER {
            return Ok(Time::default());
        }
        Ok(self.inode(node.layer, node.nid)?.mtime())
    }

    /// What a node is, without a layer's marks.
    fn describe(&self, node: &Node) -> Result<(Content, Attributes), MergeError> {
        if node.layer == NO_LAYER {
            return Ok((Content::Directory, Attributes { mode: 0o755, ..Attributes::default() }));
        }
        let layer = node.layer as usize;
        let inode = self.inode(node.layer, node.nid)?;
        let (content, mut attributes) =
            inode.described().map_err(|source| MergeError::Image { layer, source })?;
        if content == Content::Directory {
            attributes.xattrs.remove(crate::xattr::OPAQUE);
            attributes.xattrs.remove(self.implied);
        }
        Ok((content, attributes))
    }
}

/// Different times that are counted at once.
const TIMES: usize = 1 << 16;

/// The most common time; the earliest of several. If there are very many different ones, they are counted in several
/// rounds, each of which looks at a share of them.
fn choose_epoch(layers: Layers<'_, '_>, walk: &mut Walk<'_, '_>) -> Result<Time, MergeError> {
    // Nobody can choose times that all fall into one share of an unknown hash.
    let hasher = RandomState::new();
    let mut shares = 1;
    loop {
        let mut best = Some((0, Reverse(Time::default())));
        for share in 0..shares {
            let counted = count_times(layers, walk, &|time| hasher.hash_one(time) % shares == share)?;
            let Some(counts) = counted else {
                best = None;
                break;
            };
            let most = counts.into_iter().map(|(time, count)| (count, Reverse(time))).max();
            best = best.max(most);
        }
        match best {
            Some((_, Reverse(time))) => return Ok(time),
            None => shares *= 4,
        }
    }
}

/// How often each time of a share stands in the tree; `None` if it has too many.
fn count_times(
    layers: Layers<'_, '_>,
    walk: &mut Walk<'_, '_>,
    counts_here: &dyn Fn(Time) -> bool,
) -> Result<Option<HashMap<Time, u64>>, MergeError> {
    let mut counts: HashMap<Time, u64> = HashMap::new();
    for index in 0..walk.nodes.len() {
        let node = walk.nodes.get(index).map_err(MergeError::Scratch)?;
        let time = layers.time(&node)?;
        if counts_here(time) {
            *counts.entry(time).or_default() += 1;
        }
        if counts.len() > TIMES {
            return Ok(None);
        }
    }
    Ok(Some(counts))
}

/// What the second pass finds beside the places of nodes.
struct Plan {
    epoch: Time,
    inodes_end: u64,
    metadata_start: u32,
    total_blocks: u32,
}

/// Gives every inode, directory and long symlink its place.
fn place(layers: Layers<'_, '_>, walk: &mut Walk<'_, '_>, epoch: Time) -> Result<Plan, MergeError> {
    let mut offset = (SUPER_OFFSET + SUPER_SIZE) as u64;
    let mut blocks = 0_u32;
    let more =
        |count: u32, by: u64| u32::try_from(u64::from(count) + by).map_err(|_| MergeError::too_large());
    for index in 0..walk.nodes.len() {
        let mut node = walk.nodes.get(index).map_err(MergeError::Scratch)?;
        let (content, attributes) = layers.describe(&node)?;
        let described = crate::Node { content: &content, attributes: &attributes, links: node.links };
        let measure = |walk: &mut Walk<'_, '_>, cut: &Cut| {
            shape(&described, Some(cut), true, epoch)
                .map_err(|what| WriteError::Node { path: path_of(walk, index as u32), what })
        };
        if content == Content::Directory {
            node.cut = Cut { inline: true, ..Cut::default() };
            let mut listing = DotListing::new(index as u32, &node);
            while let Some(entry) = listing.next(walk)? {
                node.cut.add(entry.name);
            }
            let inline = measure(walk, &node.cut)?;
            node.cut.settle(&inline, offset);
        }
        let shape = measure(walk, &node.cut)?;
        offset = start_of(&shape, &content, offset);
        node.placed = u32::try_from(offset / SLOT).map_err(|_| MergeError::too_large())?;
        let outside = outer_blocks(&content, &shape, &node.cut);
        if outside > 0 {
            // One more, since a record of zeros has none.
            node.block = more(blocks, 1)?;
            blocks = more(blocks, outside)?;
        }
        walk.nodes.set(index, &node).map_err(MergeError::Scratch)?;
        offset = (offset + shape.length() as u64).next_multiple_of(SLOT);
    }
    let metadata_start = more(0, offset.div_ceil(BLOCK))?;
    let total_blocks = more(metadata_start, blocks.into())?;
    Ok(Plan { epoch, inodes_end: offset, metadata_start, total_blocks })
}

/// Blocks that something has outside of its inode, in an image without data.
fn outer_blocks(content: &Content, shape: &Shape, cut: &Cut) -> u64 {
    match content {
        Content::Directory => cut.blocks().into(),
        Content::Symlink(_) if shape.body == Body::Blocks => 1,
        _ => 0,
    }
}

/// The last pass.
fn write(
    layers: Layers<'_, '_>,
    walk: &mut Walk<'_, '_>,
    plan: &Plan,
    out: impl Write,
) -> Result<u64, MergeError> {
    let mut out = Output::new(out);
    let (inodes, blocks) = (walk.nodes.len(), plan.total_blocks);
    let root = walk.node(0)?.placed.into();
    Head { redirects: true, root, inodes, epoch: plan.epoch, blocks }.write(&mut out.buffer);
    for index in 0..walk.nodes.len() {
        let node = walk.nodes.get(index).map_err(MergeError::Scratch)?;
        let (content, attributes) = layers.describe(&node)?;
        let described = crate::Node { content: &content, attributes: &attributes, links: node.links };
        let shape = shape(&described, Some(&node.cut), true, plan.epoch)
            .map_err(|what| WriteError::Node { path: path_of(walk, index as u32), what })?;
        out.pad_to(u64::from(node.placed) * SLOT);
        let block = node.block.checked_sub(1).map_or(0, |block| plan.metadata_start + block);
        write_node(&described, &shape, true, block, index as usize, &mut out.buffer);
        if content == Content::Directory && node.cut.inline {
            write_directory(walk, index as u32, &node, Part::Last, &mut out)?;
        }
        out.drain()?;
    }
    out.pad_to(plan.inodes_end.next_multiple_of(BLOCK));
    for index in 0..walk.nodes.len() {
        let node = walk.nodes.get(index).map_err(MergeError::Scratch)?;
        if node.block == 0 {
            continue;
        }
        match layers.describe(&node)?.0 {
            Content::Symlink(target) => out.buffer.extend_from_slice(&target),
            _ => {
                let part = if node.cut.inline { Part::AllButLast } else { Part::All };
                write_directory(walk, index as u32, &node, part, &mut out)?;
            }
        }
        let end = out.position().next_multiple_of(BLOCK);
        out.pad_to(end);
        out.drain()?;
    }
    debug_assert_eq!(out.position(), u64::from(plan.total_blocks) * BLOCK);
    Ok(out.finish()?)
}

fn write_directory<W: Write>(
    walk: &mut Walk<'_, '_>,
    id: u32,
    node: &Node,
    part: Part,
    out: &mut Output<W>,
) -> Result<(), MergeError> {
    let mut writer = DirectoryWriter::new(part);
    let mut listing = DotListing::new(id, node);
    while let Some(entry) = listing.next(walk)? {
        let nid = walk.node(entry.node)?.placed.into();
        writer.add(Listed { name: entry.name, nid, file_type: entry.file_type }, &mut out.buffer);
        out.drain()?;
    }
    writer.finish(&mut out.buffer);
    Ok(())
}

/// The entries of a directory as they are on disk: sorted, with `.` and `..`.
struct DotListing {
    children: std::ops::Range<u64>,
    dots: std::array::IntoIter<(&'static [u8], u32), 2>,
    dot: Option<(&'static [u8], u32)>,
}

struct Dotted<'a> {
    name: &'a [u8],
    node: u32,
    file_type: u8,
}

impl DotListing {
    fn new(id: u32, node: &Node) -> Self {
        let mut dots = [(&b"."[..], id), (&b".."[..], node.parent)].into_iter();
        let dot = dots.next();
        Self { children: node.range(), dots, dot }
    }

    fn next<'a>(&mut self, walk: &mut Walk<'_, 'a>) -> Result<Option<Dotted<'a>>, MergeError> {
        let child: Option<Named> = match self.children.is_empty() {
            false => Some(walk.entries.get(self.children.start).map_err(MergeError::Scratch)?),
            true => None,
        };
        let child = child.map(|child| (walk.name(&child), child));
        if let Some((dot, node)) = self.dot
            && child.as_ref().is_none_or(|(name, _)| *name >= dot)
        {
            self.dot = self.dots.next();
            return Ok(Some(Dotted { name: dot, node, file_type: type_number(FileType::Directory) }));
        }
        self.children.next();
        Ok(child.map(|(name, child)| Dotted { name, node: child.node, file_type: child.file_type }))
    }
}

/// The first path of a node, for messages. What cannot be read of it is left out.
fn path_of(walk: &mut Walk<'_, '_>, node: u32) -> Vec<u8> {
    let mut names: Vec<&[u8]> = Vec::new();
    let mut here = node;
    while here != 0 {
        let Ok(parent) = walk.node(here).map(|node| node.parent) else { break };
        let Ok(directory) = walk.node(parent) else { break };
        for index in directory.range() {
            if let Ok(entry) = walk.entries.get(index)
                && entry.node == here
            {
                names.push(walk.name(&entry));
                break;
            }
        }
        here = parent;
    }
    let mut path = Vec::new();
    for name in names.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    if path.is_empty() { b"/".to_vec() } else { path }
}
