//! A directory below which every path is resolved.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// What is opened only to find something below it, or to look at it.
#[cfg(target_os = "linux")]
pub(super) const LOOK: OFlags = OFlags::PATH;
#[cfg(not(target_os = "linux"))]
pub(super) const LOOK: OFlags = OFlags::RDONLY;

/// How a path is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confine {
    /// As a process sees it whose root is the directory: `..` and absolute links end at it.
    InRoot,
    /// What would leave the directory is an error.
    Beneath,
}

/// A directory below which every path is resolved.
#[derive(Debug)]
pub struct Base {
    directory: OwnedFd,
    confine: Confine,
}

impl Base {
    /// A base at `directory`, which is opened as the calling process sees it.
    ///
    /// # Errors
    /// If it is not there or is no directory.
    pub fn open(directory: &Path, confine: Confine) -> io::Result<Self> {
        let flags = LOOK | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { directory: rustix::fs::open(directory, flags, Mode::empty())?, confine })
    }

    /// A base at the directory `path` below another base.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve); `ENOTDIR`.
    pub fn open_below(other: &Self, path: &Path) -> io::Result<Self> {
        Ok(Self { directory: other.directory(path)?, confine: other.confine })
    }

    /// Opens `path` below the base. With `O_NOFOLLOW` the last part is not followed.
    ///
    /// # Errors
    /// `EXDEV` where `path` leads out of the base (`Beneath` only), else as openat2(2).
    pub fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let relative = path.strip_prefix("/").unwrap_or(path);
        let path = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        confined(self.directory.as_fd(), path, flags | OFlags::CLOEXEC, self.confine)
    }

    /// Opens the directory `path` below the base.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve); `ENOTDIR`.
    pub fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, LOOK | OFlags::DIRECTORY)
    }
}

#[cfg(target_os = "linux")]
fn confined(base: BorrowedFd<'_>, path: &Path, flags: OFlags, confine: Confine) -> io::Result<OwnedFd> {
    use rustix::fs::{ResolveFlags, openat2};
    let confine = match confine {
        Confine::InRoot => ResolveFlags::IN_ROOT,
        Confine::Beneath => ResolveFlags::BENEATH,
    };
    // The kernel asks to try again when a rename raced with `..`.
    for _ in 0..64 {
        match openat2(base, path, flags, Mode::empty(), confine | ResolveFlags::NO_MAGICLINKS) {
            Err(rustix::io::Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
    Err(rustix::io::Errno::AGAIN.into())
}

/// Where the kernel cannot confine a path, it is walked part by part, and goes neither up nor through links.
#[cfg(not(target_os = "linux"))]
fn confined(base: BorrowedFd<'_>, path: &Path, flags: OFlags, _: Confine) -> io::Result<OwnedFd> {
    use rustix::fs::openat;
    let on_the_way = LOOK | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut current = openat(base, ".", on_the_way, Mode::empty())?;
    let mut parts = path.components().filter(|part| *part != Component::CurDir).peekable();
    if parts.peek().is_none() {
        return Ok(openat(&current, ".", flags, Mode::empty())?);
    }
    while let Some(part) = parts.next() {
        if part == Component::ParentDir {
            return Err(rustix::io::Errno::XDEV.into());
        }
        let flags = if parts.peek().is_some() { on_the_way } else { flags | OFlags::NOFOLLOW };
        current = openat(&current, part.as_os_str(), flags, Mode::empty())?;
    }
    Ok(current)
}

impl AsFd for Base {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The directory part and the last part of a path, after `.` and doubled slashes are gone. `None` for the root itself
/// and for paths that end in `..`.
pub(super) fn split(path: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut parts: Vec<&std::ffi::OsStr> = Vec::new();
    let mut last_is_name = false;
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                parts.push(name);
                last_is_name = true;
            }
            Component::ParentDir => {
                parts.push("..".as_ref());
                last_is_name = false;
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    let name = parts.pop().filter(|_| last_is_name)?;
    Some((parts.iter().collect(), name.into()))
}
