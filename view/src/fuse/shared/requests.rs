//! Requests of a shared connection, each given to the tree that it is for.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::super::attributes::{NOTHING, send_xattr};
use super::super::edit::Editable;
use super::super::space::{ROOT, Share};
use super::{Callers, Tree, Trees};

/// A connection.
pub(super) struct Shared {
    pub(super) trees: Arc<Trees>,
    pub(super) callers: Arc<dyn Callers>,
}

/// A tree, and the number that something has in it.
type Place = (Share, Arc<Tree>, INodeNo);

impl Shared {
    fn tree(&self, share: Option<Share>) -> Result<Arc<Tree>, Errno> {
        let shown = self.trees.shown.read().unwrap_or_else(PoisonError::into_inner);
        share.and_then(|share| shown.get(&share).cloned()).ok_or(Errno::ESTALE)
    }

    /// What a number means to who asks. `None`: the empty root.
    fn seen(&self, request: &Request, ino: INodeNo) -> Result<Option<Place>, Errno> {
        if ino.0 != ROOT {
            let (share, own) = Share::split(ino.0);
            return share
                .map(|share| self.tree(Some(share)).map(|tree| (share, tree, INodeNo(own))))
                .transpose();
        }
        let Some(share) = self.callers.tree_of(request.pid()) else { return Ok(None) };
        // A tree that was taken away in this moment.
        Ok(self.tree(Some(share)).ok().map(|tree| (share, tree, ino)))
    }

    /// The same, where the empty root can only be told that there is nothing.
    fn place(&self, request: &Request, ino: INodeNo, nothing: Errno) -> Result<Place, Errno> {
        self.seen(request, ino)?.ok_or(nothing)
    }

    /// The same, for what is to be changed.
    fn changed(&self, request: &Request, ino: INodeNo) -> Result<Place, Errno> {
        let place = self.place(request, ino, Errno::EROFS)?;
        drop(place.1.is_changing()?);
        Ok(place)
    }

    /// The same, for what is open to be written, whatever has become of the tree since.
    fn written(&self, request: &Request, ino: INodeNo) -> Result<Place, Errno> {
        let place = self.place(request, ino, Errno::EROFS)?;
        if !place.1.is_written(Some(place.2)) {
            drop(place.1.is_changing()?);
        }
        Ok(place)
    }

    /// Whose listing a handle is: that of the root is of the tree of who opened it. `None`: it lists the empty root.
    fn listed(
        &self,
        ino: INodeNo,
        handle: FileHandle,
    ) -> Result<Option<(Arc<Tree>, INodeNo, FileHandle)>, Errno> {
        let (share, own, handle) = if ino.0 == ROOT {
            let (share, handle) = Share::split(handle.0);
            (share, ROOT, FileHandle(handle))
        } else {
            let (share, own) = Share::split(ino.0);
            (share, own, handle)
        };
        if share.is_none() && ino.0 == ROOT {
            return Ok(None);
        }
        Ok(Some((self.tree(share)?, INodeNo(own), handle)))
    }
}

/// The root of who sees nothing.
fn empty_root() -> FileAttr {
    FileAttr {
        ino: INodeNo(ROOT),
        kind: fuser::FileType::Directory,
        perm: 0o555,
        nlink: 2,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        blksize: 4096,
        ..NOTHING
    }
}

/// What was found, or the answer that there is an error.
macro_rules! or_tell {
    ($found:expr, $reply:expr) => {
        match $found {
            Ok(found) => found,
            Err(error) => return $reply.error(error),
        }
    };
}

impl Filesystem for Shared {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        Editable::ask_for(config);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (_, tree, parent) = or_tell!(self.place(request, parent, Errno::ENOENT), reply);
        tree.server().lookup(request, parent, name, reply);
    }

    fn forget(&self, request: &Request, ino: INodeNo, times: u64) {
        if let (Some(share), own) = Share::split(ino.0)
            && let Ok(tree) = self.tree(Some(share))
        {
            tree.server().forget(request, INodeNo(own), times);
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        match or_tell!(self.seen(request, ino), reply) {
            Some((_, tree, ino)) => tree.server().getattr(request, ino, handle, reply),
            None => reply.attr(&Duration::ZERO, &empty_root()),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        crtime: Option<SystemTime>,
        chgtime: Option<SystemTime>,
        bkuptime: Option<SystemTime>,
        flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (_, tree, ino) = or_tell!(self.written(request, ino), reply);
        tree.server().setattr(
            request, ino, mode, uid, gid, size, atime, mtime, ctime, handle, crtime, chgtime, bkuptime,
            flags, reply,
        );
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::EINVAL), reply);
        tree.server().readlink(request, ino, reply);
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (_, tree, parent) = or_tell!(self.changed(request, parent), reply);
        tree.server().mknod(request, parent, name, mode, umask, rdev, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (_, tree, parent) = or_tell!(self.changed(request, parent), reply);
        tree.server().mkdir(request, parent, name, mode, umask, reply);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (_, tree, parent) = or_tell!(self.changed(request, parent), reply);
        tree.server().unlink(request, parent, name, reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (_, tree, parent) = or_tell!(self.changed(request, parent), reply);
        tree.server().rmdir(request, parent, name, reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (_, tree, parent) = or_tell!(self.changed(request, parent), reply);
        tree.server().symlink(request, parent, name, target, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (share, tree, parent) = or_tell!(self.changed(request, parent), reply);
        let (other, _, new_parent) = or_tell!(self.changed(request, new_parent), reply);
        if share != other {
            return reply.error(Errno::EXDEV);
        }
        tree.server().rename(request, parent, name, new_parent, new_name, flags, reply);
    }

    fn link(&self, request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (share, tree, ino) = or_tell!(self.changed(request, ino), reply);
        let (other, _, parent) = or_tell!(self.changed(request, parent), reply);
        if share != other {
            return reply.error(Errno::EXDEV);
        }
        tree.server().link(request, ino, parent, name, reply);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::EISDIR), reply);
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0;
        let _changing = if writes { Some(or_tell!(tree.is_changing(), reply)) } else { None };
        tree.server().open(request, ino, flags, reply);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (_, tree, parent) = or_tell!(self.changed(request, parent), reply);
        let _changing = or_tell!(tree.is_changing(), reply);
        tree.server().create(request, parent, name, mode, umask, flags, reply);
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::EISDIR), reply);
        tree.server().read(request, ino, handle, offset, size, flags, owner, reply);
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (_, tree, ino) = or_tell!(self.written(request, ino), reply);
        tree.server().write(request, ino, handle, offset, data, write_flags, flags, owner, reply);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // No tree holds anything back: the kernel never asks again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        flush: bool,
        reply: ReplyEmpty,
    ) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::EISDIR), reply);
        tree.server().release(request, ino, handle, flags, owner, flush, reply);
    }

    fn fsync(&self, request: &Request, ino: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::EISDIR), reply);
        tree.server().fsync(request, ino, handle, data_only, reply);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match or_tell!(self.seen(request, ino), reply) {
            Some((_, tree, ino)) => tree.server().opendir(request, ino, flags, reply),
            None => reply.opened(FileHandle(0), FopenFlags::empty()),
        }
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if let Some((tree, ino, handle)) = or_tell!(self.listed(ino, handle), reply) {
            return tree.server().readdir(request, ino, handle, offset, reply);
        }
        for (index, name) in [".", ".."].into_iter().enumerate().skip(offset as usize) {
            if reply.add(ino, index as u64 + 1, fuser::FileType::Directory, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        if let Some((tree, ino, handle)) = or_tell!(self.listed(ino, handle), reply) {
            return tree.server().readdirplus(request, ino, handle, offset, reply);
        }
        for (index, name) in [".", ".."].into_iter().enumerate().skip(offset as usize) {
            if reply.add(ino, index as u64 + 1, name, &Duration::ZERO, &empty_root(), Generation(0)) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        match self.listed(ino, handle) {
            Ok(Some((tree, ino, handle))) => tree.server().releasedir(request, ino, handle, flags, reply),
            _ => reply.ok(),
        }
    }

    fn fsyncdir(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        match or_tell!(self.listed(ino, handle), reply) {
            Some((tree, ino, handle)) => tree.server().fsyncdir(request, ino, handle, data_only, reply),
            None => reply.ok(),
        }
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        match or_tell!(self.seen(request, ino), reply) {
            Some((_, tree, ino)) => tree.server().statfs(request, ino, reply),
            None => reply.statfs(0, 0, 0, 1, 0, 4096, 255, 4096),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        position: u32,
        reply: ReplyEmpty,
    ) {
        let (_, tree, ino) = or_tell!(self.written(request, ino), reply);
        tree.server().setxattr(request, ino, name, value, flags, position, reply);
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::ENODATA), reply);
        tree.server().getxattr(request, ino, name, size, reply);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match or_tell!(self.seen(request, ino), reply) {
            Some((_, tree, ino)) => tree.server().listxattr(request, ino, size, reply),
            None => send_xattr(&[], size, reply),
        }
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (_, tree, ino) = or_tell!(self.written(request, ino), reply);
        tree.server().removexattr(request, ino, name, reply);
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (_, tree, ino) = or_tell!(self.written(request, ino), reply);
        tree.server().fallocate(request, ino, handle, offset, length, mode, reply);
    }

    fn lseek(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::EISDIR), reply);
        tree.server().lseek(request, ino, handle, offset, whence, reply);
    }

    fn copy_file_range(
        &self,
        request: &Request,
        from: INodeNo,
        from_handle: FileHandle,
        from_offset: u64,
        to: INodeNo,
        to_handle: FileHandle,
        to_offset: u64,
        length: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (share, tree, from) = or_tell!(self.place(request, from, Errno::EISDIR), reply);
        let (other, _, to) = or_tell!(self.written(request, to), reply);
        if share != other {
            // The kernel reads and writes instead.
            return reply.error(Errno::EOPNOTSUPP);
        }
        tree.server().copy_file_range(
            request,
            from,
            from_handle,
            from_offset,
            to,
            to_handle,
            to_offset,
            length,
            flags,
            reply,
        );
    }
}
