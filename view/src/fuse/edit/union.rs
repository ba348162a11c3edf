//! What a view shows: the scratch where it has something, else the tree.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, INodeNo};
use kiln_contract::Digest;
use kiln_erofs::{FileType, Image, ImageError, Inode, Nid};
use rustix::fs::{AtFlags, Mode, OFlags, Stat};
use rustix::io::{Errno, Result};

use super::super::Owners;
use super::super::attributes::{kind, lower_attributes};
use super::super::objects::OpenObjects;
use super::super::space::ROOT;
use super::handles::{Handles, Object, Source};
use super::leaving::Leaving;
use super::listings::{Listed, Listings};
use super::nodes::{Id, Node, Nodes};
use super::parents::Parents;
use super::place::Place;
use super::upper::{Upper, is_whiteout};
use crate::objects::Objects;

/// Linux's limit for a name. FUSE would let longer ones through.
const NAME_MOST: usize = 255;
/// No path in a tree is longer: what is deeper was made to have no end.
const DEPTH_MOST: usize = 10_000;

/// A tree below a scratch.
pub(super) struct Union {
    pub(super) image: Image<'static>,
    pub(super) objects: Arc<OpenObjects>,
    /// The object, and its size, for want of which something could not be done: it has to be fetched.
    pub(super) missing: Option<(Digest, u64)>,
    pub(super) upper: Upper,
    pub(super) nodes: Nodes,
    pub(super) leaving: Leaving,
    pub(super) owners: Owners,
    pub(super) handles: Arc<Handles>,
    pub(super) listings: Listings,
    /// Made when it is first needed.
    pub(super) parents: Option<Parents>,
    /// Whether another server has the scratch since: what is under a name there may be another file by now.
    pub(super) is_retired: bool,
    /// Files that were opened while one that was before this had files of the scratch open to be written.
    pub(super) doubtful: HashSet<Id>,
}

/// Something that was found by its name.
pub(super) struct Found {
    pub(super) id: Id,
    pub(super) attributes: FileAttr,
    /// Whether the scratch has something of that name.
    pub(super) in_scratch: bool,
}

impl Found {
    pub(super) fn is_directory(&self) -> bool {
        self.attributes.kind == fuser::FileType::Directory
    }
}

/// What is wrong with a tree goes to the log; who reads is told that it cannot be read.
pub(super) fn damaged(error: &ImageError) -> Errno {
    tracing::error!(%error, "the tree cannot be read");
    Errno::IO
}

impl Union {
    pub(super) fn new(
        image: Image<'static>,
        objects: Objects,
        upper: Upper,
        owners: Owners,
        handles: Arc<Handles>,
    ) -> Result<Self> {
        let mut nodes = Nodes::default();
        let inode = rustix::fs::fstat(upper.root())?.st_ino;
        let opaque =
            upper.read_mark(&Place::lost(rustix::io::fcntl_dupfd_cloexec(upper.root(), 0)?), "opaque")?;
        let lower = (opaque.as_deref() != Some(b"y")).then(|| image.root_nid());
        nodes.insert(Some(ROOT), Node::new(inode, true, lower, None));
        let (leaving, listings) = (Leaving::default(), Listings::default());
        let objects = Arc::new(OpenObjects::new(objects));
        let (parents, is_retired, doubtful) = (None, false, HashSet::new());
        Ok(Self {
            image,
            objects,
            missing: None,
            upper,
            nodes,
            leaving,
            owners,
            handles,
            listings,
            parents,
            is_retired,
            doubtful,
        })
    }

    /// The number of an inode of the tree.
    pub(super) fn number(&self, nid: Nid) -> Id {
        if nid == self.image.root_nid() { ROOT } else { nid }
    }

    pub(super) fn inode(&self, nid: Nid) -> Result<Inode<'static>> {
        self.image.inode(nid).map_err(|error| damaged(&error))
    }

    /// What of the tree a number stands for, if it does: for a directory what is seen in it, for all else what was not
    /// copied up.
    pub(super) fn lower(&self, id: Id) -> Result<Option<Inode<'static>>> {
        match self.nodes.get(id) {
            Some(node) => node.lower.map(|nid| self.inode(nid)).transpose(),
            None if Nodes::is_of_tree(id) => self.inode(id).map(Some),
            None => Err(Errno::STALE),
        }
    }

    /// The directory of the tree that is seen in a directory.
    pub(super) fn lower_directory(&self, id: Id) -> Result<Option<Inode<'static>>> {
        Ok(self.lower(id)?.filter(|inode| inode.file_type() == FileType::Directory))
    }

    /// What the tree has under a name, whether or not the scratch hides it.
    pub(super) fn lower_child(&self, parent: Id, name: &[u8]) -> Result<Option<Inode<'static>>> {
        let Some(directory) = self.lower_directory(parent)? else { return Ok(None) };
        let entry = directory.lookup(name).map_err(|error| damaged(&error))?;
        entry.map(|entry| self.inode(entry.nid)).transpose()
    }

    /// The path in the scratch of a directory that is there. `None` for one that was removed.
    fn path(&self, id: Id) -> Option<Vec<u8>> {
        let mut names: Vec<&[u8]> = Vec::new();
        let mut here = id;
        while here != ROOT {
            let (parent, name) = self.nodes.get(here)?.names.first()?;
            names.push(name);
            here = *parent;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// The directory of the scratch (`O_PATH`) for one that has one and was not removed.
    pub(super) fn directory(&self, id: Id) -> Result<Option<OwnedFd>> {
        if self.nodes.get(id).is_none() {
            return Ok(None);
        }
        match self.path(id) {
            Some(path) => self.upper.directory(&path).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn was_removed(&self, id: Id) -> bool {
        id != ROOT && self.nodes.get(id).is_some_and(|node| node.names.is_empty())
    }

    /// Where in the scratch something is. `None` if it is not there.
    pub(super) fn place(&self, id: Id) -> Result<Option<Place>> {
        let Some(node) = self.nodes.get(id) else {
            return if Nodes::is_of_tree(id) { Ok(None) } else { Err(Errno::STALE) };
        };
        if id == ROOT {
            return rustix::io::fcntl_dupfd_cloexec(self.upper.root(), 0).map(|fd| Some(Place::lost(fd)));
        }
        if self.is_retired
            && let Some(open) = self.handles.descriptor(id)?
        {
            return Ok(Some(Place::lost(open)));
        }
        if let Some((parent, name)) = node.names.first() {
            let directory = self.directory(*parent)?.ok_or(Errno::STALE)?;
            return Ok(Some(Place::named(directory, name)));
        }
        let held = node.held.as_ref().ok_or(Errno::STALE)?;
        rustix::io::fcntl_dupfd_cloexec(held, 0).map(|fd| Some(Place::lost(fd)))
    }

    /// Looks a name up.
    pub(super) fn find(&mut self, parent: Id, name: &[u8]) -> Result<Option<Found>> {
        if name.len() > NAME_MOST {
            return Err(Errno::NAMETOOLONG);
        }
        if self.was_removed(parent) {
            return Ok(None);
        }
        let directory = self.directory(parent)?;
        self.find_in(parent, directory.as_ref(), name)
    }

    /// Looks a name up in a directory that was not removed, and whose directory in the scratch is at hand if it has one.
    pub(super) fn find_in(
        &mut self,
        parent: Id,
        directory: Option<&OwnedFd>,
        name: &[u8],
    ) -> Result<Option<Found>> {
        if let Some(directory) = directory {
            match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if is_whiteout(&stat) => return Ok(None),
                Ok(stat) => {
                    let id = self.know(parent, directory, name, &stat)?;
                    let attributes = self.upper_attributes(id, &stat);
                    return Ok(Some(Found { id, attributes, in_scratch: true }));
                }
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        let Some(inode) = self.lower_child(parent, name)? else { return Ok(None) };
        let id = self.number(inode.nid());
        Ok(Some(Found { id, attributes: self.attributes(id)?, in_scratch: false }))
    }

    /// Remembers what the scratch has under a name.
    fn know(&mut self, parent: Id, directory: &OwnedFd, name: &[u8], stat: &Stat) -> Result<Id> {
        let id = self.nodes.id_of(stat.st_ino);
        if self.nodes.get(id).is_some() {
            self.nodes.add_name(id, parent, name);
            return Ok(id);
        }
        let is_directory = is_directory(stat);
        let lower = if is_directory {
            let again = rustix::io::fcntl_dupfd_cloexec(directory, 0)?;
            self.seen_in(parent, name, &Place::named(again, name))?
        } else {
            None
        };
        // What the tree has can be in one place only.
        let number = lower.filter(|nid| self.nodes.get(*nid).is_none());
        let node = Node::new(stat.st_ino, is_directory, lower, Some((parent, name)));
        Ok(self.nodes.insert(number, node))
    }

    /// What of the tree is seen in a directory that the scratch has.
    fn seen_in(&self, parent: Id, name: &[u8], place: &Place) -> Result<Option<Nid>> {
        if self.upper.read_mark(place, "opaque")?.as_deref() == Some(b"y") {
            return Ok(None);
        }
        let seen = match self.upper.read_mark(place, "redirect")? {
            Some(path) if path.starts_with(b"/") => {
                let mut here = self.image.root().map_err(|error| damaged(&error))?;
                for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
                    if here.file_type() != FileType::Directory {
                        return Ok(None);
                    }
                    match here.lookup(name).map_err(|error| damaged(&error))? {
                        Some(entry) => here = self.inode(entry.nid)?,
                        None => return Ok(None),
                    }
                }
                Some(here)
            }
            Some(other) => self.lower_child(parent, &other)?,
            None => self.lower_child(parent, name)?,
        };
        let is_directory = |inode: &Inode<'_>| {
            // The root in itself would have no end.
            inode.file_type() == FileType::Directory && inode.nid() != self.image.root_nid()
        };
        Ok(seen.filter(is_directory).map(|inode| inode.nid()))
    }

    /// What is known of a number.
    pub(super) fn attributes(&self, id: Id) -> Result<FileAttr> {
        if let Some(place) = self.place(id)? {
            return Ok(self.upper_attributes(id, &place.stat()?));
        }
        let inode = self.inode(id)?;
        Ok(lower_attributes(&inode, INodeNo(id), self.owners))
    }

    pub(super) fn upper_attributes(&self, id: Id, stat: &Stat) -> FileAttr {
        let merged = self.nodes.get(id).is_some_and(|node| node.is_directory && node.lower.is_some());
        let modified = time(stat.st_mtime, stat.st_mtime_nsec);
        FileAttr {
            ino: INodeNo(id),
            size: stat.st_size.cast_unsigned(),
            blocks: stat.st_blocks.cast_unsigned(),
            atime: time(stat.st_atime, stat.st_atime_nsec),
            mtime: modified,
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
            crtime: modified,
            kind: upper_kind(rustix::fs::FileType::from_raw_mode(stat.st_mode)),
            perm: (stat.st_mode & 0o7777) as u16,
            // Nobody has counted the directories in one that is in the scratch and in the tree: 1 says so.
            nlink: if merged { 1 } else { u32::try_from(stat.st_nlink).unwrap_or(u32::MAX) },
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: stat.st_rdev as u32,
            blksize: 4096,
            flags: 0,
        }
    }

    /// What is in a directory: what was found for its last piece, if this is not the `first`.
    pub(super) fn listing(&mut self, id: Id, first: bool) -> Result<Arc<Vec<Listed>>> {
        if let Some(recent) = self.listings.recent(id).filter(|_| !first) {
            return Ok(recent);
        }
        let (of_tree, of_scratch) = self.entries(id)?;
        Ok(self.listings.keep(id, of_tree, of_scratch))
    }

    pub(super) fn is_empty(&self, id: Id) -> Result<bool> {
        let (of_tree, of_scratch) = self.entries(id)?;
        Ok(of_tree.is_empty() && of_scratch.is_empty())
    }

    /// Everything in a directory but `.` and `..`: names that the tree has, in its order, and those of the scratch alone.
    fn entries(&self, id: Id) -> Result<(Vec<Listed>, Vec<Listed>)> {
        let (mut of_tree, mut of_scratch) = (Vec::new(), Vec::new());
        if !self.was_removed(id) {
            let mut scratch = self.scratch_names(id)?;
            if let Some(directory) = self.lower_directory(id)? {
                for (entry, position) in directory.entries(0).zip(1..) {
                    let entry = entry.map_err(|error| damaged(&error))?;
                    match scratch.remove(entry.name) {
                        None => {
                            let name = Cow::Borrowed(entry.name);
                            let (id, kind) = (self.number(entry.nid), kind(entry.file_type));
                            of_tree.push(Listed { name, id, kind, position });
                        }
                        Some(Some(found)) => of_tree.push(Listed { position, ..found }),
                        Some(None) => {}
                    }
                }
            }
            of_scratch.extend(scratch.into_values().flatten());
        }
        Ok((of_tree, of_scratch))
    }

    /// What the scratch has in a directory; `None` for a name that is hidden.
    fn scratch_names(&self, id: Id) -> Result<HashMap<Vec<u8>, Option<Listed>>> {
        let mut names = HashMap::new();
        let Some(directory) = self.directory(id)? else { return Ok(names) };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let readable = rustix::fs::openat(&directory, c".", flags, Mode::empty())?;
        for entry in rustix::fs::Dir::new(readable)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let mut file_type = entry.file_type();
            let mut hidden = false;
            if matches!(file_type, rustix::fs::FileType::CharacterDevice | rustix::fs::FileType::Unknown) {
                match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) if is_whiteout(&stat) => hidden = true,
                    Ok(stat) => file_type = rustix::fs::FileType::from_raw_mode(stat.st_mode),
                    Err(_) => hidden = true,
                }
            }
            let found = (!hidden).then(|| Listed {
                name: Cow::Owned(name.to_vec()),
                id: self.nodes.id_of(entry.ino()),
                kind: upper_kind(file_type),
                position: 0,
            });
            names.insert(name.to_vec(), found);
        }
        Ok(names)
    }

    pub(super) fn read_link(&self, id: Id) -> Result<Vec<u8>> {
        match self.place(id)? {
            Some(place) => place.read_link(),
            None => self.inode(id)?.symlink_target().map(<[u8]>::to_vec).map_err(|error| damaged(&error)),
        }
    }

    /// What is read from a file of the tree.
    fn lower_source(&self, inode: &Inode<'static>) -> Result<Source> {
        match inode.object().map_err(|error| damaged(&error))? {
            Some(digest) => {
                let (among, nid, size) = (Arc::clone(&self.objects), inode.nid(), inode.size());
                Ok(Source::Object(Object { among, nid, digest, size }))
            }
            None => inode.embedded().map(Source::Bytes).map_err(|error| damaged(&error)),
        }
    }

    /// The object that has the bytes of a file of the tree, if it does not have them itself. One that has to be fetched is
    /// [missing](Self::missing).
    pub(super) fn object(&mut self, inode: &Inode<'static>) -> Result<Option<File>> {
        let Some(digest) = inode.object().map_err(|error| damaged(&error))? else { return Ok(None) };
        match self.objects.local(&digest, inode.size()) {
            Ok(Some(file)) => Ok(Some(file)),
            Ok(None) => {
                self.missing = Some((digest, inode.size()));
                Err(Errno::IO)
            }
            Err(_) => Err(Errno::IO),
        }
    }

    /// Opens a file; one that is to be written must have been copied up. An object is not looked at yet.
    pub(super) fn open(&self, id: Id, write: bool) -> Result<Source> {
        let Some(place) = self.place(id)? else { return self.lower_source(&self.inode(id)?) };
        let flags = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let file: Result<File> = match place.open(flags) {
            // Who may write but not read.
            Err(Errno::ACCESS) if write => place.open(OFlags::WRONLY),
            other => other,
        };
        file.map(|file| Source::File(Arc::new(file)))
    }

    /// The xattrs of something, by the names that programs see.
    pub(super) fn xattrs(&self, id: Id) -> Result<Vec<Vec<u8>>> {
        match self.place(id)? {
            Some(place) => {
                let stored = place.xattr_names()?;
                Ok(stored.iter().filter_map(|name| self.upper.shown_xattr(name)).collect())
            }
            None => {
                let xattrs = self.inode(id)?.xattrs().map_err(|error| damaged(&error))?;
                Ok(xattrs.into_keys().collect())
            }
        }
    }

    pub(super) fn xattr(&self, id: Id, name: &[u8]) -> Result<Option<Vec<u8>>> {
        match self.place(id)? {
            Some(place) => place.xattr(&self.upper.stored_xattr(name)),
            None => {
                let value = self.inode(id)?.xattr(name).map_err(|error| damaged(&error))?.map(<[u8]>::to_vec);
                Ok(value)
            }
        }
    }

    /// The path in the tree of one of its directories.
    pub(super) fn tree_path(&self, nid: Nid) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        let mut here = nid;
        while here != self.image.root_nid() {
            if names.len() > DEPTH_MOST {
                return Err(Errno::LOOP);
            }
            let parent = self.inode(here)?.parent().map_err(|error| damaged(&error))?;
            names.push(self.name_in(parent, here)?);
            here = parent;
        }
        names.reverse();
        Ok([b"/", &*names.join(&b'/')].concat())
    }

    /// The name that a directory of the tree has for one in it.
    pub(super) fn name_in(&self, parent: Nid, nid: Nid) -> Result<&'static [u8]> {
        for entry in self.inode(parent)?.entries(0) {
            let entry = entry.map_err(|error| damaged(&error))?;
            if entry.nid == nid && entry.name != b"." && entry.name != b".." {
                return Ok(entry.name);
            }
        }
        Err(Errno::STALE)
    }
}

pub(super) fn is_directory(stat: &Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory
}

fn upper_kind(file_type: rustix::fs::FileType) -> fuser::FileType {
    use rustix::fs::FileType as On;
    match file_type {
        On::Directory => fuser::FileType::Directory,
        On::Symlink => fuser::FileType::Symlink,
        On::CharacterDevice => fuser::FileType::CharDevice,
        On::BlockDevice => fuser::FileType::BlockDevice,
        On::Fifo => fuser::FileType::NamedPipe,
        On::Socket => fuser::FileType::Socket,
        _ => fuser::FileType::RegularFile,
    }
}

/// A time of the host's kernel.
fn time(seconds: i64, nanoseconds: impl TryInto<u64>) -> SystemTime {
    let part = Duration::from_nanos(nanoseconds.try_into().unwrap_or(0));
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let seconds = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    seconds.and_then(|seconds| seconds.checked_add(part)).unwrap_or(UNIX_EPOCH)
}
