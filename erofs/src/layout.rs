//! Where everything goes: the first of the writer's two passes.

use std::collections::HashMap;

use kiln_contract::Digest;

use crate::format::{
    BLOCK, BLOCK_BITS, COMPACT_SIZE, DIRENT, EXTENDED_SIZE, MAX_CHUNK_BITS, NULL_BLOCK, SLOT, SUPER_OFFSET,
    SUPER_SIZE, SYMLINK_MAX,
};
use crate::{Content, Data, Device, Node, NodeId, Time, Tree, WriteError, xattr};

/// What follows an inode and its xattrs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    /// Nothing: no data, or all of it in blocks.
    Blocks,
    /// The last bytes of the data.
    Inline(usize),
    /// So many chunks of 2^bits blocks.
    Chunks { count: usize, bits: u32 },
}

/// An inode's measures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) compact: bool,
    pub(crate) xattrs: usize,
    pub(crate) size: u64,
    pub(crate) body: Body,
}

impl Shape {
    pub(crate) fn header(&self) -> usize {
        if self.compact { COMPACT_SIZE } else { EXTENDED_SIZE }
    }

    pub(crate) fn length(&self) -> usize {
        let body = match self.body {
            Body::Blocks => 0,
            Body::Inline(bytes) => bytes,
            Body::Chunks { count, .. } => 4 * count,
        };
        self.header() + self.xattrs + body
    }
}

/// How a directory is cut into blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) full_blocks: u32,
    /// Bytes used of the last block, 1 to 4096.
    pub(crate) last: u16,
    /// Whether the last block is inline.
    pub(crate) inline: bool,
}

impl Cut {
    pub(crate) fn size(&self) -> u64 {
        u64::from(self.full_blocks) * BLOCK + u64::from(self.last)
    }

    /// Blocks outside of the inode.
    pub(crate) fn blocks(&self) -> u32 {
        self.full_blocks + u32::from(!self.inline)
    }

    /// Puts one more entry into the last block, or a new one.
    pub(crate) fn add(&mut self, name: &[u8]) {
        let need = (DIRENT + name.len()) as u16;
        if self.last + need > BLOCK as u16 {
            self.full_blocks += 1;
            self.last = 0;
        }
        self.last += need;
    }

    /// Decides whether the last block is inline: in place if it fits without moving the inode, else whichever wastes
    /// less, moving the inode to the next block or a block of its own. `inline` are the inode's measures if it is.
    pub(crate) fn settle(&mut self, inline: &Shape, offset: u64) {
        let waste = start_of(inline, &Content::Directory, offset) - offset;
        let used = u64::from(self.last);
        // Inodes are at multiples of a slot, so that what follows them starts up to a slot after a block does.
        let fits = used + SLOT <= BLOCK;
        self.inline = waste == 0 || (fits && waste <= BLOCK - used);
    }
}

#[derive(Debug, Clone, Copy)]
struct DirectoryLayout {
    parent: NodeId,
    cut: Cut,
}

/// Where everything of an image goes.
pub(crate) struct Layout<'t> {
    pub(crate) tree: &'t Tree,
    /// Files carry redirects instead of data.
    pub(crate) redirects: bool,
    pub(crate) epoch: Time,
    /// Nodes in the order of their inodes.
    pub(crate) order: Vec<NodeId>,
    /// nid by node; zero for what is not reached.
    nids: Vec<u32>,
    /// First block by node, counted from the start of its area (metadata or data).
    blocks: Vec<u32>,
    directories: Vec<DirectoryLayout>,
    directory_of: HashMap<NodeId, u32>,
    /// Objects embedded, in the order of their blocks.
    pub(crate) objects: Vec<(Digest, u64)>,
    /// Bytes of superblock and inodes.
    pub(crate) inodes_end: u64,
    metadata_start: u32,
    data_start: u32,
    /// Length of the image in blocks.
    pub(crate) total_blocks: u32,
}

impl<'t> Layout<'t> {
    pub(crate) fn new(tree: &'t Tree, redirects: bool) -> Result<Self, WriteError> {
        let mut layout = Self {
            tree,
            redirects,
            epoch: Time::default(),
            order: Vec::with_capacity(tree.len()),
            nids: vec![0; tree.capacity()],
            blocks: vec![NULL_BLOCK; tree.capacity()],
            directories: Vec::new(),
            directory_of: HashMap::new(),
            objects: Vec::new(),
            inodes_end: 0,
            metadata_start: 0,
            data_start: 0,
            total_blocks: 0,
        };
        layout.put_in_order();
        layout.choose_epoch();
        layout.place()?;
        Ok(layout)
    }

    /// A node's inode number.
    pub(crate) fn nid(&self, node: NodeId) -> u64 {
        u64::from(self.nids[node.index()])
    }

    /// The first block of a node's data.
    pub(crate) fn first_block(&self, node: NodeId) -> u32 {
        let start = match self.tree.node(node).content {
            Content::Regular(_) => self.data_start,
            _ => self.metadata_start,
        };
        match self.blocks[node.index()] {
            NULL_BLOCK => 0,
            block => start + block,
        }
    }

    /// Length of the image in bytes.
    pub(crate) fn length(&self) -> u64 {
        u64::from(self.total_blocks) * BLOCK
    }

    /// Where file data begin, in bytes.
    pub(crate) fn data_start(&self) -> u64 {
        u64::from(self.data_start) * BLOCK
    }

    /// How a directory is cut.
    pub(crate) fn cut(&self, node: NodeId) -> &Cut {
        &self.directories[self.directory_of[&node] as usize].cut
    }

    /// The directory that a directory is in.
    pub(crate) fn parent(&self, node: NodeId) -> NodeId {
        self.directories[self.directory_of[&node] as usize].parent
    }

    fn put_in_order(&mut self) {
        const SEEN: u32 = 1;
        let tree = self.tree;
        let mut stack = vec![(NodeId::ROOT, NodeId::ROOT)];
        self.order.push(NodeId::ROOT);
        while let Some((node, parent)) = stack.pop() {
            self.directory_of.insert(node, self.directories.len() as u32);
            self.directories.push(DirectoryLayout { parent, cut: Cut::default() });
            let below = stack.len();
            for (_, child) in tree.children(node) {
                if std::mem::replace(&mut self.nids[child.index()], SEEN) == SEEN {
                    continue;
                }
                self.order.push(child);
                if *tree.node(child).content == Content::Directory {
                    stack.push((child, node));
                }
            }
            stack[below..].reverse();
        }
    }

    /// The most common time; the earliest of several.
    fn choose_epoch(&mut self) {
        let mut counts: HashMap<Time, u32> = HashMap::new();
        for id in &self.order {
            *counts.entry(self.tree.node(*id).attributes.mtime).or_default() += 1;
        }
        let best = counts.into_iter().max_by_key(|(time, count)| (*count, std::cmp::Reverse(*time)));
        self.epoch = best.map(|(time, _)| time).unwrap_or_default();
    }

    fn place(&mut self) -> Result<(), WriteError> {
        let mut offset = (SUPER_OFFSET + SUPER_SIZE) as u64;
        let mut metadata_blocks = 0_u32;
        let mut data_blocks = 0_u32;
        let mut placed: HashMap<Digest, (u32, u64)> = HashMap::new();
        let more = |count: &mut u32, by: u64| {
            let first = *count;
            *count = u32::try_from(u64::from(first) + by).map_err(|_| WriteError::TooLarge)?;
            Ok::<u32, WriteError>(first)
        };
        for position in 0..self.order.len() {
            let id = self.order[position];
            let node = self.tree.node(id);
            if let Content::Directory = node.content {
                self.cut_directory(id, offset)?;
            }
            let shape = self.shape(id)?;
            offset = start_of(&shape, node.content, offset);
            let nid = u32::try_from(offset / SLOT).map_err(|_| WriteError::TooLarge)?;
            self.nids[id.index()] = nid;
            match node.content {
                Content::Directory => {
                    let blocks = self.cut(id).blocks();
                    if blocks > 0 {
                        self.blocks[id.index()] = more(&mut metadata_blocks, blocks.into())?;
                    }
                }
                Content::Symlink(_) if shape.body == Body::Blocks => {
                    self.blocks[id.index()] = more(&mut metadata_blocks, 1)?;
                }
                Content::Regular(Data::Object { digest, size }) if !self.redirects && *size > 0 => {
                    self.blocks[id.index()] = match placed.get(digest) {
                        Some((first, before)) if before == size => *first,
                        // Blocks of the shorter one would not do for the longer one, which would show what follows.
                        Some((_, before)) => {
                            let what = format!("its object has {size} bytes, and {before} in another place");
                            return Err(WriteError::Node { path: self.tree.path_of(id), what });
                        }
                        None => {
                            let first = more(&mut data_blocks, size.div_ceil(BLOCK))?;
                            placed.insert(*digest, (first, *size));
                            self.objects.push((*digest, *size));
                            first
                        }
                    };
                }
                _ => {}
            }
            offset = (offset + shape.length() as u64).next_multiple_of(SLOT);
        }
        self.inodes_end = offset;
        let mut end = 0;
        more(&mut end, offset.div_ceil(BLOCK))?;
        self.metadata_start = end;
        more(&mut end, metadata_blocks.into())?;
        self.data_start = end;
        more(&mut end, data_blocks.into())?;
        self.total_blocks = end;
        Ok(())
    }

    fn cut_directory(&mut self, id: NodeId, offset: u64) -> Result<(), WriteError> {
        let index = self.directory_of[&id] as usize;
        let mut cut = Cut { inline: true, ..Cut::default() };
        for (name, _) in entries(self.tree, id, self.directories[index].parent) {
            cut.add(name);
        }
        self.directories[index].cut = cut;
        let shape = self.shape(id)?;
        self.directories[index].cut.settle(&shape, offset);
        Ok(())
    }

    /// An inode's measures, or why the format has no place for it.
    pub(crate) fn shape(&self, id: NodeId) -> Result<Shape, WriteError> {
        let node = self.tree.node(id);
        let cut = (*node.content == Content::Directory).then(|| self.cut(id));
        shape(&node, cut, self.redirects, self.epoch)
            .map_err(|what| WriteError::Node { path: self.tree.path_of(id), what })
    }
}

/// A node's measures, or why the format has no place for it. `cut` is a directory's.
pub(crate) fn shape(
    node: &Node<'_>,
    cut: Option<&Cut>,
    redirects: bool,
    epoch: Time,
) -> Result<Shape, String> {
    let attributes = node.attributes;
    if attributes.mode > 0o7777 {
        return Err(format!("its mode is {:o}, and 7777 is the most", attributes.mode));
    }
    if attributes.mtime.nanoseconds >= 1_000_000_000 {
        return Err(format!("its time has {} nanoseconds", attributes.mtime.nanoseconds));
    }
    let xattrs = xattr::size(node, redirects)?;
    let (size, body) = match node.content {
        Content::Directory => {
            let cut = cut.copied().unwrap_or_default();
            (cut.size(), if cut.inline { Body::Inline(cut.last.into()) } else { Body::Blocks })
        }
        Content::Regular(Data::Inline(bytes)) => {
            if bytes.len() > crate::INLINE_LIMIT {
                let limit = crate::INLINE_LIMIT;
                return Err(format!("it has {} inline bytes, and {limit} is the most", bytes.len()));
            }
            let body = if bytes.is_empty() { Body::Blocks } else { Body::Inline(bytes.len()) };
            (bytes.len() as u64, body)
        }
        Content::Regular(Data::Object { size, .. }) => {
            if i64::try_from(*size).is_err() {
                return Err(format!("its size is {size}, and 2^63 - 1 is the most"));
            }
            (*size, if redirects { hole(*size) } else { Body::Blocks })
        }
        Content::Symlink(target) => {
            if target.is_empty() || target.len() > SYMLINK_MAX || target.contains(&0) {
                return Err("a symlink's target has 1 to 4095 bytes and no NUL".to_owned());
            }
            // Together with its inode, so that every kernel finds it in the block that it has at hand.
            let whole = EXTENDED_SIZE + xattrs + target.len();
            let body = if whole <= BLOCK as usize { Body::Inline(target.len()) } else { Body::Blocks };
            (target.len() as u64, body)
        }
        Content::CharDevice(device) | Content::BlockDevice(device) => {
            if encode_device(*device).is_none() {
                return Err(format!("the device {}:{} has too large a number", device.major, device.minor));
            }
            (0, Body::Blocks)
        }
        Content::Fifo | Content::Socket => (0, Body::Blocks),
    };
    let compact = attributes.mtime == epoch && is_compact(node, size);
    Ok(Shape { compact, xattrs, size, body })
}

fn is_compact(node: &Node<'_>, size: u64) -> bool {
    let small = |number: u32| u16::try_from(number).is_ok();
    u32::try_from(size).is_ok()
        && [node.links, node.attributes.uid, node.attributes.gid].into_iter().all(small)
}

/// Where an inode goes that comes after `offset`: there, or in the next block if it must not cross into it.
pub(crate) fn start_of(shape: &Shape, content: &Content, offset: u64) -> u64 {
    let Body::Inline(bytes) = shape.body else { return offset };
    let before = (shape.header() + shape.xattrs) as u64;
    let whole = matches!(content, Content::Symlink(_));
    let (from, to) = (if whole { offset } else { offset + before }, offset + before + bytes as u64);
    if from / BLOCK == (to - 1) / BLOCK {
        return offset;
    }
    let next = (to - 1) / BLOCK * BLOCK;
    if whole { offset.next_multiple_of(BLOCK) } else { (next - before).next_multiple_of(SLOT).max(offset) }
}

/// One hole as small as one chunk can be that covers `size` bytes; more where even the largest chunk does not.
fn hole(size: u64) -> Body {
    let bits = size.saturating_sub(1).checked_ilog2().map_or(0, |log| log + 1);
    let bits = bits.clamp(BLOCK_BITS, BLOCK_BITS + MAX_CHUNK_BITS);
    Body::Chunks { count: (size.saturating_sub(1) >> bits) as usize + 1, bits: bits - BLOCK_BITS }
}

/// Linux's 32-bit form of device numbers.
pub(crate) fn encode_device(device: Device) -> Option<u32> {
    let Device { major, minor } = device;
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// The entries of a directory as they are on disk: sorted, with `.` and `..`.
pub(crate) fn entries(tree: &Tree, dir: NodeId, parent: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
    let mut dots = [(&b"."[..], dir), (&b".."[..], parent)].into_iter().peekable();
    let mut children = tree.children(dir).peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some(dot), Some(child)) if child.0 < dot.0 => children.next(),
        (None, _) => children.next(),
        (Some(_), _) => dots.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chunk_covers_all_but_the_largest_files() {
        for (size, count, bits) in [
            (0, 1, 0),
            (65, 1, 0),
            (4096, 1, 0),
            (4097, 1, 1),
            (1 << 43, 1, 31),
            ((1 << 43) + 1, 2, 31),
            (i64::MAX as u64, 1 << 20, 31),
        ] {
            assert_eq!(hole(size), Body::Chunks { count, bits }, "{size}");
        }
    }
}
