//! Extents of files: sharing them, and finding out which are shared.

#[cfg(target_os = "linux")]
pub(crate) use linux::{exclusive_bytes, share_range};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{exclusive_bytes, share_range};

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io;
    use std::os::fd::{AsFd as _, AsRawFd as _};
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

    use rustix::ioctl::{Setter, Updater, ioctl, opcode};

    use crate::Result;
    use crate::error::Context as _;

    /// `struct file_clone_range` of `linux/fs.h`.
    #[repr(C)]
    struct CloneRange {
        from: i64,
        from_offset: u64,
        length: u64,
        to_offset: u64,
    }

    /// Makes `length` bytes at `at` of `to` the same blocks as the first `length` of `from` (`FICLONERANGE`,
    /// ioctl_ficlonerange(2)). All or nothing. `length` and `at` have to be multiples of the file system's block size.
    pub(crate) fn share_range(from: &File, to: &File, at: u64, length: u64) -> io::Result<()> {
        const CLONE_RANGE: rustix::ioctl::Opcode = opcode::write::<CloneRange>(0x94, 13);
        let range =
            CloneRange { from: from.as_fd().as_raw_fd().into(), from_offset: 0, length, to_offset: at };
        // SAFETY: the opcode is FICLONERANGE's, which reads a `struct file_clone_range`; the descriptor in it is open.
        unsafe { ioctl(to, Setter::<CLONE_RANGE, CloneRange>::new(range)) }?;
        Ok(())
    }

    const BATCH: usize = 256;
    const LAST: u32 = 0x1;
    const SHARED: u32 = 0x2000;

    /// `struct fiemap` of `linux/fiemap.h`, up to its extents.
    #[repr(C)]
    #[derive(Default)]
    struct MapHeader {
        start: u64,
        length: u64,
        flags: u32,
        mapped: u32,
        count: u32,
        reserved: u32,
    }

    /// `struct fiemap_extent`.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Extent {
        logical: u64,
        physical: u64,
        length: u64,
        reserved: [u64; 2],
        flags: u32,
        reserved_too: [u32; 3],
    }

    #[repr(C)]
    struct Map {
        header: MapHeader,
        extents: [Extent; BATCH],
    }

    /// Bytes of the disk that only this file has, by the file system's own account (`FS_IOC_FIEMAP`): what its
    /// removal gives back. Where that cannot be asked, all bytes that are allocated.
    pub(crate) fn exclusive_bytes(path: &Path) -> Result<u64> {
        const FIEMAP: rustix::ioctl::Opcode = opcode::read_write::<MapHeader>(b'f', 11);
        let file = File::open(path).doing("open", path)?;
        let allocated = file.metadata().doing("read", path)?.blocks() * 512;
        let mut map = Box::new(Map { header: MapHeader::default(), extents: [Extent::default(); BATCH] });
        let (mut exclusive, mut start) = (0_u64, 0_u64);
        loop {
            map.header =
                MapHeader { start, length: u64::MAX - start, count: BATCH as u32, ..MapHeader::default() };
            // SAFETY: the opcode is FS_IOC_FIEMAP's, which updates a `struct fiemap` with room for `count` extents
            // behind it.
            let asked = unsafe { ioctl(&file, Updater::<FIEMAP, Map>::new(&mut map)) };
            if asked.is_err() {
                return Ok(allocated);
            }
            let extents = &map.extents[..(map.header.mapped as usize).min(BATCH)];
            exclusive +=
                extents.iter().filter(|one| one.flags & SHARED == 0).map(|one| one.length).sum::<u64>();
            match extents.last() {
                Some(last) if last.flags & LAST == 0 && last.logical.saturating_add(last.length) > start => {
                    start = last.logical.saturating_add(last.length);
                }
                // Compressed extents take less than they say.
                _ => return Ok(exclusive.min(allocated)),
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

    use crate::Result;
    use crate::error::Context as _;

    pub(crate) fn share_range(_: &File, _: &File, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// All bytes that are allocated: which of them are shared cannot be asked.
    pub(crate) fn exclusive_bytes(path: &Path) -> Result<u64> {
        Ok(std::fs::metadata(path).doing("read", path)?.blocks() * 512)
    }
}
