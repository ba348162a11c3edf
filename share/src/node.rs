//! A file of the host, held by a descriptor that can neither read nor write.
//!
//! Everything that is done to a file is done through the descriptor that the walk to it gave (`O_PATH`), never through
//! a path from the root: whatever is renamed or replaced meanwhile, it is done to that file. Every step of a
//! walk is one name without a slash, looked up in such a descriptor, and the kernel is told to follow nothing.

use std::ffi::CString;
use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;

use crate::qid::Identity;

/// No step leads up, over a symbolic link, or through the links in `/proc` that lead anywhere.
const CONFINED: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// What is asked of `statx`.
const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// A file, directory, symbolic link or anything else of the host.
#[derive(Debug)]
pub(crate) struct HostNode {
    descriptor: OwnedFd,
    pub(crate) identity: Identity,
    pub(crate) kind: FileType,
}

/// What a fid stands for.
#[derive(Debug)]
pub(crate) enum Node {
    Host(HostNode),
    /// The directory around a shared single file. It exists for the guest only, since Linux can mount
    /// nothing but a directory.
    Around,
}

impl Node {
    /// The file of the host; nothing can be done to the directory around a single file.
    pub(crate) fn host(&self) -> Result<&HostNode, Errno> {
        match self {
            Self::Host(node) => Ok(node),
            Self::Around => Err(Errno::PERM),
        }
    }

    pub(crate) fn directory(&self) -> Result<&HostNode, Errno> {
        let node = self.host()?;
        if node.kind == FileType::Directory { Ok(node) } else { Err(Errno::NOTDIR) }
    }
}

/// A name as one step of a walk: without a slash or NUL, neither `.` nor `..`, and short enough for any filesystem.
pub(crate) fn step(name: &[u8]) -> Result<&[u8], Errno> {
    match name {
        b"" => Err(Errno::NOENT),
        b"." | b".." => Err(Errno::INVAL),
        _ if name.len() > 255 => Err(Errno::NAMETOOLONG),
        _ if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Errno::INVAL),
        _ => Ok(name),
    }
}

pub(crate) fn statx_of(descriptor: BorrowedFd<'_>) -> Result<Statx, Errno> {
    statx(descriptor, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, WANTED)
}

pub(crate) fn kind_of(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

impl HostNode {
    /// Holds what `descriptor` is open on.
    pub(crate) fn new(descriptor: OwnedFd) -> Result<(Self, Statx), Errno> {
        let stat = statx_of(descriptor.as_fd())?;
        let node = Self { descriptor, identity: Identity::of(&stat), kind: kind_of(&stat) };
        Ok((node, stat))
    }

    /// The file of this name in this directory. A symbolic link is what is found, not what it points to.
    pub(crate) fn child(&self, name: &[u8]) -> Result<(Self, Statx), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Self::new(openat2(&self.descriptor, step(name)?, flags, Mode::empty(), CONFINED)?)
    }

    /// Makes a regular file of this name, which must not exist, and opens it.
    pub(crate) fn create(&self, name: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat2(&self.descriptor, step(name)?, flags, mode, CONFINED)
    }

    /// Whether that name in this directory is still `node`.
    pub(crate) fn still_has(&self, name: &[u8], node: &Self) -> Result<(), Errno> {
        let (found, _) = self.child(name)?;
        if found.identity == node.identity { Ok(()) } else { Err(Errno::STALE) }
    }

    pub(crate) fn stat(&self) -> Result<Statx, Errno> {
        statx_of(self.descriptor.as_fd())
    }

    /// Opens this very file for more than being known. Regular files and directories only: to open a
    /// device, a pipe or a socket of the host does something there, or waits.
    pub(crate) fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        match self.kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::PERM),
        }
        // Some files of procfs wait for data, and leases for their holders; a request must not wait for ever.
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::open(self.path(), flags, Mode::empty())
    }

    /// A path to this very file, for the system calls that take no descriptor, or none of this kind. The last step is a
    /// link that the kernel follows to the file itself, and not further if that is a symbolic link.
    pub(crate) fn path(&self) -> CString {
        let mut path = String::with_capacity(24);
        // Writing to a string does not fail, and there is no NUL in a number.
        let _ = write!(path, "/proc/self/fd/{}", self.descriptor.as_raw_fd());
        CString::new(path).unwrap_or_default()
    }
}

impl AsFd for HostNode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_one_name_that_leads_down() {
        let long = [b'a'; 256];
        for (name, expected) in [
            (&b"a"[..], Ok(())),
            (b"...", Ok(())),
            (b"\xff\n", Ok(())),
            (&long[..255], Ok(())),
            (b"", Err(Errno::NOENT)),
            (b".", Err(Errno::INVAL)),
            (b"..", Err(Errno::INVAL)),
            (b"/", Err(Errno::INVAL)),
            (b"a/b", Err(Errno::INVAL)),
            (b"../a", Err(Errno::INVAL)),
            (b"a\0", Err(Errno::INVAL)),
            (&long, Err(Errno::NAMETOOLONG)),
        ] {
            assert_eq!(step(name).map(|_| ()), expected, "{name:?}");
        }
    }

    #[test]
    fn what_is_no_file_or_directory_is_never_opened() {
        for (path, expected) in [("/dev/null", Errno::PERM), ("/proc/self/exe", Errno::LOOP)] {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let (node, _) = HostNode::new(rustix::fs::open(path, flags, Mode::empty()).unwrap()).unwrap();
            assert_eq!(node.open(OFlags::RDONLY).map(|_| ()), Err(expected), "{path}");
        }
    }
}
