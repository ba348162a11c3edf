//! The writer's second pass: everything in the order of its bytes.

use std::io::Write;

use crate::format::{
    BLOCK, BLOCK_BITS, COMPAT_CHECKSUM, COMPAT_MTIME, DIRENT, INCOMPAT_CHUNKED, KILN_MAGIC, LAYOUT_CHUNKS,
    LAYOUT_INLINE, LAYOUT_PLAIN, NULL_BLOCK, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK,
    SLOT, SUPER_MAGIC, SUPER_OFFSET, SUPER_SIZE, VERSION, XATTR_HEADER, superblock_checksum,
};
use crate::layout::{Body, Layout, Shape, encode_device, entries};
use crate::{Content, Data, FileType, Node, NodeId, Time, Tree, WriteError, xattr};

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
    let head = Head {
        redirects: layout.redirects,
        root: layout.nid(NodeId::ROOT),
        inodes: layout.order.len() as u64,
        epoch: layout.epoch,
        blocks: layout.total_blocks,
    };
    head.write(&mut out.buffer);
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

/// What the headers of an image tell.
pub(crate) struct Head {
    /// Files carry redirects instead of data.
    pub(crate) redirects: bool,
    pub(crate) root: u64,
    pub(crate) inodes: u64,
    pub(crate) epoch: Time,
    /// Length of the image in blocks.
    pub(crate) blocks: u32,
}

impl Head {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.resize(SUPER_OFFSET + SUPER_SIZE, 0);
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, KILN_MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &(if self.redirects { 1_u32 } else { 2 }).to_le_bytes());

        let mut put = |at: usize, bytes: &[u8]| put(SUPER_OFFSET + at, bytes);
        put(0, &SUPER_MAGIC.to_le_bytes());
        put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS as u8]);
        put(14, &(self.root as u16).to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(24, &self.epoch.seconds.to_le_bytes());
        put(32, &self.epoch.nanoseconds.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(80, &(if self.redirects { INCOMPAT_CHUNKED } else { 0 }).to_le_bytes());
    }
}

fn write_inode(
    layout: &Layout<'_>,
    id: NodeId,
    position: usize,
    out: &mut Vec<u8>,
) -> Result<(), WriteError> {
    let node = layout.tree.node(id);
    let shape = layout.shape(id)?;
    write_node(&node, &shape, layout.redirects, layout.first_block(id), position, out);
    if let (Body::Inline(_), Content::Directory) = (shape.body, node.content) {
        write_directory(layout, id, Part::Last, out);
    }
    Ok(())
}

/// Writes an inode with its xattrs and all that follows them, but for the entries of a directory. `first_block` is
/// where its data in blocks are, if it has any.
pub(crate) fn write_node(
    node: &Node<'_>,
    shape: &Shape,
    redirects: bool,
    first_block: u32,
    position: usize,
    out: &mut Vec<u8>,
) {
    let attributes = node.attributes;
    let data_layout = match shape.body {
        Body::Blocks => LAYOUT_PLAIN,
        Body::Inline(_) => LAYOUT_INLINE,
        Body::Chunks { .. } => LAYOUT_CHUNKS,
    };
    let (kind, location) = match node.content {
        Content::Directory => (S_IFDIR, first_block),
        Content::Regular(_) => match shape.body {
            Body::Chunks { bits, .. } => (S_IFREG, bits),
            _ => (S_IFREG, first_block),
        },
        Content::Symlink(_) => (S_IFLNK, first_block),
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
    xattr::write(node, redirects, out);
    match (shape.body, node.content) {
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
                let part = if layout.cut(*id).inline { Part::AllButLast } else { Part::All };
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    All,
    AllButLast,
    Last,
}

/// An entry on its way to a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listed<'n> {
    pub(crate) name: &'n [u8],
    pub(crate) nid: u64,
    /// As [`type_number`] tells it.
    pub(crate) file_type: u8,
}

/// The entries of a directory's block that is being filled.
pub(crate) struct DirectoryWriter<'n> {
    part: Part,
    block: Vec<Listed<'n>>,
    used: usize,
}

impl<'n> DirectoryWriter<'n> {
    pub(crate) fn new(part: Part) -> Self {
        Self { part, block: Vec::new(), used: 0 }
    }

    /// Adds the next entry; they come sorted, `.` and `..` among them.
    pub(crate) fn add(&mut self, entry: Listed<'n>, out: &mut Vec<u8>) {
        let need = DIRENT + entry.name.len();
        if self.used + need > BLOCK as usize {
            if self.part != Part::Last {
                write_directory_block(&self.block, out);
                out.resize(out.len() + BLOCK as usize - self.used, 0);
            }
            self.block.clear();
            self.used = 0;
        }
        self.used += need;
        self.block.push(entry);
    }

    /// Writes the last block, if it is to be written here.
    pub(crate) fn finish(self, out: &mut Vec<u8>) {
        if self.part != Part::AllButLast {
            write_directory_block(&self.block, out);
        }
    }
}

fn write_directory(layout: &Layout<'_>, id: NodeId, part: Part, out: &mut Vec<u8>) {
    let mut writer = DirectoryWriter::new(part);
    for (name, child) in entries(layout.tree, id, layout.parent(id)) {
        let file_type = file_type(layout.tree.node(child).content);
        writer.add(Listed { name, nid: layout.nid(child), file_type }, out);
    }
    writer.finish(out);
}

fn write_directory_block(block: &[Listed<'_>], out: &mut Vec<u8>) {
    let mut name_at = block.len() * DIRENT;
    for entry in block {
        out.extend_from_slice(&entry.nid.to_le_bytes());
        out.extend_from_slice(&(name_at as u16).to_le_bytes());
        out.extend_from_slice(&[entry.file_type, 0]);
        name_at += entry.name.len();
    }
    for entry in block {
        out.extend_from_slice(entry.name);
    }
}

/// A type as directories tell it.
pub(crate) fn type_number(file_type: FileType) -> u8 {
    match file_type {
        FileType::Regular => 1,
        FileType::Directory => 2,
        FileType::CharDevice => 3,
        FileType::BlockDevice => 4,
        FileType::Fifo => 5,
        FileType::Socket => 6,
        FileType::Symlink => 7,
    }
}

fn file_type(content: &Content) -> u8 {
    type_number(match content {
        Content::Regular(_) => FileType::Regular,
        Content::Directory => FileType::Directory,
        Content::CharDevice(_) => FileType::CharDevice,
        Content::BlockDevice(_) => FileType::BlockDevice,
        Content::Fifo => FileType::Fifo,
        Content::Socket => FileType::Socket,
        Content::Symlink(_) => FileType::Symlink,
    })
}
