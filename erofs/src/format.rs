//! The on-disk format: EROFS as Linux defines it (`fs/erofs/erofs_fs.h`), and what Kiln makes of it.
//!
//! All numbers are little-endian. A block is 4096 bytes. An image, as the writer lays it out:
//!
//! ```text
//! 0      Kiln's own header (32 bytes, below); the kernel does not look here
//! 1024   superblock (128 bytes)
//! 1152   inodes, each at a multiple of 32: nid = offset / 32, the root's is 36
//! …      zeros to the next block
//!        directory blocks, and symlinks too long to be inline, in the order of their inodes
//!        (image with data only) file data, each file at the start of a block, equal objects once
//! ```
//!
//! # Kiln's header
//!
//! ```text
//! 0   8   magic "kilntree"
//! 8   4   version of this layout (VERSION); a reader refuses a newer one
//! 12  4   kind: 1 metadata-only, 2 with data
//! 16  16  zeros
//! ```
//! An image without it (made by `mkfs.erofs` or `mkcomposefs`) is read all the same.
//!
//! # Superblock
//!
//! ```text
//! 0   4   magic 0xE0F5E1E2            36  4  blocks: length of the image
//! 4   4   CRC-32C of the first block  40  4  first metadata block: 0
//!         from here on                44  4  first block of shared xattrs: 0, unused
//! 8   4   compatible features         48  16 UUID: zeros
//! 12  1   log2(block size): 12        64  16 volume name: zeros
//! 13  1   extra slots: 0              80  4  incompatible features
//! 14  2   nid of the root             84  44 zeros
//! 16  8   number of inodes
//! 24  8   epoch, seconds (signed)
//! 32  4   epoch, nanoseconds
//! ```
//! The epoch is the time that compact inodes have, for they have no room for their own. The writer chooses the
//! most common time of the tree (the earliest of the most common ones).
//!
//! # Inodes
//!
//! ```text
//!     compact  extended
//! 0   2        2   format: bit 0 extended, bits 1–3 data layout
//! 2   2        2   xattrs: 0 for none, else 1 + (bytes after their header) / 4
//! 4   2        2   mode, with the file type
//! 6   2        44  number of links (4 bytes in an extended inode)
//! 8   4        8   8 size (4 bytes in a compact inode)
//! 16  4        4   first data block, or device number, or chunk format
//! 20  4        4   position among the inodes, from 1: for 32-bit `stat`
//! 24  2        4   uid (26: gid in a compact inode, 28 in an extended one)
//! 32  -        8   time, seconds     40 - 4 time, nanoseconds
//! ```
//! A compact inode has 32 bytes and is used when the size fits 32 bits, links and ids fit 16, and the time is
//! the epoch. Its bytes 12–15 are an offset from the epoch in kernels from 6.15 on, and ignored before: they
//! are always zero, so that all kernels see the same time.
//!
//! After the inode come its xattrs, and then, by data layout:
//! - *plain* (0): nothing. The data are whole blocks from the first data block on.
//! - *inline* (2): the data that go beyond whole blocks. They must not cross a block boundary: the inode is
//!   moved to where they do not.
//! - *chunks* (4): an array of 4-byte block numbers; 0xFFFF_FFFF is a hole. This is what files have whose
//!   data are elsewhere: a single hole, as large as one chunk can be made.
//!
//! # Directories
//!
//! Blocks of entries sorted bytewise, `.` and `..` among them. The last block is inline where that costs fewer
//! bytes than a block of its own would.
//!
//! ```text
//! entry: 8 nid, 2 offset of the name in the block, 1 file type, 1 zero
//! ```
//! The entries of a block come first and then their names without separators; the first name's offset tells how
//! many entries there are; zeros fill a block that is not the last.
//!
//! # xattrs
//!
//! A header of 12 bytes (zeros: no filter, no shared xattrs) and entries, each padded to 4 bytes:
//!
//! ```text
//! 1 length of the name, 1 index of its prefix, 2 length of the value, name without prefix, value
//! ```
//! Prefixes are 1 `user.`, 2 `system.posix_acl_access`, 3 `system.posix_acl_default`, 4 `trusted.`,
//! 6 `security.`. A name that has none of them goes in whole with index 0: the kernel passes over it, and the
//! reader gives it back.
//!
//! A file whose data are an object carries, first, `trusted.overlay.metacopy` (empty) and
//! `trusted.overlay.redirect` = `/ab/cdef…`: the object's path below a data-only lower directory
//! (`Documentation/filesystems/overlayfs.rst`, «Data-only lower layers»). How other names that begin with
//! `trusted.overlay.` are written is said at [`crate::escape_xattr_name`].
//!
//! # Order
//!
//! The root, then the entries of the root in the order of their names, then, for each subdirectory in that order,
//! its entries and so on, depth first. A file with several names stands where its first one is met. So the inodes
//! of one directory lie together, which is what `ls -l` and `find` read together.

/// Kiln's magic at the start of an image.
pub(crate) const KILN_MAGIC: &[u8; 8] = b"kilntree";
/// Version of the layout described here. Raised when images change that older readers cannot read; every
/// layer's identity changes with any change in what is written, so that the golden test must change with it.
pub const VERSION: u32 = 1;

pub(crate) const BLOCK_BITS: u32 = 12;
/// Bytes of a block. File-backed mounts need it to be at most the page size, and 4096 is that everywhere.
pub(crate) const BLOCK: u64 = 1 << BLOCK_BITS;

/// Where the superblock is; what is before it is free for others.
pub(crate) const SUPER_OFFSET: usize = 1024;
pub(crate) const SUPER_SIZE: usize = 128;
pub(crate) const SUPER_MAGIC: u32 = 0xE0F5_E1E2;

/// The superblock has a checksum.
pub(crate) const COMPAT_CHECKSUM: u32 = 1;
/// Times are modification times (what the kernel takes them for anyway; `dump.erofs` shows it).
pub(crate) const COMPAT_MTIME: u32 = 2;
/// Files may have the chunk layout.
pub(crate) const INCOMPAT_CHUNKED: u32 = 4;
/// All that the reader can read. Zero padding (1) concerns only compressed data, which are refused at the inode.
pub(crate) const INCOMPAT_KNOWN: u32 = INCOMPAT_CHUNKED | 1;

/// Inodes are at multiples of this.
pub(crate) const SLOT: u64 = 32;
pub(crate) const COMPACT_SIZE: usize = 32;
pub(crate) const EXTENDED_SIZE: usize = 64;

pub(crate) const LAYOUT_PLAIN: u16 = 0;
pub(crate) const LAYOUT_INLINE: u16 = 2;
pub(crate) const LAYOUT_CHUNKS: u16 = 4;
/// Layouts whose data are in the image.
pub(crate) const INLINE_LAYOUTS: [u16; 2] = [LAYOUT_PLAIN, LAYOUT_INLINE];

/// A chunk that is a hole, and a first data block that there is not.
pub(crate) const NULL_BLOCK: u32 = u32::MAX;
/// The chunk format has five bits for log2(blocks of a chunk): 8 TiB at most.
pub(crate) const MAX_CHUNK_BITS: u32 = 31;
/// All of the chunk format: those five bits, and one for 8-byte entries.
pub(crate) const CHUNK_FORMAT: u32 = 0x3f;

pub(crate) const DIRENT: usize = 12;
/// The longest name of an entry.
pub const NAME_MAX: usize = 255;
/// The longest target of a symlink (Linux's PATH_MAX less its NUL).
pub const SYMLINK_MAX: usize = 4095;

pub(crate) const XATTR_HEADER: usize = 12;
/// The count of a compact or extended inode has 16 bits and counts 4-byte units, the header as one.
pub(crate) const XATTR_BODY_MAX: usize = XATTR_HEADER + 4 * (u16::MAX as usize - 1);

pub(crate) const S_IFMT: u32 = 0o170_000;
pub(crate) const S_IFSOCK: u32 = 0o140_000;
pub(crate) const S_IFLNK: u32 = 0o120_000;
pub(crate) const S_IFREG: u32 = 0o100_000;
pub(crate) const S_IFBLK: u32 = 0o060_000;
pub(crate) const S_IFDIR: u32 = 0o040_000;
pub(crate) const S_IFCHR: u32 = 0o020_000;
pub(crate) const S_IFIFO: u32 = 0o010_000;

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// The superblock's checksum: CRC-32C without the final inversion, over the first block from the superblock on
/// with zeros in place of the checksum.
pub(crate) fn superblock_checksum(first_block: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for (at, byte) in first_block.iter().enumerate().skip(SUPER_OFFSET) {
        let byte = if (SUPER_OFFSET + 4..SUPER_OFFSET + 8).contains(&at) { 0 } else { *byte };
        crc = (crc >> 8) ^ CRC_TABLE[usize::from(crc as u8 ^ byte)];
    }
    crc
}
