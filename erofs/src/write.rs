//! The writer's second pass: everything in the order of its bytes.

use std::io::Write;

use crate::format::{
    BLOCK, BLOCK_BITS, COMPAT_CHECKSUM, COMPAT_MTIME, DIRENT, INCOMPAT_CHUNKED, KILN_MAGIC, LAYOUT_CHUNKS,
    LAYOUT_INLINE, LAYOUT_PLAIN, NULL_BLOCK, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK,
    SLOT, SUPER_MAGIC, SUPER_OFFSET, SUPER_SIZE, VERSION, XATTR_HEADER, superblock_checksum,
};
use crate::layout::{Body, Layout, encode_device, entries};
use crate::{Content, Data, NodeId, Tree, WriteError, xattr};

/// Writes `tree` metadata-only, in composefs' way: files that are objects become holes with the xattrs that lead
/// an overlay to the object. Same tree, same bytes. Returns the length, a multiple of 4096.
///
/// Writes strictly in order and in large pieces, so that `out` needs no buffer and may hash at the same time.
///
/// # Errors
/// `out` fails, or the format has no place for something in the tree ([`WriteError::Node`] names it; nothing has
/// been written then).
pub fn write_metadata(tree: &Tree, out: impl Write) -> Result<u64, WriteError> {
    let layout = Layout::new(tree, true)?;
    let mut out = Output::new(out);
    write_head(&layout, &mut out)?;
    debug_assert_eq!(out.position(), layout.length());
    out.finish()
}

/// Writes all of an image but file data, which begin where this ends: at a multiple of 4096.
pub(crate) fn write_head<W: Write>(layout: &Layout<'_>, out: &mut Output<W>) -> Result<(), WriteError> {
    write_headers(layout, &mut out.buffer);
    for (position, id) in layout.order.iter().enumerate() {
        out.pad_to(layout.nid(*id) * SLOT);
        write_inode(layout, *id, position, &mut out.buffer)?;
        out.drain()?;
    }
    out.pad_to(layout.inodes_end.next_multiple_of(BLOCK));
    write_outer_blocks(layout, out)
}

/// Collects large pieces for the sink. The first one holds at least the first block, whose checksum is filled in
/// when it goes.
pub(crate) struct Output<W> {
    sink: W,
    pub(crate) buffer: Vec<u8>,
    flushed: u64,
}

impl<W> Output<W> {
    pub(crate) const FULL: usize = 256 << 10;

    pub(crate) fn new(sink: W) -> Self {
        Self { sink, buffer: Vec::with_capacity(Self::FULL + 8192), flushed: 0 }
    }

    pub(crate) fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// Zeros up to an offset that is less than a few blocks away.
    pub(crate) fn pad_to(&mut self, offset: u64) {
        debug_assert!(offset >= self.position());
        self.buffer.resize((offset - self.flushed) as usize, 0);
    }
}

impl<W: Write> Output<W> {
    pub(crate) fn drain(&mut self) -> Result<(), WriteError> {
        if self.buffer.len() >= Self::FULL { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        if self.flushed == 0 {
            seal(&mut self.buffer);
        }
        self.sink.write_all(&self.buffer)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is left. Returns the length of all.
    pub(crate) fn finish(mut self) -> Result<u64, WriteError> {
        self.flush()?;
        Ok(self.flushed)
    }
}

/// Fills in the superblock's checksum.
pub(crate) fn seal(image: &mut [u8]) {
    let checksum = superblock_checksum(&image[..BLOCK as usize]);
    image[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
}

fn write_headers(layout: &Layout<'_>, out: &mut Vec<u8>) {
    out.resize(SUPER_OFFSET + SUPER_SIZE, 0);
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, KILN_MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(12, &(if layout.redirects { 1_u32 } else { 2 }).to_le_bytes());

    let mut put = |at: usize, bytes: &[u8]| put(SUPER_OFFSET + at, bytes);
    put(0, &SUPER_MAGIC.to_le_bytes());
    put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put(12, &[BLOCK_BITS as u8]);
    put(14, &(layout.nid(NodeId::ROOT) as u16).to_le_bytes());
    put(16, &(layout.order.len() as u64).to_le_bytes());
    put(24, &layout.epoch.seconds.to_le_bytes());
    put(32, &layout.epoch.nanoseconds.to_le_bytes());
    put(36, &layout.total_blocks.to_le_bytes());
    put(80, &(if layout.redirects { INCOMPAT_CHUNKED } else { 0 }).to_le_bytes());
}

fn write_inode(
    layout: &Layout<'_>,
    id: NodeId,
    position: usize,
    out: &mut Vec<u8>,
) -> Result<(), WriteError> {
    let node = layout.tree.node(id);
    let attributes = node.attributes;
    let shape = layout.shape(id)?;
    let data_layout = match shape.body {
        Body::Blocks => LAYOUT_PLAIN,
        Body::Inline(_) => LAYOUT_INLINE,
        Body::Chunks { .. } => LAYOUT_CHUNKS,
    };
    let (kind, location) = match node.content {
        Content::Directory => (S_IFDIR, layout.first_block(id)),
        Content::Regular(_) => match shape.body {
            Body::Chunks { bits, .. } => (S_IFREG, bits),
            _ => (S_IFREG, layout.first_block(id)),
        },
        Content::Symlink(_) => (S_IFLNK, layout.first_block(id)),
        Content::CharDevice(device) => (S_IFCHR, encode_device(*device).unwrap_or_default()),
        Content::BlockDevice(device) => (S_IFBLK, encode_device(*device).unwrap_or_default()),
        Content::Fifo => (S_IFIFO, 0),
        Content::Socket => (S_IFSOCK, 0),
    };
    let xattr_count = match shape.xattrs {
        0 => 0,
        bytes => ((bytes - XATTR_HEADER) / 4 + 1) as u16,
    };
    let start = out.len();
    let mut put = |at: usize, bytes: &[u8]| {
        if out.len() < start + at {
            out.resize(start + at, 0);
        }
        out.extend_from_slice(bytes);
    };
    put(0, &(u16::from(!shape.compact) | (data_layout << 1)).to_le_bytes());
    put(2, &xattr_count.to_le_bytes());
    put(4, &((kind | attributes.mode) as u16).to_le_bytes());
    let ino = (position as u32).wrapping_add(1);
    if shape.compact {
        put(6, &(node.links as u16).to_le_bytes());
        put(8, &(shape.size as u32).to_le_bytes());
        put(16, &location.to_le_bytes());
        put(20, &ino.to_le_bytes());
        put(24, &(attributes.uid as u16).to_le_bytes());
        put(26, &(attributes.gid as u16).to_le_bytes());
    } else {
        put(8, &shape.size.to_le_bytes());
        put(16, &location.to_le_bytes());
        put(20, &ino.to_le_bytes());
        put(24, &attributes.uid.to_le_bytes());
        put(28, &attributes.gid.to_le_bytes());
        put(32, &attributes.mtime.seconds.to_le_bytes());
        put(40, &attributes.mtime.nanoseconds.to_le_bytes());
        put(44, &node.links.to_le_bytes());
    }
    put(shape.header(), &[]);
    xattr::write(&node, layout.redirects, out);
    match (shape.body, node.content) {
        (Body::Inline(_), Content::Directory) => write_directory(layout, id, Part::Last, out),
        (Body::Inline(_), Content::Symlink(bytes) | Content::Regular(Data::Inline(bytes))) => {
            out.extend_from_slice(bytes);
        }
        (Body::Chunks { count, .. }, _) => {
            for _ in 0..count {
                out.extend_from_slice(&NULL_BLOCK.to_le_bytes());
            }
        }
        _ => {}
    }
    Ok(())
}

fn write_outer_blocks<W: Write>(layout: &Layout<'_>, out: &mut Output<W>) -> Result<(), WriteError> {
    let outer = |id: &&NodeId| {
        let content = layout.tree.node(**id).content;
        matches!(content, Content::Directory | Content::Symlink(_)) && layout.first_block(**id) > 0
    };
    for id in layout.order.iter().filter(outer) {
        match layout.tree.node(*id).content {
            Content::Symlink(target) => out.buffer.extend_from_slice(target),
            _ => {
                let part = if layout.directory(*id).inline { Part::AllButLast } else { Part::All };
                write_directory(layout, *id, part, &mut out.buffer);
            }
        }
        let end = out.position().next_multiple_of(BLOCK);
        out.pad_to(end);
        out.drain()?;
    }
    Ok(())
}

/// Which blocks of a directory.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    All,
    AllButLast,
    Last,
}

fn write_directory(layout: &Layout<'_>, id: NodeId, part: Part, out: &mut Vec<u8>) {
    let parent = layout.directory(id).parent;
    let mut block: Vec<(&[u8], NodeId)> = Vec::new();
    let mut used = 0;
    for (name, child) in entries(layout.tree, id, parent) {
        let need = DIRENT + name.len();
        if used + need > BLOCK as usize {
            if part != Part::Last {
                write_directory_block(layout, &block, out);
                out.resize(out.len() + BLOCK as usize - used, 0);
            }
            block.clear();
            used = 0;
        }
        used += need;
        block.push((name, child));
    }
    if part != Part::AllButLast {
        write_directory_block(layout, &block, out);
    }
}

fn write_directory_block(layout: &Layout<'_>, block: &[(&[u8], NodeId)], out: &mut Vec<u8>) {
    let mut name_at = block.len() * DIRENT;
    for (name, id) in block {
        out.extend_from_slice(&layout.nid(*id).to_le_bytes());
        out.extend_from_slice(&(name_at as u16).to_le_bytes());
        out.extend_from_slice(&[file_type(layout.tree.node(*id).content), 0]);
        name_at += name.len();
    }
    for (name, _) in block {
        out.extend_from_slice(name);
    }
}

fn file_type(content: &Content) -> u8 {
    match content {
        Content::Regular(_) => 1,
        Content::Directory => 2,
        Content::CharDevice(_) => 3,
        Content::BlockDevice(_) => 4,
        Content::Fifo => 5,
        Content::Socket => 6,
        Content::Symlink(_) => 7,
    }
}
