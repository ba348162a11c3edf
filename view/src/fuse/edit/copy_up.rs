//! What the tree has is copied to the scratch before it is changed.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use kiln_erofs::{FileType, Inode, Nid};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::{Errno, Result};

use super::super::Owners;
use super::nodes::{Id, Node, Nodes};
use super::parents::Parents;
use super::place::Place;
use super::union::{Union, damaged};

/// What is copied of a file.
enum Data {
    Nothing,
    Embedded { bytes: Cow<'static, [u8]>, length: usize },
    Object { object: File, length: u64, whole: bool },
}

impl Data {
    fn copy(self, mut to: &File) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Embedded { bytes, length } => {
                to.write_all(&bytes[..length.min(bytes.len())]).map_err(|error| errno(&error))
            }
            // Shared blocks where the file system has that; else the kernel copies, where it can.
            Self::Object { object, whole: true, .. } if rustix::fs::ioctl_ficlone(to, &object).is_ok() => {
                Ok(())
            }
            Self::Object { object, length, .. } => {
                let copied =
                    std::io::copy(&mut object.take(length), &mut to).map_err(|error| errno(&error))?;
                if copied == length { Ok(()) } else { Err(Errno::IO) }
            }
        }
    }
}

impl Union {
    /// The directory of the scratch (`O_PATH`) in which the names of a directory are changed. It is made if it is missing.
    pub(super) fn ready(&mut self, id: Id) -> Result<OwnedFd> {
        self.copy_up_directory(id)?;
        self.directory(id)?.ok_or(Errno::NOENT)
    }

    /// Makes the scratch have a directory, and all those above it. What is in it stays where it is.
    pub(super) fn copy_up_directory(&mut self, id: Id) -> Result<()> {
        if self.nodes.get(id).is_some() {
            return Ok(());
        }
        // From the directory itself up to the first that the scratch has.
        let mut missing = Vec::new();
        let mut here = id;
        while self.nodes.get(here).is_none() {
            if !Nodes::is_of_tree(here) {
                return Err(Errno::STALE);
            }
            let inode = self.inode(here)?;
            let parent = inode.parent().map_err(|error| damaged(&error))?;
            missing.push((inode, self.name_in(parent, here)?));
            here = self.number(parent);
        }
        for (inode, name) in missing.into_iter().rev() {
            let parent = here;
            here = inode.nid();
            let directory = self.directory(parent)?.ok_or(Errno::NOENT)?;
            let temporary = self.upper.new_name();
            rustix::fs::mkdirat(self.upper.work(), &temporary, Mode::RWXU)?;
            let place = Place::named(self.upper.work_again()?, &temporary);
            let moved = self.dress(&inode, &place).and_then(|()| place.stat()).and_then(|stat| {
                self.upper.unnoticed(&directory, || {
                    let put = || self.put(&temporary, &directory, name);
                    self.upper.opened(self.upper.work(), &temporary, put)
                })?;
                let put = Place::named(rustix::io::fcntl_dupfd_cloexec(&directory, 0)?, name);
                if put.stat()?.st_mode != stat.st_mode {
                    put.chmod(inode.mode())?;
                }
                Ok(stat)
            });
            let stat = moved.inspect_err(|_| self.upper.discard(&temporary))?;
            let node = Node::new(stat.st_ino, true, Some(here), Some((parent, name)));
            self.nodes.insert(Some(here), node);
        }
        Ok(())
    }

    /// Makes the scratch have a file, or whatever else it is, under all of its names. `length` is how much of a file's data
    /// is wanted, if not all.
    pub(super) fn copy_up(&mut self, id: Id, length: Option<u64>) -> Result<()> {
        if self.nodes.get(id).is_some() {
            return Ok(());
        }
        let inode = self.inode(id)?;
        if inode.file_type() == FileType::Directory {
            return self.copy_up_directory(id);
        }
        // Before anything is made: who has to fetch it begins anew.
        let data = self.data(&inode, length.unwrap_or(u64::MAX))?;
        let names = self.visible_names(id)?;
        // Before the copy is made, so that a directory that cannot be made costs none.
        let mut directories = Vec::new();
        for (parent, _) in &names {
            directories.push(self.ready(*parent)?);
        }
        let temporary = self.upper.new_name();
        let place = Place::named(self.upper.work_again()?, &temporary);
        let copied = self.copy(&inode, &place, &temporary, data).and_then(|()| place.stat());
        let stat = copied.inspect_err(|_| self.upper.discard(&temporary))?;
        let held = if names.is_empty() { Some(place.hold()?) } else { None };
        let mut node = Node::new(stat.st_ino, false, None, None);
        node.held = held;
        // Other names first: as long as not all are there, none of them is the one that is in use.
        for ((parent, name), directory) in names.iter().zip(&directories).skip(1) {
            self.upper.unnoticed(directory, || place.link(directory, name))?;
            node.names.push((*parent, name.clone()));
        }
        match (names.first(), directories.first()) {
            (Some((parent, name)), Some(directory)) => {
                self.upper.unnoticed(directory, || self.put(&temporary, directory, name))?;
                node.names.insert(0, (*parent, name.clone()));
            }
            // Removed, and still open somewhere.
            _ => self.upper.discard(&temporary),
        }
        self.nodes.insert(Some(id), node);
        let Some(place) = self.place(id)? else { return Err(Errno::STALE) };
        self.handles.moved(id, || place.open(OFlags::RDONLY))
    }

    /// Moves what was made in the work directory to where nothing is.
    fn put(&self, temporary: &[u8], directory: &OwnedFd, name: &[u8]) -> Result<()> {
        rustix::fs::renameat(self.upper.work(), temporary, directory, name)
    }

    /// The names under which the view still shows a file of the tree.
    fn visible_names(&mut self, id: Id) -> Result<Vec<(Id, Vec<u8>)>> {
        if self.parents.is_none() {
            self.parents = Some(Parents::of(&self.image).map_err(|error| damaged(&error))?);
        }
        let parents: Vec<Nid> = self.parents.iter().flat_map(|parents| parents.parents(id)).collect();
        let mut names = Vec::new();
        for parent in parents {
            if !self.is_visible(parent)? {
                continue;
            }
            let number = self.number(parent);
            for entry in self.inode(parent)?.entries(0) {
                let entry = entry.map_err(|error| damaged(&error))?;
                if entry.nid == id && self.shows(number, entry.name, id)? {
                    names.push((number, entry.name.to_vec()));
                }
            }
        }
        Ok(names)
    }

    /// Whether a directory of the tree is seen anywhere.
    fn is_visible(&mut self, nid: Nid) -> Result<bool> {
        let mut here = nid;
        loop {
            let id = self.number(here);
            if self.nodes.get(id).is_some() {
                return Ok(!self.was_removed(id));
            }
            let parent = self.inode(here)?.parent().map_err(|error| damaged(&error))?;
            let (name, above) = (self.name_in(parent, here)?, self.number(parent));
            if self.nodes.get(above).is_some() && !self.shows(above, name, id)? {
                return Ok(false);
            }
            here = parent;
        }
    }

    /// Whether a name stands for what the tree has under it.
    fn shows(&mut self, parent: Id, name: &[u8], id: Id) -> Result<bool> {
        Ok(self.find(parent, name)?.is_some_and(|found| found.id == id && !found.in_scratch))
    }

    /// As much of a file's data as is wanted.
    fn data(&mut self, inode: &Inode<'static>, wanted: u64) -> Result<Data> {
        let length = wanted.min(inode.size());
        if inode.file_type() != FileType::Regular || length == 0 {
            return Ok(Data::Nothing);
        }
        match self.object(inode)? {
            Some(object) => Ok(Data::Object { object, length, whole: length == inode.size() }),
            None => {
                let bytes = inode.embedded().map_err(|error| damaged(&error))?;
                Ok(Data::Embedded { bytes, length: usize::try_from(length).unwrap_or(usize::MAX) })
            }
        }
    }

    /// Makes a copy in the work directory.
    fn copy(&self, inode: &Inode<'static>, place: &Place, name: &[u8], data: Data) -> Result<()> {
        let work = self.upper.work();
        let node = |kind| {
            let device = inode.device().map_or(0, |device| rustix::fs::makedev(device.major, device.minor));
            rustix::fs::mknodat(work, name, kind, Mode::RUSR | Mode::WUSR, device)
        };
        match inode.file_type() {
            FileType::Regular => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                let file: File = rustix::fs::openat(work, name, flags, Mode::RUSR | Mode::WUSR)?.into();
                data.copy(&file)?;
                self.dress(inode, place)?;
                if self.upper.durable() {
                    file.sync_data().map_err(|error| errno(&error))?;
                }
                return Ok(());
            }
            FileType::Symlink => {
                let target = inode.symlink_target().map_err(|error| damaged(&error))?;
                rustix::fs::symlinkat(target, work, name)?;
            }
            FileType::CharDevice => node(rustix::fs::FileType::CharacterDevice)?,
            FileType::BlockDevice => node(rustix::fs::FileType::BlockDevice)?,
            FileType::Fifo => node(rustix::fs::FileType::Fifo)?,
            FileType::Socket => node(rustix::fs::FileType::Socket)?,
            FileType::Directory => return Err(Errno::ISDIR),
        }
        self.dress(inode, place)
    }

    /// Gives a copy the owner, the mode, the xattrs and the times of what it is a copy of.
    fn dress(&self, inode: &Inode<'static>, place: &Place) -> Result<()> {
        if self.owners == Owners::Kept {
            place.chown(Some(inode.uid()), Some(inode.gid()))?;
        }
        for (name, value) in inode.xattrs().map_err(|error| damaged(&error))? {
            match place.set_xattr(&self.upper.stored_xattr(&name), &value, XattrFlags::empty()) {
                // What only root of the host may have, its file loses when somebody else changes it.
                Err(Errno::PERM | Errno::OPNOTSUPP) if !name.starts_with(b"user.") => {
                    tracing::debug!(name = %name.escape_ascii(), "an xattr cannot be copied to the scratch");
                }
                other => other?,
            }
        }
        if inode.file_type() != FileType::Symlink {
            place.chmod(inode.mode())?;
        }
        let time = inode.mtime();
        let time = Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
        place.set_times(&Timestamps { last_access: time, last_modification: time })
    }

    /// Removes what was made and cannot be used.
    pub(super) fn undo(&self, directory: &OwnedFd, name: &[u8], is_directory: bool) {
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let _ = rustix::fs::unlinkat(directory, name, flags);
    }
}

pub(super) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
