//! Names and attributes are changed.

use std::fs::File;
use std::os::fd::OwnedFd;

use fuser::FileAttr;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timestamps, XattrFlags};
use rustix::io::{Errno, Result};

use super::nodes::{Id, Node};
use super::place::Place;
use super::union::{Union, is_directory};
use super::upper::is_whiteout;

/// What is to be made.
#[derive(Debug, Clone, Copy)]
pub(super) enum New<'n> {
    /// With its mode.
    Directory(u32),
    /// With its target.
    Symlink(&'n [u8]),
    /// A file, or what mknod(2) makes, with its mode and device number.
    Node(FileType, u32, u64),
}

/// For whom it is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Maker {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// What setattr changes; what is `None` stays.
#[derive(Debug, Default)]
pub(super) struct Attributes {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) times: Option<Timestamps>,
}

/// What the scratch has under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnDisk {
    Nothing,
    Whiteout,
    Directory,
    Other,
}

pub(super) fn on_disk(directory: &OwnedFd, name: &[u8]) -> Result<OnDisk> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if is_whiteout(&stat) => Ok(OnDisk::Whiteout),
        Ok(stat) if is_directory(&stat) => Ok(OnDisk::Directory),
        Ok(_) => Ok(OnDisk::Other),
        Err(Errno::NOENT) => Ok(OnDisk::Nothing),
        Err(error) => Err(error),
    }
}

impl Union {
    /// Makes something new. A file is returned open.
    pub(super) fn make(
        &mut self,
        parent: Id,
        name: &[u8],
        new: New<'_>,
        maker: Maker,
    ) -> Result<(Id, FileAttr, Option<File>)> {
        if self.find(parent, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        let above = self.attributes(parent)?;
        let directory = self.ready(parent)?;
        let hidden = on_disk(&directory, name)? == OnDisk::Whiteout;
        let (at, as_name) = if hidden {
            (self.upper.work_again()?, self.upper.new_name())
        } else {
            (rustix::io::fcntl_dupfd_cloexec(&directory, 0)?, name.to_owned())
        };
        let makes_directory = matches!(new, New::Directory(_));
        let file = create(&at, &as_name, new)?;
        let place = Place::named(at, &as_name);
        let finish = || {
            give(&place, new, maker, &above)?;
            if hidden && makes_directory {
                self.upper.mark(&place, "opaque", b"y")?;
                self.upper.exchange(self.upper.work(), &as_name, &directory, name)?;
                // That is the whiteout now.
                self.upper.discard(&as_name);
            } else if hidden {
                rustix::fs::renameat(self.upper.work(), &as_name, &directory, name)?;
            }
            rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)
        };
        let stat = finish().inspect_err(|_| {
            if hidden {
                self.upper.discard(&as_name);
            } else {
                self.undo(&directory, name, makes_directory);
            }
        })?;
        let node = Node::new(stat.st_ino, makes_directory, None, Some((parent, name)));
        let id = self.nodes.insert(None, node);
        Ok((id, self.upper_attributes(id, &stat), file))
    }

    /// Removes a name of anything but a directory.
    pub(super) fn unlink(&mut self, parent: Id, name: &[u8]) -> Result<()> {
        let found = self.find(parent, name)?.ok_or(Errno::NOENT)?;
        if found.is_directory() {
            return Err(Errno::ISDIR);
        }
        let below = self.lower_child(parent, name)?.is_some();
        let directory = self.ready(parent)?;
        let held = if found.in_scratch { Some(hold(&directory, name)?) } else { None };
        match (found.in_scratch, below) {
            (true, true) => self.upper.cover(&directory, name)?,
            (true, false) => rustix::fs::unlinkat(&directory, name, AtFlags::empty())?,
            (false, _) => self.upper.whiteout(&directory, name)?,
        }
        self.nodes.remove_name(found.id, parent, name, held);
        Ok(())
    }

    /// Removes an empty directory.
    pub(super) fn rmdir(&mut self, parent: Id, name: &[u8]) -> Result<()> {
        let found = self.find(parent, name)?.ok_or(Errno::NOENT)?;
        if !found.is_directory() {
            return Err(Errno::NOTDIR);
        }
        if !self.is_empty(found.id)? {
            return Err(Errno::NOTEMPTY);
        }
        let below = self.lower_child(parent, name)?.is_some();
        let directory = self.ready(parent)?;
        if !found.in_scratch {
            self.upper.whiteout(&directory, name)?;
            return Ok(());
        }
        let held = hold(&directory, name)?;
        if below {
            self.upper.cover(&directory, name)?;
        } else {
            match rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR) {
                // It has whiteouts in it.
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    let temporary = self.upper.new_name();
                    self.upper.opened(&directory, name, || {
                        rustix::fs::renameat(&directory, name, self.upper.work(), &temporary)
                    })?;
                    self.upper.discard(&temporary);
                }
                other => other?,
            }
        }
        self.nodes.remove_name(found.id, parent, name, Some(held));
        Ok(())
    }

    /// Gives a file one more name.
    pub(super) fn link(&mut self, id: Id, parent: Id, name: &[u8]) -> Result<FileAttr> {
        if self.find(parent, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        self.copy_up(id, None)?;
        let directory = self.ready(parent)?;
        let place = self.place(id)?.ok_or(Errno::STALE)?;
        if on_disk(&directory, name)? == OnDisk::Whiteout {
            let temporary = self.upper.new_name();
            place.link(self.upper.work(), &temporary)?;
            rustix::fs::renameat(self.upper.work(), &temporary, &directory, name)
                .inspect_err(|_| self.upper.discard(&temporary))?;
        } else {
            place.link(&directory, name)?;
        }
        self.nodes.add_name(id, parent, name);
        self.attributes(id)
    }

    /// Changes attributes. `open` is the file where it was opened for it.
    pub(super) fn set_attributes(
        &mut self,
        id: Id,
        changes: &Attributes,
        open: Option<&super::handles::Handle>,
    ) -> Result<FileAttr> {
        self.copy_up(id, changes.size)?;
        let place = self.place(id)?.ok_or(Errno::STALE)?;
        if let Some(size) = changes.size {
            let through = open.map(|handle| handle.with_file(|file| rustix::fs::ftruncate(file, size)));
            match through {
                // Opened for reading only, or never opened.
                None | Some(Err(Errno::INVAL | Errno::BADF)) => {
                    rustix::fs::ftruncate(place.open(OFlags::WRONLY)?, size)?;
                }
                Some(other) => other?,
            }
        }
        let before = place.stat()?;
        let is_link = FileType::from_raw_mode(before.st_mode) == FileType::Symlink;
        if changes.uid.is_some() || changes.gid.is_some() {
            place.chown(changes.uid, changes.gid)?;
            // The kernel has already said which bits a new owner takes away, and this took them all.
            if !is_link && before.st_mode & 0o6000 != 0 && changes.mode.is_none() {
                place.chmod(before.st_mode & 0o7777)?;
            }
        }
        if let Some(mode) = changes.mode.filter(|_| !is_link) {
            place.chmod(mode & 0o7777)?;
        }
        if let Some(times) = &changes.times {
            place.set_times(times)?;
        }
        self.attributes(id)
    }

    pub(super) fn set_xattr(&mut self, id: Id, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<()> {
        if name.starts_with(b"system.") {
            return Err(Errno::OPNOTSUPP);
        }
        self.copy_up(id, None)?;
        let place = self.place(id)?.ok_or(Errno::STALE)?;
        place.set_xattr(&self.upper.stored_xattr(name), value, flags)
    }

    pub(super) fn remove_xattr(&mut self, id: Id, name: &[u8]) -> Result<()> {
        if self.xattr(id, name)?.is_none() {
            return Err(Errno::NODATA);
        }
        self.copy_up(id, None)?;
        let place = self.place(id)?.ok_or(Errno::STALE)?;
        place.remove_xattr(&self.upper.stored_xattr(name))
    }
}

/// Keeps what a name stands for.
pub(super) fn hold(directory: &OwnedFd, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

fn create(at: &OwnedFd, name: &[u8], new: New<'_>) -> Result<Option<File>> {
    match new {
        New::Directory(mode) => rustix::fs::mkdirat(at, name, Mode::from_raw_mode(mode & 0o7777))?,
        New::Symlink(target) => rustix::fs::symlinkat(target, at, name)?,
        New::Node(FileType::RegularFile, mode, _) => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            return rustix::fs::openat(at, name, flags, Mode::from_raw_mode(mode & 0o7777))
                .map(|fd| Some(fd.into()));
        }
        // It would be a whiteout.
        New::Node(FileType::CharacterDevice, _, 0) => return Err(Errno::PERM),
        New::Node(kind, mode, device) => {
            rustix::fs::mknodat(at, name, kind, Mode::from_raw_mode(mode & 0o7777), device)?;
        }
    }
    Ok(None)
}

/// Gives what was made the owner and the mode that it would have on any file system: those of its maker, or the group of
/// a directory with the set-group-id bit (inode(7)).
fn give(place: &Place, new: New<'_>, maker: Maker, above: &FileAttr) -> Result<()> {
    const SET_GROUP: u16 = 0o2000;
    let inherits = above.perm & SET_GROUP != 0;
    let gid = if inherits { above.gid } else { maker.gid };
    let mode = match new {
        New::Directory(mode) if inherits => Some(mode & 0o7777 | u32::from(SET_GROUP)),
        New::Directory(mode) | New::Node(_, mode, _) => Some(mode & 0o7777),
        New::Symlink(_) => None,
    };
    let stat = place.stat()?;
    let mut changed = false;
    if (stat.st_uid, stat.st_gid) != (maker.uid, gid) {
        place.chown(Some(maker.uid), Some(gid))?;
        changed = true;
    }
    if let Some(mode) = mode.filter(|mode| changed || stat.st_mode & 0o7777 != *mode) {
        place.chmod(mode)?;
    }
    Ok(())
}
