//! Many trees on one connection: whose root is seen depends on who asks.
//!
//! A request for the root, or for a name in it, goes to the tree of the process that makes it. Everything below has a
//! number that says of which tree it is ([`Space`]), so that nobody is asked for again, and the kernel may keep it for ever.
//! Of the root it keeps nothing. Who has no tree sees an empty directory.
//!
//! What the kernel is never told here: that it need not ask again (`ENOSYS`) where one tree has no use for a request but another
//! has. Such an answer holds for the whole connection.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem,
    FopenFlags, Generation, INodeNo, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use kiln_contract::{BackendError, ErrorKind, Scratch};
use kiln_erofs::Image;
use memmap2::Mmap;
use rustix::fs::{Mode, OFlags};

use super::edit::{Editable, Upper};
use super::server::{NOTHING, ROOT, Served, threads};
use super::space::{Share, Space};
use super::{Owners, attach};
use crate::objects::{Fetcher, Objects};

/// Who asks.
pub(crate) trait Callers: Send + Sync + 'static {
    /// The tree that a process or thread sees.
    fn tree_of(&self, pid: u32) -> Option<Share>;
}

/// A tree to be shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewTree<'a> {
    pub(crate) tree: &'a Path,
    pub(crate) objects: &'a Path,
    pub(crate) scratch: Option<&'a Scratch>,
    pub(crate) owners: Owners,
    pub(crate) fetcher: Option<&'a Fetcher>,
}

/// A mount that many trees share. Dropping it takes it away.
pub(crate) struct SharedMount {
    target: PathBuf,
    trees: Arc<Trees>,
    session: Option<BackgroundSession>,
}

impl SharedMount {
    /// Mounts at a directory. Nobody sees anything there yet.
    pub(crate) fn mount(target: &Path, callers: Arc<dyn Callers>) -> Result<Self, BackendError> {
        let device = attach::attach_shared(target)?;
        let trees = Arc::new(Trees { shown: RwLock::default(), last: Mutex::new(None) });
        let session = serve(Shared { trees: Arc::clone(&trees), callers }, device).map_err(|error| {
            let _ = attach::detach(target);
            BackendError::caused(format!("cannot serve views at {}", target.display()), error)
        })?;
        Ok(Self { target: target.to_owned(), trees, session: Some(session) })
    }

    /// Where it is.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Adds a tree. Nobody sees it before [`Callers`] say so.
    pub(crate) fn add(&self, new: &NewTree<'_>) -> Result<Share, BackendError> {
        let mut last = self.trees.last.lock().unwrap_or_else(PoisonError::into_inner);
        let next = last.map_or(Some(Share::FIRST), Share::next).ok_or_else(|| {
            let what = format!("the mount at {} has shown as many views as it can", self.target.display());
            BackendError::new(ErrorKind::State, what)
                .hint("`kiln fs service stop` ends the service; the next view starts another one")
        })?;
        let tree = Tree::open(new, Space::Share(next))?;
        *last = Some(next);
        self.trees.shown.write().unwrap_or_else(PoisonError::into_inner).insert(next, Arc::new(tree));
        Ok(next)
    }

    /// Takes a tree away. Who still uses something of it is told that it is stale.
    pub(crate) fn remove(&self, share: Share) {
        self.trees.shown.write().unwrap_or_else(PoisonError::into_inner).remove(&share);
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        if let Err(error) = attach::detach(&self.target) {
            tracing::warn!(%error, "a mount stays");
        }
        // It ends when the last user of the mount is gone: nobody waits for that.
        drop(self.session.take());
    }
}

fn serve(shared: Shared, device: OwnedFd) -> std::io::Result<BackgroundSession> {
    let mut config = Config::default();
    config.n_threads = Some(threads());
    config.clone_fd = true;
    Session::from_fd(shared, device, SessionACL::All, config)?.spawn()
}

struct Trees {
    shown: RwLock<HashMap<Share, Arc<Tree>>>,
    last: Mutex<Option<Share>>,
}

/// One tree. Its parts go in this order.
struct Tree {
    server: Server,
    _mapping: Mmap,
}

enum Server {
    ReadOnly(Served),
    Editable(Editable),
}

impl Tree {
    fn open(new: &NewTree<'_>, space: Space) -> Result<Self, BackendError> {
        let NewTree { tree, objects, scratch, owners, fetcher } = *new;
        let cannot = |what: &str, path: &Path, why: std::io::Error| {
            BackendError::caused(format!("cannot {what} {}", path.display()), why)
        };
        let file = File::open(tree).map_err(|error| cannot("open the tree", tree, error))?;
        // SAFETY: trees are immutable once they are in the store. Whoever truncates one all the same ends the server.
        let mapping = unsafe { Mmap::map(&file) }.map_err(|error| cannot("map the tree", tree, error))?;
        // SAFETY: what is mapped stays where it is until the mapping is dropped, which is after the server that reads it:
        // the order of the fields says so.
        let bytes: &'static [u8] = unsafe { std::slice::from_raw_parts(mapping.as_ptr(), mapping.len()) };
        let image = Image::open(bytes).and_then(|image| image.root().map(|_| image)).map_err(|error| {
            BackendError::caused(format!("cannot read the tree {}", tree.display()), error)
                .hint("`kiln system check --repair` finds and repairs what is damaged in the store")
        })?;
        let directory =
            rustix::fs::open(objects, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| cannot("open the objects in", objects, error.into()))?;
        let objects = Objects::new(directory, objects, fetcher.cloned());
        let server = match scratch {
            None => Server::ReadOnly(Served::among_others(image, objects, owners, space)),
            Some(scratch) => {
                let upper = Upper::open(scratch, crate::userns::is_root_of_host())?;
                let editable = Editable::new(image, objects, upper, owners, space)
                    .map_err(|error| cannot("open the scratch", &scratch.upper, error))?;
                Server::Editable(editable)
            }
        };
        Ok(Self { server, _mapping: mapping })
    }

    fn server(&self) -> &dyn Filesystem {
        match &self.server {
            Server::ReadOnly(served) => served,
            Server::Editable(editable) => editable,
        }
    }

    /// What may be changed; else `EROFS`.
    fn editable(&self) -> Result<&Editable, Errno> {
        match &self.server {
            Server::ReadOnly(_) => Err(Errno::EROFS),
            Server::Editable(editable) => Ok(editable),
        }
    }
}

struct Shared {
    trees: Arc<Trees>,
    callers: Arc<dyn Callers>,
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
        place.1.editable()?;
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
        let (_, tree, ino) = or_tell!(self.changed(request, ino), reply);
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
        if let Server::Editable(editable) = &tree.server {
            return editable.open(request, ino, flags, reply);
        }
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            return reply.error(Errno::EROFS);
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
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
        let (_, tree, ino) = or_tell!(self.changed(request, ino), reply);
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
        match &tree.server {
            Server::ReadOnly(_) => reply.ok(),
            Server::Editable(editable) => editable.release(request, ino, handle, flags, owner, flush, reply),
        }
    }

    fn fsync(&self, request: &Request, ino: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::EISDIR), reply);
        match &tree.server {
            Server::ReadOnly(_) => reply.ok(),
            Server::Editable(editable) => editable.fsync(request, ino, handle, data_only, reply),
        }
    }

    fn opendir(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some((share, tree, own)) = or_tell!(self.seen(request, ino), reply) else {
            return reply.opened(FileHandle(0), FopenFlags::empty());
        };
        match &tree.server {
            Server::Editable(editable) => editable.opendir(request, own, flags, reply),
            Server::ReadOnly(_) => {
                let space = Space::Share(share);
                let kept = if space.is_everybodys(own.0) {
                    FopenFlags::empty()
                } else {
                    FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR
                };
                reply.opened(FileHandle(space.listing(own.0, 0)), kept);
            }
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
            Some((tree, ino, handle)) if tree.editable().is_ok() => {
                tree.server().fsyncdir(request, ino, handle, data_only, reply);
            }
            _ => reply.ok(),
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
        let (_, tree, ino) = or_tell!(self.changed(request, ino), reply);
        tree.server().setxattr(request, ino, name, value, flags, position, reply);
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (_, tree, ino) = or_tell!(self.place(request, ino, Errno::ENODATA), reply);
        tree.server().getxattr(request, ino, name, size, reply);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match or_tell!(self.seen(request, ino), reply) {
            Some((_, tree, ino)) => tree.server().listxattr(request, ino, size, reply),
            None => super::server::send_xattr(&[], size, reply),
        }
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (_, tree, ino) = or_tell!(self.changed(request, ino), reply);
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
        let (_, tree, ino) = or_tell!(self.changed(request, ino), reply);
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
        match &tree.server {
            Server::Editable(editable) => editable.lseek(request, ino, handle, offset, whence, reply),
            // All of it is data.
            Server::ReadOnly(served) => match (or_tell!(served.size(ino), reply), whence) {
                (size, libc::SEEK_DATA | libc::SEEK_HOLE) if offset.cast_unsigned() >= size => {
                    reply.error(Errno::ENXIO);
                }
                (_, libc::SEEK_DATA) => reply.offset(offset),
                (size, libc::SEEK_HOLE) => reply.offset(size.cast_signed()),
                _ => reply.error(Errno::EINVAL),
            },
        }
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
        let (other, _, to) = or_tell!(self.changed(request, to), reply);
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
