//! A tar archive, into a directory.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chownat, fchmod, linkat, makedev,
    mkdirat, mknodat, openat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::entries::{Entries, Entry, EntryType};
use super::{ArchiveError, Base, split};

type Result<T> = std::result::Result<T, ArchiveError>;

/// What is taken from an archive besides names, data, modes and times.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpack {
    /// Owners and capabilities; else everything belongs to the caller.
    pub owners: bool,
    /// Device nodes; else they are refused.
    pub devices: bool,
}

/// Unpacks `archive` into the directory `into` below `base`. Leading slashes of names are dropped; existing files are
/// replaced, existing directories filled.
///
/// # Errors
/// At the first entry that would leave the base, that would replace a directory by something else or something else by a
/// directory, or that cannot be written. What came before it stays.
pub fn unpack(base: &Base, into: &Path, archive: &mut dyn Read, options: &Unpack) -> Result<()> {
    let mut entries = Entries::new(archive);
    let mut directories: Vec<(PathBuf, Mode, Timespec)> = Vec::new();
    while let Some(entry) = entries.next().map_err(|error| ArchiveError::new("archive", "read", error))? {
        let failed = |error| ArchiveError::new(&entry.path, "unpack", error);
        let relative = below(&entry.path).map_err(failed)?;
        let place = Place::find(base, into, &relative).map_err(failed)?;
        place.write(base, into, &mut entries, &entry, options).map_err(failed)?;
        if entry.kind == EntryType::Directory {
            directories.push((into.join(&relative), mode(&entry), mtime(&entry)));
        }
    }
    // From the deepest up: giving a directory its mode may make it unwritable, and writing into it changes its time.
    directories.sort_by(|(a, ..), (b, ..)| b.cmp(a));
    for (path, mode, time) in directories {
        let failed = |error| ArchiveError::new(&path, "set the mode of", error);
        let directory = base.resolve(&path, OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed)?;
        fchmod(&directory, mode).map_err(|error| failed(error.into()))?;
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::futimens(&directory, &times).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

/// Where an entry goes: an open directory and a name in it.
struct Place {
    parent: OwnedFd,
    name: PathBuf,
}

impl Place {
    fn find(base: &Base, into: &Path, relative: &Path) -> io::Result<Self> {
        let Some((parent, name)) = split(relative) else {
            return Ok(Self { parent: base.directory(into)?, name: PathBuf::from(".") });
        };
        // Missing parents are made one by one: an archive need not name them.
        let mut path = into.to_owned();
        let mut directory = base.directory(&path)?;
        for part in parent.components() {
            path.push(part);
            directory = match base.directory(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    match mkdirat(&directory, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => base.directory(&path)?,
                        Err(error) => return Err(error.into()),
                    }
                }
                other => other?,
            };
        }
        Ok(Self { parent: directory, name })
    }

    fn write(
        &self,
        base: &Base,
        into: &Path,
        entries: &mut Entries<'_>,
        entry: &Entry,
        options: &Unpack,
    ) -> io::Result<()> {
        self.make_room(entry.kind == EntryType::Directory)?;
        let mut file = None;
        match entry.kind {
            EntryType::Directory => match mkdirat(&self.parent, &self.name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            },
            EntryType::Symlink => {
                symlinkat(entry.link.as_deref().ok_or_else(no_target)?, &self.parent, &self.name)?;
            }
            EntryType::Link => {
                return self.link(base, into, Path::new(entry.link.as_deref().ok_or_else(no_target)?));
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => self.node(entry, options)?,
            EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut opened: File =
                    openat(&self.parent, &self.name, flags, Mode::from_raw_mode(0o600))?.into();
                entries.copy_to(entry, &mut opened)?;
                file = Some(opened);
            }
            // Vendors' own kinds have nothing to unpack.
            _ => return Ok(()),
        }
        self.finish(entry, file.as_ref(), options)
    }

    /// Takes away what stands in the way, unless it is a directory (or must become one).
    fn make_room(&self, for_directory: bool) -> io::Result<()> {
        let Ok(there) = statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) else {
            return Ok(());
        };
        let is_directory = FileType::from_raw_mode(there.st_mode) == FileType::Directory;
        match (is_directory, for_directory) {
            (true, true) => Ok(()),
            (true, false) => {
                Err(io::Error::other("a directory is there, and is not replaced by something else"))
            }
            (false, true) => {
                Err(io::Error::other("something else is there, and is not replaced by a directory"))
            }
            (false, false) => Ok(unlinkat(&self.parent, &self.name, AtFlags::empty())?),
        }
    }

    fn link(&self, base: &Base, into: &Path, target: &Path) -> io::Result<()> {
        let (parent, name) = split(&below(target)?).ok_or_else(no_target)?;
        let directory = base.directory(&into.join(parent))?;
        Ok(linkat(&directory, name, &self.parent, &self.name, AtFlags::empty())?)
    }

    fn node(&self, entry: &Entry, options: &Unpack) -> io::Result<()> {
        let kind = match entry.kind {
            EntryType::Char => FileType::CharacterDevice,
            EntryType::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        if kind != FileType::Fifo && !options.devices {
            return Err(io::Error::other("it is a device node, and those are not made here"));
        }
        let device = makedev(entry.device.0, entry.device.1);
        Ok(mknodat(&self.parent, &self.name, kind, mode(entry), device)?)
    }

    /// Owner first: a change of owner takes set-user-ID bits and capabilities away.
    fn finish(&self, entry: &Entry, file: Option<&File>, options: &Unpack) -> io::Result<()> {
        if options.owners {
            let id = |number| {
                u32::try_from(number).map_err(|_| io::Error::other("its owner's number is too large"))
            };
            let (uid, gid) = (Uid::from_raw(id(entry.uid)?), Gid::from_raw(id(entry.gid)?));
            chownat(&self.parent, &self.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if let Some(file) = file {
            let trusted = if options.owners { 0o7777 } else { 0o1777 };
            fchmod(file.as_fd(), mode(entry) & Mode::from_raw_mode(trusted))?;
            for (name, value) in &entry.xattrs {
                use xattr::FileExt as _;
                let of_user = name.as_encoded_bytes().starts_with(b"user.");
                if of_user || (options.owners && name == "security.capability") {
                    file.set_xattr(name, value)?;
                }
            }
        }
        if entry.kind == EntryType::Directory {
            return Ok(());
        }
        let times = Timestamps { last_access: mtime(entry), last_modification: mtime(entry) };
        Ok(utimensat(&self.parent, &self.name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// A name of an archive as a path below some directory: without leading slashes and dots.
fn below(name: &Path) -> io::Result<PathBuf> {
    if name.components().any(|part| part == Component::ParentDir) {
        return Err(io::Error::other(format!("`{}` has `..` in it", name.display())));
    }
    Ok(name.components().filter(|part| matches!(part, Component::Normal(_))).collect())
}

fn mode(entry: &Entry) -> Mode {
    Mode::from_bits_truncate(entry.mode & 0o7777)
}

fn mtime(entry: &Entry) -> Timespec {
    Timespec { tv_sec: i64::try_from(entry.mtime).unwrap_or(0), tv_nsec: 0 }
}

fn no_target() -> io::Error {
    io::Error::other("it is a link to nothing")
}
