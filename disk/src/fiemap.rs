//! The extents of a file, as the kernel tells them (Documentation/filesystems/fiemap.rst).
//!
//! What its flags mean for counting:
//!
//! | flag | counts | why |
//! |---|---|---|
//! | none | as the file's own | allocated, and nobody else refers to it |
//! | `SHARED` | by its physical place | somebody refers to it too: another file, or another part of this one |
//! | `UNWRITTEN` | as allocated | it reads as zeros, but the room is taken |
//! | `DELALLOC`, `UNKNOWN` | as the file's own | written, and will be allocated when the kernel gets to it; its physical place means nothing |
//! | `DATA_INLINE`, `DATA_TAIL`, `NOT_ALIGNED` | as the file's own | inside of a block of metadata |
//! | `ENCODED` | with its length in the file | compressed or encrypted: the length on the disk is not told |
//!
//! `st_blocks` knows none of this: a reflinked copy has as many blocks as its original.

use std::fs::File;
use std::io;
use std::mem;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::usage::Mapping;

/// How many extents the kernel is asked for at once: 56 KiB.
const PAGE: usize = 1024;

const LAST: u32 = 0x1;
const UNKNOWN: u32 = 0x2;
const DELALLOC: u32 = 0x4;
const NOT_ALIGNED: u32 = 0x100;
const DATA_INLINE: u32 = 0x200;
const DATA_TAIL: u32 = 0x400;
const SHARED: u32 = 0x2000;

/// Extents whose physical place says nothing.
const NOWHERE: u32 = UNKNOWN | DELALLOC | NOT_ALIGNED | DATA_INLINE | DATA_TAIL;

/// `struct fiemap` without its extents.
#[repr(C)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved_wide: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Page {
    header: Header,
    extents: [Extent; PAGE],
}

/// `FS_IOC_FIEMAP`. Its number has the size of the header only; the extents follow.
const FIEMAP: Opcode = opcode::read_write::<Header>(b'f', 11);

const _: () = assert!(mem::size_of::<Header>() == 32 && mem::size_of::<Extent>() == 56);

/// Where the bytes of a file are.
///
/// # Errors
/// The file system does not tell (`EOPNOTSUPP`, `ENOTTY`), or tells what cannot be.
pub(crate) fn mapping(file: &File) -> io::Result<Mapping> {
    let mut mapping = Mapping::default();
    let nothing =
        Extent { logical: 0, physical: 0, length: 0, reserved_wide: [0; 2], flags: 0, reserved: [0; 3] };
    let header = Header { start: 0, length: 0, flags: 0, mapped: 0, count: 0, reserved: 0 };
    let mut page = Box::new(Page { header, extents: [nothing; PAGE] });
    let mut start = 0;
    loop {
        let length = u64::MAX - start;
        page.header = Header { start, length, flags: 0, mapped: 0, count: PAGE as u32, reserved: 0 };
        // SAFETY: the opcode's argument is a `struct fiemap` followed by as many extents as its `count` says, and the kernel
        // writes no more than those.
        unsafe { ioctl(file, Updater::<FIEMAP, Page>::new(&mut page)) }?;
        let told = page.extents.get(..page.header.mapped as usize);
        let told =
            told.ok_or_else(|| io::Error::other("the kernel gave more extents than were asked for"))?;
        let Some(last) = told.last() else { return Ok(mapping) };
        for extent in told {
            mapping
                .add(extent.length, (extent.flags & (SHARED | NOWHERE) == SHARED).then_some(extent.physical));
        }
        if last.flags & LAST != 0 {
            return Ok(mapping);
        }
        let next = last.logical.checked_add(last.length).filter(|next| *next > start);
        // Otherwise this would go on for ever.
        start = next.ok_or_else(|| io::Error::other("the kernel gave extents that lead nowhere"))?;
    }
}
