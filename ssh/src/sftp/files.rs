//! What requests do.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatVfs, fstat, fstatvfs, linkat, lstat, stat, statvfs};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::listing::{Listing, Name};
use super::{Failure, LONGEST_DATA, MOST_HANDLES, Reply};
use crate::wire::Put as _;

/// What a request comes to.
pub(super) type Outcome = Result<Reply, Failure>;

const READING: u32 = 1;
const WRITING: u32 = 2;
const APPENDING: u32 = 4;
const CREATING: u32 = 8;
const TRUNCATING: u32 = 16;
const EXCLUSIVE: u32 = 32;

/// What is open.
#[derive(Debug, Default)]
pub(super) struct Files {
    open: HashMap<u32, Open>,
    next: u32,
}

#[derive(Debug)]
enum Open {
    File { file: File, appending: bool },
    Directory(Listing),
}

impl Files {
    fn enter(&mut self, open: Open) -> Outcome {
        if self.open.len() >= MOST_HANDLES as usize {
            return Err(Errno::MFILE.into());
        }
        while self.open.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        self.open.insert(self.next, open);
        Ok(Reply::Handle(self.next))
    }

    fn file(&self, handle: u32) -> Result<&File, Failure> {
        match self.open.get(&handle) {
            Some(Open::File { file, .. }) => Ok(file),
            _ => Err(Errno::BADF.into()),
        }
    }

    pub(super) fn descriptor(&self, handle: u32) -> Result<BorrowedFd<'_>, Failure> {
        match self.open.get(&handle).ok_or(Errno::BADF)? {
            Open::File { file, .. } => Ok(file.as_fd()),
            Open::Directory(listing) => Ok(listing.descriptor()?),
        }
    }

    pub(super) fn open(&mut self, name: &[u8], flags: u32, attributes: &Attributes) -> Outcome {
        let has = |flag: u32| flags & flag != 0;
        let mut options = OpenOptions::new();
        options.read(has(READING)).write(has(WRITING) || has(APPENDING)).append(has(APPENDING));
        if has(WRITING) || has(APPENDING) {
            options.truncate(has(TRUNCATING) && !has(APPENDING));
            if has(CREATING) && has(EXCLUSIVE) {
                options.create_new(true);
            } else {
                options.create(has(CREATING));
            }
        }
        options.mode(attributes.mode.unwrap_or(0o666) & 0o7777);
        // A FIFO without a reader, or a terminal, must not hold the server.
        let wait = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
        options.custom_flags(wait.bits().cast_signed());
        let file = options.open(path(name)?)?;
        self.enter(Open::File { file, appending: has(APPENDING) })
    }

    pub(super) fn close(&mut self, handle: u32) -> Outcome {
        self.open.remove(&handle).ok_or(Errno::BADF)?;
        Ok(Reply::Done)
    }

    pub(super) fn read(&self, handle: u32, offset: u64, length: u32) -> Outcome {
        let mut data = vec![0; length.min(LONGEST_DATA) as usize];
        let count = self.file(handle)?.read_at(&mut data, offset)?;
        if count == 0 && length > 0 {
            return Err(Failure::End);
        }
        data.truncate(count);
        Ok(Reply::Data(data))
    }

    pub(super) fn write(&self, handle: u32, offset: u64, data: &[u8]) -> Outcome {
        match self.open.get(&handle) {
            Some(Open::File { file, appending: false }) => file.write_all_at(data, offset)?,
            Some(Open::File { file, appending: true }) => std::io::Write::write_all(&mut &*file, data)?,
            _ => return Err(Errno::BADF.into()),
        }
        Ok(Reply::Done)
    }

    pub(super) fn sync(&self, handle: u32) -> Outcome {
        self.file(handle)?.sync_all()?;
        Ok(Reply::Done)
    }

    pub(super) fn status_of(&self, handle: u32) -> Outcome {
        Ok(Reply::Attributes(Attributes::of(&fstat(self.descriptor(handle)?)?)))
    }

    pub(super) fn filesystem_of(&self, handle: u32) -> Outcome {
        Ok(Reply::Fields(figures(&fstatvfs(self.descriptor(handle)?)?)))
    }

    pub(super) fn open_directory(&mut self, name: &[u8]) -> Outcome {
        let listing = Listing::open(path(name)?)?;
        self.enter(Open::Directory(listing))
    }

    pub(super) fn read_directory(&mut self, handle: u32) -> Outcome {
        match self.open.get_mut(&handle) {
            Some(Open::Directory(listing)) => match listing.next_names()? {
                names if names.is_empty() => Err(Failure::End),
                names => Ok(Reply::Names(names)),
            },
            _ => Err(Errno::BADF.into()),
        }
    }
}

/// A path as it was sent: an empty one is the directory that the server is in.
pub(super) fn path(name: &[u8]) -> Result<&Path, Failure> {
    if name.contains(&0) {
        return Err(Failure::Malformed);
    }
    Ok(Path::new(OsStr::from_bytes(if name.is_empty() { b"." } else { name })))
}

pub(super) fn status(name: &[u8], follow: bool) -> Outcome {
    let found = if follow { stat(path(name)?)? } else { lstat(path(name)?)? };
    Ok(Reply::Attributes(Attributes::of(&found)))
}

pub(super) fn remove(name: &[u8], directory: bool) -> Outcome {
    if directory {
        fs::remove_dir(path(name)?)?;
    } else {
        fs::remove_file(path(name)?)?;
    }
    Ok(Reply::Done)
}

pub(super) fn make_directory(name: &[u8], attributes: &Attributes) -> Outcome {
    fs::DirBuilder::new().mode(attributes.mode.unwrap_or(0o777) & 0o7777).create(path(name)?)?;
    Ok(Reply::Done)
}

/// Absolute and without links; its last part need not be there.
pub(super) fn real_path(name: &[u8]) -> Outcome {
    let path = path(name)?;
    let real = match (path.canonicalize(), path.file_name()) {
        (Err(error), Some(last)) if error.kind() == std::io::ErrorKind::NotFound => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            parent.unwrap_or(Path::new(".")).canonicalize()?.join(last)
        }
        (outcome, _) => outcome?,
    };
    Ok(alone(real))
}

fn alone(path: PathBuf) -> Reply {
    Reply::Names(vec![Name::bare(path.into_os_string().into_vec())])
}

/// `~` and what is relative, as a shell and then [`real_path`] would.
pub(super) fn expand(name: &[u8]) -> Outcome {
    let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
    match name {
        b"~" => real_path(home.as_bytes()),
        [b'~', b'/', rest @ ..] => {
            real_path(Path::new(&home).join(OsStr::from_bytes(rest)).as_os_str().as_bytes())
        }
        [b'~', ..] => Err(Errno::NOENT.into()),
        _ => real_path(name),
    }
}

/// Renames to what must not be there.
pub(super) fn rename(from: &[u8], to: &[u8]) -> Outcome {
    let (from, to) = (path(from)?, path(to)?);
    if lstat(to).is_ok() {
        return Err(Errno::EXIST.into());
    }
    fs::rename(from, to)?;
    Ok(Reply::Done)
}

/// Renames over what is there.
pub(super) fn replace(from: &[u8], to: &[u8]) -> Outcome {
    fs::rename(path(from)?, path(to)?)?;
    Ok(Reply::Done)
}

pub(super) fn hard_link(from: &[u8], to: &[u8]) -> Outcome {
    linkat(CWD, path(from)?, CWD, path(to)?, AtFlags::empty())?;
    Ok(Reply::Done)
}

pub(super) fn read_link(name: &[u8]) -> Outcome {
    Ok(alone(fs::read_link(path(name)?)?))
}

pub(super) fn make_link(target: &[u8], name: &[u8]) -> Outcome {
    std::os::unix::fs::symlink(path(target)?, path(name)?)?;
    Ok(Reply::Done)
}

pub(super) fn filesystem(name: &[u8]) -> Outcome {
    Ok(Reply::Fields(figures(&statvfs(path(name)?)?)))
}

/// As `PROTOCOL` of OpenSSH has them (3.4).
fn figures(of: &StatVfs) -> Vec<u8> {
    let flags = of.f_flag.bits() & 3;
    let mut figures = Vec::new();
    for figure in [
        of.f_bsize,
        of.f_frsize,
        of.f_blocks,
        of.f_bfree,
        of.f_bavail,
        of.f_files,
        of.f_ffree,
        of.f_favail,
        of.f_fsid,
        flags,
        of.f_namemax,
    ] {
        figures.put_long(figure);
    }
    figures
}
