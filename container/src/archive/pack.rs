//! A part of a directory, as a tar archive.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};

use super::{ArchiveError, Base, split};

type Result<T> = std::result::Result<T, ArchiveError>;

/// Writes the tar archive of `path` below `base`, with owners, modes, times, hard links and extended attributes. The
/// first entry is named by the last part of `path` (`.` for the base itself). Sockets are left out, as tar has no
/// form for them. With `follow`, `path` may be a symbolic link to what is meant.
///
/// A file that shrinks meanwhile is filled up with zeros, so that the archive stays readable.
///
/// # Errors
/// If something cannot be read, or the archive cannot be written.
pub fn pack(base: &Base, path: &Path, follow: bool, archive: &mut dyn Write) -> Result<()> {
    let mut packer = Packer { builder: tar::Builder::new(archive), links: HashMap::new() };
    let Some((parent, name)) = split(path) else {
        let directory = base.directory(path).map_err(|error| ArchiveError::new(path, "open", error))?;
        packer.tree(directory, PathBuf::from("."), &PathBuf::from("."))?;
        return packer.finish();
    };
    if follow {
        let found =
            base.resolve(path, OFlags::PATH).map_err(|error| ArchiveError::new(path, "open", error))?;
        // The kernel's own word for where the link led; the parent is opened again through it, so that the walk
        // below need not know about links.
        let real = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
            .map_err(|error| ArchiveError::new(path, "follow", error))?;
        return packer.single(&found, &real, &name);
    }
    let directory = base.directory(&parent).map_err(|error| ArchiveError::new(path, "open", error))?;
    packer.tree(directory, name.clone(), &name)?;
    packer.finish()
}

struct Packer<'w> {
    builder: tar::Builder<&'w mut dyn Write>,
    /// The first name of every inode that has several.
    links: HashMap<(u64, u64), PathBuf>,
}

/// A directory that is being listed: names still to come.
struct Level {
    directory: OwnedFd,
    path: PathBuf,
    names: std::vec::IntoIter<OsString>,
}

impl Packer<'_> {
    /// Packs what `found` is, as `name`. `real` is only for messages.
    fn single(mut self, found: &OwnedFd, real: &Path, name: &Path) -> Result<()> {
        let stat = rustix::fs::fstat(found).map_err(|error| ArchiveError::new(real, "look at", error))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let directory =
                openat(found, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|error| ArchiveError::new(real, "open", error))?;
            self.tree(directory, PathBuf::from("."), name)?;
        } else {
            // Opening through /proc opens the very inode that was found.
            let through = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
            self.header(rustix::fs::CWD.as_fd(), &through, name, &stat, true)?;
        }
        self.finish()
    }

    /// Packs `name` in `directory`, and everything below it, as `path`. An explicit stack: the tree may be deeper than
    /// this process's own.
    fn tree(&mut self, directory: OwnedFd, name: PathBuf, path: &Path) -> Result<()> {
        let mut levels =
            vec![Level { directory, path: PathBuf::new(), names: vec![name.into_os_string()].into_iter() }];
        let mut top = Some(path.to_owned());
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.next() else {
                levels.pop();
                continue;
            };
            let path = top.take().unwrap_or_else(|| level.path.join(&name));
            let stat = match statat(&level.directory, name.as_bytes(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                // It was removed since the directory was listed.
                Err(rustix::io::Errno::NOENT) if levels.len() > 1 => continue,
                Err(error) => return Err(ArchiveError::new(path, "look at", error)),
            };
            self.header(level.directory.as_fd(), Path::new(&name), &path, &stat, false)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = openat(&level.directory, name.as_bytes(), flags, Mode::empty())
                    .map_err(|error| ArchiveError::new(&path, "open", error))?;
                let names = list(&opened).map_err(|error| ArchiveError::new(&path, "list", error))?;
                levels.push(Level { directory: opened, path, names: names.into_iter() });
            }
        }
        Ok(())
    }

    fn header(
        &mut self,
        directory: rustix::fd::BorrowedFd<'_>,
        name: &Path,
        path: &Path,
        stat: &Stat,
        follow: bool,
    ) -> Result<()> {
        let failed = |doing, error: io::Error| ArchiveError::new(path, doing, error);
        let mut header = tar::Header::new_gnu();
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
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
                let nofollow = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
                // Found, looked at, and only then opened: the container may have put a device in its place.
                let flags = OFlags::PATH | OFlags::CLOEXEC | nofollow;
                let found = openat(directory, name, flags, Mode::empty())
                    .map_err(|error| failed("open", error.into()))?;
                let stat = rustix::fs::fstat(&found).map_err(|error| failed("look at", error.into()))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(failed("read", io::Error::other("it is no file any more")));
                }
                let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
                    .map_err(|error| failed("open", error))?;
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
