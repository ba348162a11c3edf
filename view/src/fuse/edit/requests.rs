//! Requests, answered from the union of a tree and a scratch.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, Generation, INodeNo, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use rustix::fs::{FallocateFlags, FileType, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags};
use rustix::io::{Errno as Failure, Result};

use super::super::attributes::{NOTHING, send_xattr};
use super::super::space::FOR_EVER;
use super::change::{Attributes, Maker, New};
use super::place::Place;
use super::rename::Name;
use super::union::Union;
use super::{Editable, Edited, handles, listings};
use crate::mounting::LARGEST_REQUEST;

/// As the kernel is told.
fn told(error: Failure) -> Errno {
    Errno::from_i32(error.raw_os_error())
}

/// What every directory has in it.
const DOTS: [&str; 2] = [".", ".."];

fn answer(result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(told(error)),
    }
}

impl Editable {
    fn make(&self, parent: INodeNo, name: &OsStr, new: New<'_>, request: &Request, reply: ReplyEntry) {
        let maker = Maker { uid: request.uid(), gid: request.gid() };
        let mut union = self.union();
        match union.make(parent.0, name.as_bytes(), new, maker) {
            Ok((id, attributes, _)) => {
                union.nodes.count(id);
                let remembered = self.remembered(&mut union, parent.0, name.as_bytes());
                reply.entry_with_ttls(
                    self.while_certain(&FOR_EVER),
                    remembered,
                    &self.told(attributes),
                    Generation(0),
                );
            }
            Err(error) => reply.error(told(error)),
        }
    }
}

impl Edited {
    /// An object may have to be read, or fetched: nobody else waits for that.
    fn open_to_read(&self, ino: INodeNo, reply: ReplyOpen) {
        let mut union = self.union();
        let source = match union.open(ino.0, false) {
            Ok(source) => source,
            Err(error) => return reply.error(told(error)),
        };
        let number = self.handles.open(source, ino.0, false);
        let flags = self.opened(&mut union, ino.0);
        drop(union);
        let handles = Arc::clone(&self.handles);
        match self.handles.get(number) {
            Ok(handle) => handle.opened(move |opened| match opened {
                Ok(_) => reply.opened(FileHandle(number), flags),
                Err(error) => {
                    handles.close(number, ino.0);
                    reply.error(told(error));
                }
            }),
            Err(error) => reply.error(told(error)),
        }
    }
}

impl Filesystem for Editable {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        Self::ask_for(config);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut union = self.union();
        let remembered = self.remembered(&mut union, parent.0, name.as_bytes());
        match union.find(parent.0, name.as_bytes()) {
            Ok(Some(found)) => {
                union.nodes.count(found.id);
                let attributes = self.told(found.attributes);
                reply.entry_with_ttls(self.while_certain(&FOR_EVER), remembered, &attributes, Generation(0));
            }
            Ok(None) => reply.entry(remembered, &NOTHING, Generation(0)),
            Err(error) => reply.error(told(error)),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, times: u64) {
        let mut union = self.union();
        if union.nodes.forget(ino.0, times) {
            union.listings.forget(ino.0);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.union().attributes(ino.0) {
            Ok(attributes) => {
                reply.attr(self.while_certain(self.among.space.remembered(ino.0)), &self.told(attributes));
            }
            Err(error) => reply.error(told(error)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        fh: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let times = (atime.is_some() || mtime.is_some())
            .then(|| Timestamps { last_access: timespec(atime), last_modification: timespec(mtime) });
        let changes = Attributes { mode, uid, gid, size, times };
        let open = fh.and_then(|fh| self.handles.get(fh.0).ok());
        self.change(
            move |union| union.set_attributes(ino.0, &changes, open.as_deref()),
            move |edited, _, changed| match changed {
                Ok(attributes) => {
                    let remembered = edited.while_certain(edited.among.space.remembered(ino.0));
                    reply.attr(remembered, &edited.told(attributes));
                }
                Err(error) => reply.error(told(error)),
            },
        );
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.union().read_link(ino.0) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(told(error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let new = New::Node(FileType::from_raw_mode(mode), mode, rdev.into());
        self.make(parent, name, new, request, reply);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        self.make(parent, name, New::Directory(mode), request, reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        self.make(parent, name, New::Symlink(target.as_os_str().as_bytes()), request, reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.union().unlink(parent.0, name.as_bytes()), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.union().rmdir(parent.0, name.as_bytes()), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.as_bytes().to_vec(), new_name.as_bytes().to_vec());
        let space = self.among.space;
        let rename = move |union: &mut Union| {
            let from = Name { parent: parent.0, name: &name };
            union.rename_as_told(from, Name { parent: new_parent.0, name: &new_name }, flags, space)
        };
        self.change(rename, |_, _, renamed| answer(renamed, reply));
    }

    fn link(&self, _: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = Arc::new(name.as_bytes().to_vec());
        let linked = Arc::clone(&name);
        self.change(
            move |union| union.link(ino.0, parent.0, &linked),
            move |edited, union, linked| match linked {
                Ok(attributes) => {
                    union.nodes.count(ino.0);
                    let remembered = edited.remembered(union, parent.0, &name);
                    let certain = edited.while_certain(&FOR_EVER);
                    reply.entry_with_ttls(certain, remembered, &edited.told(attributes), Generation(0));
                }
                Err(error) => reply.error(told(error)),
            },
        );
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let anew = flags.0 & libc::O_TRUNC != 0;
        if !write && !anew {
            return self.open_to_read(ino, reply);
        }
        let open = move |union: &mut Union| {
            union.copy_up(ino.0, anew.then_some(0))?;
            let source = union.open(ino.0, true)?;
            if anew && let handles::Source::File(file) = &source {
                rustix::fs::ftruncate(file, 0)?;
            }
            Ok(source)
        };
        self.change(open, move |edited, union, opened| match opened {
            Ok(source) => {
                let handle = edited.handles.open(source, ino.0, write);
                reply.opened(FileHandle(handle), edited.opened(union, ino.0));
            }
            Err(error) => reply.error(told(error)),
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let maker = Maker { uid: request.uid(), gid: request.gid() };
        let new = New::Node(FileType::RegularFile, mode, 0);
        let mut union = self.union();
        match union.make(parent.0, name.as_bytes(), new, maker) {
            Ok((id, attributes, Some(file))) => {
                union.nodes.count(id);
                let write = OpenFlags(flags).acc_mode() != OpenAccMode::O_RDONLY;
                let handle = FileHandle(self.handles.open(handles::Source::File(Arc::new(file)), id, write));
                let flags = self.opened(&mut union, id);
                let remembered = self.remembered(&mut union, parent.0, name.as_bytes());
                reply.created(
                    self.while_certain(remembered),
                    &self.told(attributes),
                    Generation(0),
                    handle,
                    flags,
                );
            }
            Ok((_, _, None)) => reply.error(Errno::EIO),
            Err(error) => reply.error(told(error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size.min(LARGEST_REQUEST) as usize;
        let handle = match self.handles.get(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(told(error)),
        };
        handle.opened(move |opened| {
            let mut reply = Some(reply);
            let send = |bytes: &[u8]| {
                if let Some(reply) = reply.take() {
                    reply.data(bytes);
                }
            };
            let read = opened.and_then(|opened| opened.read(offset, size, send));
            if let (Err(error), Some(reply)) = (read, reply) {
                reply.error(told(error));
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let of_mapping = flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let write = |file: &std::fs::File| {
            // What is written through a mapping takes no set-user-ID away; of a write(2) the kernel has decided that before.
            let kept = if of_mapping { rustix::fs::fstat(file)?.st_mode & 0o7777 } else { 0 };
            let mut written = 0;
            while written < data.len() {
                match rustix::io::pwrite(file, &data[written..], offset + written as u64) {
                    Ok(length) => written += length,
                    Err(Failure::INTR) => {}
                    // What was written counts; the error comes again with the next.
                    Err(_) if written > 0 => break,
                    Err(error) => return Err(error),
                }
            }
            if kept & 0o6000 != 0 {
                rustix::fs::fchmod(file, rustix::fs::Mode::from_raw_mode(kept))?;
            }
            Ok(written as u32)
        };
        match self.handles.get(fh.0).and_then(|handle| handle.with_file(write)) {
            Ok(written) => reply.written(written),
            Err(error) => reply.error(told(error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Nothing is held back: the kernel never asks again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.handles.close(fh.0, ino.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let sync =
            |handle: Arc<handles::Handle>| {
                handle.with_file(|file| {
                    if data_only { rustix::fs::fdatasync(file) } else { rustix::fs::fsync(file) }
                })
            };
        match self.handles.get(fh.0).and_then(sync) {
            // What the tree has is on the disk.
            Err(Failure::BADF) => reply.ok(),
            other => answer(other, reply),
        }
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.among.space.open_directory(ino.0, reply);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut union = self.union();
        let listing = match union.listing(ino.0, offset == 0) {
            Ok(listing) => listing,
            Err(error) => return reply.error(told(error)),
        };
        for (index, name) in DOTS.into_iter().enumerate().skip(offset as usize) {
            let own = self.among.space.number(ino.0);
            if reply.add(own, index as u64 + 1, fuser::FileType::Directory, name) {
                return reply.ok();
            }
        }
        let rest = listings::after(&listing, offset.saturating_sub(DOTS.len() as u64));
        if rest.is_empty() {
            union.listings.end(ino.0);
        }
        for entry in rest {
            let (next, name) = (entry.position + DOTS.len() as u64, OsStr::from_bytes(&entry.name));
            if reply.add(self.among.space.number(entry.id), next, entry.kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let mut union = self.union();
        let listing = union.listing(ino.0, offset == 0);
        let (listing, own) = match listing.and_then(|listing| Ok((listing, union.attributes(ino.0)?))) {
            Ok((listing, own)) => (listing, self.told(own)),
            Err(error) => return reply.error(told(error)),
        };
        let remembered = self.among.space.remembered(ino.0);
        for (index, name) in DOTS.into_iter().enumerate().skip(offset as usize) {
            if reply.add(own.ino, index as u64 + 1, name, remembered, &own, Generation(0)) {
                return reply.ok();
            }
        }
        let directory = match union.directory(ino.0) {
            Ok(directory) => directory,
            Err(error) => return reply.error(told(error)),
        };
        // What was removed has no names.
        let listing = if union.was_removed(ino.0) { &[][..] } else { &listing[..] };
        let rest = listings::after(listing, offset.saturating_sub(DOTS.len() as u64));
        if rest.is_empty() {
            union.listings.end(ino.0);
        }
        for entry in rest {
            // Asked for again: what was removed since must not come back to the kernel's memory.
            let found = match union.find_in(ino.0, directory.as_ref(), &entry.name) {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(error) => return reply.error(told(error)),
            };
            let (next, name) = (entry.position + DOTS.len() as u64, OsStr::from_bytes(&entry.name));
            let attributes = self.told(found.attributes);
            let remembered = self.while_certain(self.remembered(&mut union, ino.0, &entry.name));
            if reply.add(attributes.ino, next, name, remembered, &attributes, Generation(0)) {
                break;
            }
            union.nodes.count(found.id);
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let directory = self.union().place(ino.0);
        let sync = |place: Place| place.open(rustix::fs::OFlags::RDONLY).and_then(rustix::fs::fsync);
        answer(directory.and_then(|place| place.map_or(Ok(()), sync)), reply);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match rustix::fs::fstatvfs(self.union().upper.root()) {
            Ok(stat) => reply.statfs(
                stat.f_blocks,
                stat.f_bfree,
                stat.f_bavail,
                stat.f_files,
                stat.f_ffree,
                stat.f_bsize as u32,
                stat.f_namemax as u32,
                stat.f_frsize as u32,
            ),
            Err(error) => reply.error(told(error)),
        }
    }

    fn setxattr(
        &self,
        _: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let flags = XattrFlags::from_bits_truncate(flags.cast_unsigned());
        let (name, value) = (name.as_bytes().to_vec(), value.to_vec());
        let set = move |union: &mut Union| union.set_xattr(ino.0, &name, &value, flags);
        self.change(set, |_, _, set| answer(set, reply));
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.union().xattr(ino.0, name.as_bytes()) {
            Ok(Some(value)) => send_xattr(&value, size, reply),
            Ok(None) => reply.error(Errno::ENODATA),
            Err(error) => reply.error(told(error)),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.union().xattrs(ino.0) {
            Ok(names) => {
                let list: Vec<u8> = names.into_iter().flat_map(|name| [name, vec![0]].concat()).collect();
                send_xattr(&list, size, reply);
            }
            Err(error) => reply.error(told(error)),
        }
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        let remove = move |union: &mut Union| union.remove_xattr(ino.0, &name);
        self.change(remove, |_, _, removed| answer(removed, reply));
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let flags = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let allocate = |file: &std::fs::File| rustix::fs::fallocate(file, flags, offset, length);
        answer(self.handles.get(fh.0).and_then(|handle| handle.with_file(allocate)), reply);
    }

    fn lseek(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return reply.error(Errno::EINVAL),
        };
        let handle = match self.handles.get(fh.0) {
            Ok(handle) => handle,
            Err(error) => return reply.error(told(error)),
        };
        handle.opened(move |opened| {
            match opened.and_then(|opened| opened.seek(offset.cast_unsigned(), hole)) {
                Ok(found) => reply.offset(found.cast_signed()),
                Err(error) => reply.error(told(error)),
            }
        });
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        from: FileHandle,
        mut offset: u64,
        _: INodeNo,
        to: FileHandle,
        mut to_offset: u64,
        length: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // An answer has 32 bits.
        let length = length.min(1 << 30) as usize;
        let (from, to) = match (self.handles.get(from.0), self.handles.get(to.0)) {
            (Ok(from), Ok(to)) => (from, to),
            (Err(error), _) | (_, Err(error)) => return reply.error(told(error)),
        };
        from.opened(move |from| {
            let copied = from.and_then(|from| match from {
                handles::Opened::File(from) => to.with_file(|to| {
                    rustix::fs::copy_file_range(from, Some(&mut offset), to, Some(&mut to_offset), length)
                }),
                handles::Opened::Bytes(_) => Err(Failure::BADF),
            });
            match copied {
                Ok(copied) => reply.written(copied as u32),
                // From the tree itself, or between file systems: the kernel reads and writes instead.
                Err(Failure::BADF | Failure::XDEV) => reply.error(Errno::EOPNOTSUPP),
                Err(error) => reply.error(told(error)),
            }
        });
    }
}

fn timespec(time: Option<TimeOrNow>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(TimeOrNow::SpecificTime(time)) => match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => {
                Timespec { tv_sec: after.as_secs().cast_signed(), tv_nsec: after.subsec_nanos().into() }
            }
            // fuser has taken the nanoseconds for a part of the seconds before 1970, where the kernel counts them from
            // the second on: this takes that back.
            Err(before) => {
                let before = before.duration();
                Timespec { tv_sec: -before.as_secs().cast_signed(), tv_nsec: before.subsec_nanos().into() }
            }
        },
    }
}
