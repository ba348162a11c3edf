//! A part of a directory, as a tar archive.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};

use super::base::split;
use super::{ArchiveError, Base};

type Result<T> = std::result::Result<T, ArchiveError>;

/// What is packed, and how.
#[derive(Debug, Clone, Copy)]
pub struct Pack<'a> {
    /// What is packed, below the base.
    pub path: &'a Path,
    /// What it is called in the archive.
    pub top: Top<'a>,
    /// It may be a symbolic link to what is meant.
    pub follow: bool,
    /// Owners are kept; else everything belongs to root.
    pub owners: bool,
}

/// What the topmost entry of an archive is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Top<'a> {
    /// As it is: by the last part of its path; `.` for the base itself.
    Own,
    /// By this name.
    Named(&'a Path),
    /// Nothing: only what is in the directory is packed.
    Left,
}

/// Writes the tar archive of something below `base`, with modes, times, hard links and extended attributes. Sockets
/// are left out, as tar has no form for them.
///
/// A file that shrinks meanwhile is filled up with zeros, so that the archive stays readable.
///
/// # Errors
/// If something cannot be read, or the archive cannot be written.
pub fn pack(base: &Base, what: &Pack<'_>, archive: &mut dyn Write) -> Result<()> {
    let Pack { path, top, follow, owners } = *what;
    let mut packer = Packer { builder: tar::Builder::new(archive), links: HashMap::new(), owners };
    let cannot_open = |error| ArchiveError::new(path, "open", error);
    let place = split(path);
    let own = place.as_ref().map_or(Path::new("."), |(_, name)| name);
    let name = match top {
        Top::Own => own,
        Top::Named(name) => name,
        Top::Left => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let nofollow = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
            let directory = base.resolve(path, flags | nofollow).map_err(cannot_open)?;
            packer.below(Level::of(directory, PathBuf::new())?)?;
            return packer.finish();
        }
    };
    match &place {
        None => packer.tree(&base.directory(path).map_err(cannot_open)?, Path::new("."), name)?,
        #[cfg(target_os = "linux")]
        Some(_) if follow => {
            packer.found(&base.resolve(path, OFlags::PATH).map_err(cannot_open)?, path, name)?;
        }
        Some((parent, own)) => {
            packer.tree(&base.directory(parent).map_err(cannot_open)?, own, name)?;
        }
    }
    packer.finish()
}

struct Packer<'w> {
    builder: tar::Builder<&'w mut dyn Write>,
    /// The first name of every inode that has several.
    links: HashMap<(rustix::fs::Dev, u64), PathBuf>,
    owners: bool,
}

/// A directory that is being listed: names still to come.
struct Level {
    directory: OwnedFd,
    path: PathBuf,
    names: std::vec::IntoIter<OsString>,
}

impl Level {
    fn of(directory: OwnedFd, path: PathBuf) -> Result<Self> {
        let names = list(&directory).map_err(|error| ArchiveError::new(&path, "list", error))?;
        Ok(Self { directory, path, names: names.into_iter() })
    }
}

impl Packer<'_> {
    /// Packs what `found` is, wherever a link has led to, as `name`.
    #[cfg(target_os = "linux")]
    fn found(&mut self, found: &OwnedFd, path: &Path, name: &Path) -> Result<()> {
        let stat = rustix::fs::fstat(found).map_err(|error| ArchiveError::new(path, "look at", error))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = openat(found, ".", flags, Mode::empty())
                .map_err(|error| ArchiveError::new(path, "open", error))?;
            return self.tree(&directory, Path::new("."), name);
        }
        // Opening through /proc opens the very inode that was found.
        let through = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
        self.header(rustix::fs::CWD.as_fd(), &through, name, &stat, true)
    }

    /// Packs `own` in `directory`, and everything below it, as `name`.
    fn tree(&mut self, directory: &OwnedFd, own: &Path, name: &Path) -> Result<()> {
        let stat = statat(directory, own, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| ArchiveError::new(name, "look at", error))?;
        self.header(directory.as_fd(), own, name, &stat, false)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.below(enter(directory, own, name.to_owned())?)?;
        }
        Ok(())
    }

    /// Packs everything in a directory. An explicit stack: the tree may be deeper than this process's own.
    fn below(&mut self, first: Level) -> Result<()> {
        let mut levels = vec![first];
        while let Some(level) = levels.last_mut() {
            let Some(own) = level.names.next() else {
                levels.pop();
                continue;
            };
            let path = level.path.join(&own);
            let stat = match statat(&level.directory, own.as_bytes(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                // It was removed since the directory was listed.
                Err(rustix::io::Errno::NOENT) => continue,
                Err(error) => return Err(ArchiveError::new(path, "look at", error)),
            };
            self.header(level.directory.as_fd(), Path::new(&own), &path, &stat, false)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let entered = enter(&level.directory, Path::new(&own), path)?;
                levels.push(entered);
            }
        }
        Ok(())
    }

    fn header(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &Path,
        path: &Path,
        stat: &Stat,
        follow: bool,
    ) -> Result<()> {
        let failed = |doing, error: io::Error| ArchiveError::new(path, doing, error);
        let mut header = tar::Header::new_gnu();
        // Of another width on other systems.
        #[allow(clippy::useless_conversion)]
        let mode = u32::from(stat.st_mode) & 0o7777;
        header.set_mode(mode);
        let owner = if self.owners { (stat.st_uid, stat.st_gid) } else { (0, 0) };
        header.set_uid(owner.0.into());
        header.set_gid(owner.1.into());
        header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
        header.set_size(0);
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let first = self.links.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| path.to_owned());
            if first != path {
                header.set_entry_type(tar::EntryType::Link);
                let first = first.clone();
                return self
                    .builder
                    .append_link(&mut header, path, first)
                    .map_err(|error| failed("write", error));
            }
        }
        match kind {
            FileType::RegularFile => {
                let (file, stat) =
                    open_file(directory, name, follow).map_err(|error| failed("open", error))?;
                self.attributes(&file).map_err(|error| failed("read the attributes of", error))?;
                header.set_entry_type(tar::EntryType::Regular);
                let size = stat.st_size.cast_unsigned();
                header.set_size(size);
                let data = file.chain(io::repeat(0)).take(size);
                self.builder.append_data(&mut header, path, data).map_err(|error| failed("read", error))
            }
            FileType::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                self.empty(&mut header, path)
            }
            FileType::Symlink => {
                header.set_entry_type(tar::EntryType::Symlink);
                let target =
                    readlinkat(directory, name, Vec::new()).map_err(|error| failed("read", error.into()))?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                self.builder.append_link(&mut header, path, target).map_err(|error| failed("write", error))
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                header.set_entry_type(if kind == FileType::BlockDevice {
                    tar::EntryType::Block
                } else {
                    tar::EntryType::Char
                });
                let device = |number: u32| header_number(number, path);
                header
                    .set_device_major(device(rustix::fs::major(stat.st_rdev))?)
                    .map_err(|e| failed("write", e))?;
                header
                    .set_device_minor(device(rustix::fs::minor(stat.st_rdev))?)
                    .map_err(|e| failed("write", e))?;
                self.empty(&mut header, path)
            }
            FileType::Fifo => {
                header.set_entry_type(tar::EntryType::Fifo);
                self.empty(&mut header, path)
            }
            FileType::Socket | FileType::Unknown => Ok(()),
        }
    }

    fn empty(&mut self, header: &mut tar::Header, path: &Path) -> Result<()> {
        self.builder
            .append_data(header, path, io::empty())
            .map_err(|error| ArchiveError::new(path, "write", error))
    }

    /// Extended attributes as PAX records, in GNU tar's and star's form. Those of the host's own security modules stay
    /// where they are.
    fn attributes(&mut self, file: &File) -> io::Result<()> {
        use xattr::FileExt as _;
        let mut records = Vec::new();
        for name in file.list_xattr().into_iter().flatten() {
            let wanted = name.as_bytes().starts_with(b"user.") || name == "security.capability";
            if wanted && let (Some(text), Some(value)) = (name.to_str(), file.get_xattr(&name)?) {
                records.push((format!("SCHILY.xattr.{text}"), value));
            }
        }
        if records.is_empty() {
            return Ok(());
        }
        self.builder
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
    }

    fn finish(mut self) -> Result<()> {
        self.builder.finish().map_err(|error| ArchiveError::new("archive", "finish", error))
    }
}

/// Opens what is surely a regular file: the container may have put a device in its place since it was looked at.
#[cfg(target_os = "linux")]
fn open_file(directory: BorrowedFd<'_>, name: &Path, follow: bool) -> io::Result<(File, Stat)> {
    let nofollow = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
    let found = openat(directory, name, OFlags::PATH | OFlags::CLOEXEC | nofollow, Mode::empty())?;
    let stat = rustix::fs::fstat(&found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is no file any more"));
    }
    Ok((File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?, stat))
}

#[cfg(not(target_os = "linux"))]
fn open_file(directory: BorrowedFd<'_>, name: &Path, _: bool) -> io::Result<(File, Stat)> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(directory, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is no file any more"));
    }
    Ok((file.into(), stat))
}

fn enter(directory: &OwnedFd, own: &Path, path: PathBuf) -> Result<Level> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = openat(directory, own, flags, Mode::empty())
        .map_err(|error| ArchiveError::new(&path, "open", error))?;
    Level::of(opened, path)
}

fn header_number(number: u32, path: &Path) -> Result<u32> {
    // Seven octal digits are all that a header has for a device's number.
    if number < 1 << 21 {
        return Ok(number);
    }
    Err(ArchiveError::new(path, "write", io::Error::other("the device's number does not fit a tar header")))
}

fn list(directory: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    names.sort();
    Ok(names)
}
