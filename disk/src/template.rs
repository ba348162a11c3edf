//! The ext4 with which every writable disk begins.
//!
//! No `mkfs` runs where disks are made: an empty ext4 of 64 MiB is part of this program, and making a disk is writing
//! the 11 blocks of it that are not zero into a sparse file of the size asked for. The machine that mounts it lets its
//! own kernel grow the file system to the size of its device.
//!
//! # How the guest grows it
//!
//! Mounted, and told by `ioctl(fd of the mount point, EXT4_IOC_RESIZE_FS, &blocks)`, where the request is
//! `_IOW('f', 16, u64)` = `0x4008_6610` and `blocks` the new size in units of 4096 bytes; it takes `CAP_SYS_RESOURCE`.
//! A size that the file system has already is no error; the kernel rounds down by up to a group where the rest of the
//! device is too small for a group's own blocks. The file system can be used meanwhile. Under emulation on a busy host, growth to
//! 16 GiB took 50 to 300 ms, to 64 GiB 200 to 800 ms, and to 2 TiB half a minute: a guest does best to let its
//! workload begin with the first few GiB and to go on growing beside it.
//!
//! Then remount with `noinit_itable`. Otherwise a kernel thread zeroes the inode tables of all new groups in the
//! background: 16 MiB a GiB, zeros onto zeros, which each machine would pay for in blocks of its own wherever the driver of
//! its disk cannot punch holes. The thread starts up to five seconds after the growth, so a remount that follows at once is
//! early enough; and nothing relies on those zeros, since the file system has checksums of its groups, which say which part
//! of a table is in use.
//!
//! # Why it is as it is
//!
//! - `meta_bg` from the first group on, and no `resize_inode`: growing has no limit that was set when the template was made
//!   (`resize_inode` reserves descriptor blocks in advance, 4 MiB in every backup group for 8 TiB, and needs a journal
//!   that can take all of them in one transaction). With `64bit`, the limits are those of [`LARGEST`].
//! - `flex_bg` of 16 groups; 8192 inodes a group of 128 MiB, one for each 16 KiB as everybody has it.
//! - `metadata_csum` with `metadata_csum_seed`: only the superblock's own checksum depends on the UUID, so every disk gets
//!   a UUID of its own without any other block being touched. All of this is older than the oldest kernel that guests
//!   have (6.1).
//! - A journal of 16 MiB: it cannot grow online, a smaller one would throttle those who unpack many small files, and each
//!   disk sooner or later has all of it in blocks of its own.
//! - 64 MiB, so that this journal has a place. A disk cannot be smaller.
//! - Errors remount it read-only: a guest that goes on writing to a damaged file system damages it more.
//!
//! # The embedded form
//!
//! `ext4.zst`, a zstd frame of:
//!
//! ```text
//! 0   16 bytes  "kiln-ext4-disk 1"
//! 16  u32       size of the file system in blocks of 4096 bytes (all numbers little-endian)
//! 20  records, ascending by block number, of:
//!       u32         block number
//!       4096 bytes  the block; blocks without a record are zero
//! ```
//!
//! `cargo xtask disk-template` makes it anew, and a test of `xtask` compares it with what `mke2fs` gives.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// The size of the file system as it is written, in bytes: no disk is smaller.
pub const SMALLEST: u64 = 64 << 20;

/// The largest size, in bytes, to which it can grow: there are 2³² inode numbers, and 8192 are used up by each 128 MiB.
pub const LARGEST: u64 = 63 << 40;

/// Disks are multiples of this many bytes: the file system's block.
pub const BLOCK: u64 = 4096;

/// What writing it takes of the host's file system, in bytes, at most.
pub(crate) const WRITTEN: u64 = 64 << 10;

const TEMPLATE: &[u8] = include_bytes!("ext4.zst");
const MAGIC: &[u8; 16] = b"kiln-ext4-disk 1";
/// Far more than the template has: a bound for the decompressor.
const MOST: u64 = 4 << 20;

/// Where things are in the superblock (`ext4_super_block` in the kernel's documentation of ext4), which is 1024 bytes long
/// and begins at byte 1024.
mod superblock {
    use std::ops::Range;

    pub(super) const PLACE: Range<usize> = 1024..2048;
    pub(super) const UUID: Range<usize> = 0x68..0x78;
    pub(super) const HASH_SEED: Range<usize> = 0xec..0xfc;
    pub(super) const CHECKSUM: Range<usize> = 0x3fc..0x400;
}

/// What makes a new file system different from all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its UUID.
    pub uuid: [u8; 16],
    /// What names are hashed with in large directories, so that nobody knows beforehand which names collide.
    pub hash_seed: [u8; 16],
}

impl Identity {
    /// A new one.
    ///
    /// # Errors
    /// The operating system gives no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [[0; 16]; 2];
        for uuid in &mut bytes {
            getrandom::fill(uuid).map_err(io::Error::other)?;
            // Version 4, variant 1 of RFC 9562.
            uuid[6] = uuid[6] & 0x0f | 0x40;
            uuid[8] = uuid[8] & 0x3f | 0x80;
        }
        Ok(Self { uuid: bytes[0], hash_seed: bytes[1] })
    }

    /// That of the template itself: with it, the file system is written bit by bit as it was made.
    ///
    /// # Errors
    /// The embedded template cannot be read.
    pub fn of_the_template() -> io::Result<Self> {
        let blocks = unpack()?;
        let first = blocks.first().filter(|(number, _)| *number == 0).ok_or_else(damaged)?;
        let superblock = first.1.get(superblock::PLACE).ok_or_else(damaged)?;
        let field = |place: Range<usize>| superblock[place].try_into().map_err(|_| damaged());
        Ok(Self { uuid: field(superblock::UUID)?, hash_seed: field(superblock::HASH_SEED)? })
    }
}

/// Writes the file system to `file`, a file or block device of at least [`SMALLEST`] bytes that reads as zeros.
///
/// # Errors
/// Writing fails.
pub fn write_ext4(file: &File, identity: &Identity) -> io::Result<()> {
    for (number, mut block) in unpack()? {
        if number == 0 {
            let superblock = block.get_mut(superblock::PLACE).ok_or_else(damaged)?;
            superblock[superblock::UUID].copy_from_slice(&identity.uuid);
            superblock[superblock::HASH_SEED].copy_from_slice(&identity.hash_seed);
            let checksum = crc32c(&superblock[..superblock::CHECKSUM.start]);
            superblock[superblock::CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        }
        file.write_all_at(&block, u64::from(number) * BLOCK)?;
    }
    Ok(())
}

/// The template's blocks, with their numbers.
fn unpack() -> io::Result<Vec<(u32, Vec<u8>)>> {
    let mut bytes = Vec::new();
    zstd::Decoder::with_buffer(TEMPLATE)?.take(MOST).read_to_end(&mut bytes)?;
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(damaged)?;
    let (size, records) = rest.split_first_chunk().ok_or_else(damaged)?;
    if u64::from(u32::from_le_bytes(*size)) * BLOCK != SMALLEST {
        return Err(damaged());
    }
    let records = records.chunks(4 + BLOCK as usize);
    records
        .map(|record| {
            let (number, block) = record.split_first_chunk().ok_or_else(damaged)?;
            let number = u32::from_le_bytes(*number);
            let inside = u64::from(number) < SMALLEST / BLOCK && block.len() as u64 == BLOCK;
            if inside { Ok((number, block.to_vec())) } else { Err(damaged()) }
        })
        .collect()
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the embedded file system is damaged")
}

/// CRC-32C as ext4 has it: begun with all ones, and not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc_32c() {
        // RFC 3720, B.4.
        assert_eq!(!crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn the_template_is_small_and_takes_no_more_than_it_says() {
        let blocks = unpack().unwrap();
        assert!(blocks.len() as u64 * BLOCK <= WRITTEN, "{} blocks", blocks.len());
        assert!(blocks.is_sorted_by_key(|(number, _)| *number));
        assert!(TEMPLATE.len() <= 4096, "{} bytes", TEMPLATE.len());
    }

    #[test]
    fn identities_are_random_uuids() {
        let one = Identity::random().unwrap();
        assert_ne!(one, Identity::random().unwrap());
        for uuid in [one.uuid, one.hash_seed] {
            assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (4, 2));
        }
    }
}
