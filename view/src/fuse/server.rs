//! The server: requests answered from a mapped tree and opened objects.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::{
    Config, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
    Session, SessionACL,
};
use kiln_erofs::{Entry, FileType, Image, ImageError, Inode, Nid};

use super::Owners;
use super::attributes::{NOTHING, OverlayNames, kind, lower_attributes, send_xattr};
use super::edit::{Among, Editable, Upper};
use super::objects::{OpenObjects, read_at};
use super::passed::PassedFiles;
use super::space::{FOR_EVER, ROOT, Space};
use crate::objects::Objects;
use crate::userns;

/// Threads that answer requests: more would wait for each other, and each may hold the data of a write.
const THREADS: usize = 4;

/// Answers requests for a tree until the last mount of the connection is gone.
pub(super) fn serve(
    bytes: &'static [u8],
    objects: Objects,
    owners: Owners,
    below_overlay: bool,
    device: OwnedFd,
) -> std::io::Result<()> {
    let image = Image::open(bytes).map_err(std::io::Error::other)?;
    let names = match below_overlay {
        true if userns::entered() => OverlayNames::User,
        true => OverlayNames::Trusted,
        false => OverlayNames::None,
    };
    let may_pass_through = userns::is_root_of_host();
    let (space, objects) = (Space::Whole, OpenObjects::new(objects));
    session(
        Served {
            image,
            objects,
            names,
            owners,
            space,
            may_pass_through,
            passed: Arc::default(),
            opened: AtomicUsize::new(0),
        },
        device,
    )?
    .run()
}

/// Answers requests for a tree below a scratch.
pub(super) fn serve_editable(
    bytes: &'static [u8],
    objects: Objects,
    upper: Upper,
    owners: Owners,
    device: OwnedFd,
) -> std::io::Result<()> {
    let image = Image::open(bytes).map_err(std::io::Error::other)?;
    // The kernel has applied that of whoever makes something.
    rustix::process::umask(rustix::fs::Mode::empty());
    session(Editable::new(image, objects, upper, owners, Among::nobody())?, device)?.run()
}

/// A connection whose requests are answered by several threads. At least two: one may have a large object to read.
pub(super) fn session<F: Filesystem>(filesystem: F, device: OwnedFd) -> std::io::Result<Session<F>> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, THREADS);
    let mut config = Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = true;
    Session::from_fd(filesystem, device, SessionACL::All, config)
}

/// Asks the kernel for what every tree can do. What it lacks only makes it ask more often.
pub(super) fn ask_for_usual(config: &mut KernelConfig) {
    for wanted in [
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_READDIRPLUS_AUTO,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_CACHE_SYMLINKS,
    ] {
        let _ = config.add_capabilities(wanted);
    }
    // Of reads ahead the kernel sends so many at once, of all files together: those that wait for objects that are being
    // fetched must not keep it from reading others.
    let _ = config.set_max_background(u16::MAX);
}

/// The handle of files that are read here, which need none.
const READ_HERE: FileHandle = FileHandle(0);

/// One tree, read-only. Where it shares its connection ([`Space::Share`]), the kernel is never told that it need not ask again
/// (`ENOSYS`), which would hold for the others too.
pub(super) struct Served {
    image: Image<'static>,
    objects: OpenObjects,
    names: OverlayNames,
    owners: Owners,
    space: Space,
    /// Whether the kernel lets this process hand objects to it. If not, it is told not to ask when files are opened: an
    /// object that is missing then shows when it is read.
    may_pass_through: bool,
    passed: Arc<Mutex<PassedFiles>>,
    /// How many files are open, where the kernel tells.
    opened: AtomicUsize,
}

/// What kept a request from being answered; told to the log where it is a fault of the store.
fn fault(nid: Nid, error: &ImageError) -> Errno {
    tracing::error!(inode = nid, %error, "the tree cannot be read");
    Errno::EIO
}

fn lock(passed: &Mutex<PassedFiles>) -> MutexGuard<'_, PassedFiles> {
    passed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers who reads a file that is this object.
fn send(nid: Nid, object: &File, offset: u64, size: u32, reply: ReplyData) {
    let mut reply = Some(reply);
    let read = read_at(object, offset, size as usize, |bytes| {
        if let Some(reply) = reply.take() {
            reply.data(bytes);
        }
    });
    if let (Err(error), Some(reply)) = (read, reply) {
        tracing::error!(inode = nid, %error, "an object cannot be read");
        reply.error(Errno::EIO);
    }
}

impl Served {
    /// For a connection that serves more than this tree.
    pub(super) fn among_others(
        image: Image<'static>,
        objects: Objects,
        owners: Owners,
        space: Space,
    ) -> Self {
        // What the kernel reads by itself it must be given when the file is opened, and then it asks at every opening.
        let (names, may_pass_through) = (OverlayNames::None, false);
        let (passed, opened, objects) = (Arc::default(), AtomicUsize::new(0), OpenObjects::new(objects));
        Self { image, objects, names, owners, space, may_pass_through, passed, opened }
    }

    /// Whether a file is open. Only a connection that serves more than this tree is told.
    pub(super) fn is_used(&self) -> bool {
        self.opened.load(Ordering::Acquire) > 0
    }

    /// The answer where a tree that nobody changes has nothing to do: that it need not be asked again, if that holds for nobody
    /// else.
    fn nothing_to_do(&self, reply: ReplyEmpty) {
        match self.space {
            Space::Whole => reply.error(Errno::ENOSYS),
            Space::Share(_) => reply.ok(),
        }
    }

    fn nid(&self, ino: INodeNo) -> Nid {
        if ino.0 == ROOT { self.image.root_nid() } else { ino.0 }
    }

    fn number(&self, nid: Nid) -> INodeNo {
        self.space.number(if nid == self.image.root_nid() { ROOT } else { nid })
    }

    fn inode(&self, ino: INodeNo) -> Result<Inode<'static>, Errno> {
        let nid = self.nid(ino);
        self.image.inode(nid).map_err(|error| fault(nid, &error))
    }

    fn attributes(&self, inode: &Inode<'_>) -> FileAttr {
        lower_attributes(inode, self.number(inode.nid()), self.owners)
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<Option<FileAttr>, Errno> {
        let directory = self.inode(parent)?;
        let entry = directory.lookup(name.as_bytes()).map_err(|error| fault(directory.nid(), &error))?;
        entry.map(|entry| Ok(self.attributes(&self.inode(INodeNo(entry.nid))?))).transpose()
    }

    /// `.` and `..`, then the entries, each with the offset of the next.
    fn listing(
        &self,
        directory: &Inode<'static>,
        from: u64,
    ) -> Result<impl Iterator<Item = Result<(u64, Entry<'static>), Errno>>, Errno> {
        let nid = directory.nid();
        let parent = directory.parent().map_err(|error| fault(nid, &error))?;
        let dots = [(&b"."[..], nid), (&b".."[..], parent)];
        let dots = dots.map(|(name, nid)| Ok(Entry { name, nid, file_type: FileType::Directory }));
        let entries = directory.entries(from.saturating_sub(2) as usize);
        let all = dots.into_iter().skip(from.min(2) as usize).chain(entries);
        Ok(all.enumerate().map(move |(index, entry)| {
            entry.map(|entry| (from + index as u64 + 1, entry)).map_err(|error| fault(nid, &error))
        }))
    }

    /// Everything of an inode's xattrs that is shown.
    fn xattrs(&self, ino: INodeNo) -> Result<impl Iterator<Item = (Vec<u8>, Vec<u8>)>, Errno> {
        let inode = self.inode(ino)?;
        let xattrs = inode.xattrs().map_err(|error| fault(inode.nid(), &error))?;
        let names = self.names;
        Ok(xattrs.into_iter().map(move |(name, value)| (names.shown(&name), value)))
    }
}

impl Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        ask_for_usual(config);
        if self.may_pass_through {
            // One level: an overlay above is the second and last that there may be.
            self.may_pass_through = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                && config.set_max_stack_depth(1).is_ok();
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(Some(attributes)) => {
                let remembered = self.space.remembered(parent.0);
                reply.entry_with_ttls(&FOR_EVER, remembered, &attributes, Generation(0));
            }
            Ok(None) => {
                // Number zero: there is none, and the kernel may remember that too.
                let none = FileAttr { ino: INodeNo(0), ..NOTHING };
                reply.entry(self.space.remembered(parent.0), &none, Generation(0));
            }
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.inode(ino) {
            Ok(inode) => reply.attr(self.space.remembered(ino.0), &self.attributes(&inode)),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self
            .inode(ino)
            .and_then(|inode| inode.symlink_target().map_err(|error| fault(inode.nid(), &error)));
        match target {
            Ok(target) => reply.data(target),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if self.space != Space::Whole {
            // The mount is one that others may write to.
            if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
                return reply.error(Errno::EROFS);
            }
            self.opened.fetch_add(1, Ordering::AcqRel);
            return reply.opened(READ_HERE, FopenFlags::FOPEN_KEEP_CACHE);
        }
        if !self.may_pass_through || lock(&self.passed).are_refused() {
            // Neither this nor the end of its use needs a request: the kernel never asks again.
            return reply.error(Errno::ENOSYS);
        }
        let Err(reply) = lock(&self.passed).open_again(ino, reply) else { return };
        let inode = match self.inode(ino) {
            Ok(inode) => inode,
            Err(error) => return reply.error(error),
        };
        match inode.object().map_err(|error| fault(inode.nid(), &error)) {
            Ok(None) => reply.opened(READ_HERE, FopenFlags::FOPEN_KEEP_CACHE),
            Ok(Some(digest)) => {
                let passed = Arc::clone(&self.passed);
                self.objects.open(&digest, inode.size(), move |file| match file {
                    Some(file) => lock(&passed).open(ino, &file, reply),
                    None => reply.error(Errno::EIO),
                });
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let inode = match self.inode(ino) {
            Ok(inode) => inode,
            Err(error) => return reply.error(error),
        };
        match inode.object().map_err(|error| fault(inode.nid(), &error)) {
            Ok(None) => match inode.embedded().map_err(|error| fault(inode.nid(), &error)) {
                Ok(bytes) => {
                    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                    let to = from.saturating_add(size as usize).min(bytes.len());
                    reply.data(&bytes[from..to]);
                }
                Err(error) => reply.error(error),
            },
            Ok(Some(digest)) => {
                let nid = inode.nid();
                self.objects.of(nid, &digest, inode.size(), move |file| match file {
                    Some(file) => send(nid, &file, offset, size, reply),
                    None => reply.error(Errno::EIO),
                });
            }
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        if self.space != Space::Whole {
            self.opened.fetch_sub(1, Ordering::AcqRel);
        }
        lock(&self.passed).close(ino, handle);
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // There is nothing to flush: the kernel never asks again.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.nothing_to_do(reply);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.nothing_to_do(reply);
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.space.open_directory(ino.0, reply);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let directory = match self.inode(ino) {
            Ok(directory) => directory,
            Err(error) => return reply.error(error),
        };
        let listing = match self.listing(&directory, offset) {
            Ok(listing) => listing,
            Err(error) => return reply.error(error),
        };
        for item in listing {
            match item {
                Ok((next, entry)) => {
                    let name = OsStr::from_bytes(entry.name);
                    if reply.add(self.number(entry.nid), next, kind(entry.file_type), name) {
                        break;
                    }
                }
                Err(error) => return reply.error(error),
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
        let directory = match self.inode(ino) {
            Ok(directory) => directory,
            Err(error) => return reply.error(error),
        };
        let listing = match self.listing(&directory, offset) {
            Ok(listing) => listing,
            Err(error) => return reply.error(error),
        };
        for item in listing {
            let item = item.and_then(|(next, entry)| Ok((next, entry, self.inode(INodeNo(entry.nid))?)));
            match item {
                Ok((next, entry, inode)) => {
                    let (name, attributes) = (OsStr::from_bytes(entry.name), self.attributes(&inode));
                    let remembered = self.space.remembered(ino.0);
                    if reply.add(attributes.ino, next, name, remembered, &attributes, Generation(0)) {
                        break;
                    }
                }
                Err(error) => return reply.error(error),
            }
        }
        reply.ok();
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        if self.space == Space::Whole {
            // The kernel takes all for data, and never asks again.
            return reply.error(Errno::ENOSYS);
        }
        let size = match self.inode(ino) {
            Ok(inode) => inode.size(),
            Err(error) => return reply.error(error),
        };
        match whence {
            libc::SEEK_DATA | libc::SEEK_HOLE if offset.cast_unsigned() >= size => reply.error(Errno::ENXIO),
            libc::SEEK_DATA => reply.offset(offset),
            libc::SEEK_HOLE => reply.offset(size.cast_signed()),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(self.image.len() / 4096, 0, 0, self.image.inode_count(), 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.xattrs(ino) {
            Ok(mut xattrs) => match xattrs.find(|(shown, _)| shown == name.as_bytes()) {
                Some((_, value)) => send_xattr(&value, size, reply),
                None => reply.error(Errno::ENODATA),
            },
            Err(error) => reply.error(error),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.xattrs(ino) {
            Ok(xattrs) => {
                let mut names = Vec::new();
                for (name, _) in xattrs {
                    names.extend_from_slice(&name);
                    names.push(0);
                }
                send_xattr(&names, size, reply);
            }
            Err(error) => reply.error(error),
        }
    }
}
