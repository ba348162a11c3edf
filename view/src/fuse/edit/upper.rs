//! A scratch on disk, in overlayfs form (`Documentation/filesystems/overlayfs.rst`):
//!
//! - what was changed or made lies in the upper directory under its own path;
//! - a removed name is a character device 0:0, a *whiteout*;
//! - a directory with the mark `opaque` = `y` shows nothing of what lies below it;
//! - a directory with the mark `redirect` shows what lies below the named path instead of below its own.
//!
//! Marks are xattrs beginning with `trusted.overlay.`, or `user.overlay.` for those who may not have the former.
//! Everything is made whole in the work directory and then gets its place by one rename(2), so that whoever is killed at
//! whatever moment leaves either the old state or the new one, and in the work directory what the next one sweeps.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_contract::{BackendError, ErrorKind, Scratch};
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Timespec,
    Timestamps, UTIME_OMIT, XattrFlags,
};
use rustix::io::{Errno, Result};

use super::place::Place;

/// Longer paths are walked in pieces: Linux takes 4096 bytes at once.
const PATH_PIECE: usize = 2048;

const DIRECTORY: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The two directories of a scratch.
#[derive(Debug)]
pub(in crate::fuse) struct Upper {
    root: OwnedFd,
    /// Locked: one server at a time.
    work: OwnedFd,
    prefix: &'static [u8],
    made: AtomicU64,
    /// Whether what is copied must be on the disk before it takes its place.
    durable: bool,
}

impl Upper {
    /// Opens a scratch for one server, and sweeps what a killed one left.
    ///
    /// # Errors
    /// It is not there, is in use, or lies on a file system that cannot hold one.
    pub(in crate::fuse) fn open(scratch: &Scratch, trusted: bool) -> std::result::Result<Self, BackendError> {
        let cannot = |what: &str, path: &Path, why: io::Error| {
            BackendError::caused(format!("cannot {what} {}", path.display()), why)
        };
        let open = |path: &Path, flags| {
            rustix::fs::open(path, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| cannot("open", path, error.into()))
        };
        let root = open(&scratch.upper, OFlags::PATH)?;
        let work = open(&scratch.work, OFlags::RDONLY)?;
        match rustix::fs::flock(&work, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let what = format!("the scratch {} is in use by another view", scratch.upper.display());
                return Err(BackendError::new(ErrorKind::State, what));
            }
            Err(error) => return Err(cannot("lock", &scratch.work, error.into())),
        }
        let prefix: &[u8] = if trusted { b"trusted.overlay." } else { b"user.overlay." };
        let upper = Self { root, work, prefix, made: AtomicU64::new(0), durable: !scratch.volatile };
        upper.sweep().map_err(|error| cannot("sweep", &scratch.work, error))?;
        upper.probe().map_err(|error| {
            cannot("keep changes in", &scratch.upper, error.into())
                .of_kind(ErrorKind::Unsupported)
                .hint("it must lie on a file system with whiteouts and extended attributes, such as ext4, XFS, btrfs or tmpfs")
        })?;
        Ok(upper)
    }

    /// The descriptors that a server must keep.
    pub(in crate::fuse) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.root.as_fd(), self.work.as_fd()]
    }

    fn sweep(&self) -> io::Result<()> {
        let work = format!("/proc/self/fd/{}", self.work.as_raw_fd());
        for entry in std::fs::read_dir(work)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Whether this file system can hold a scratch at all: better told now than at the first change.
    fn probe(&self) -> Result<()> {
        let (directory, file) = (self.new_name(), self.new_name());
        rustix::fs::mkdirat(&self.work, &directory, Mode::RWXU)?;
        let tried = self
            .mark(&Place::named(self.work_again()?, &directory), "opaque", b"y")
            .and_then(|()| self.whiteout(self.work(), &file))
            .and_then(|()| self.exchange(self.work(), &file, self.work(), &directory));
        self.discard(&directory);
        self.discard(&file);
        tried
    }

    pub(super) fn work(&self) -> &OwnedFd {
        &self.work
    }

    /// The work directory, for a [`Place`] in it.
    pub(super) fn work_again(&self) -> Result<OwnedFd> {
        rustix::io::fcntl_dupfd_cloexec(&self.work, 0)
    }

    pub(super) fn durable(&self) -> bool {
        self.durable
    }

    pub(super) fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// A name in the work directory that nothing has.
    pub(super) fn new_name(&self) -> Vec<u8> {
        format!("#{}", self.made.fetch_add(1, Ordering::Relaxed)).into_bytes()
    }

    /// A directory of the scratch by its path there (`O_PATH`).
    pub(super) fn directory(&self, path: &[u8]) -> Result<OwnedFd> {
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let mut here = rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?;
        let mut rest = path;
        while !rest.is_empty() {
            let end = if rest.len() <= PATH_PIECE {
                rest.len()
            } else {
                let cut = rest[..PATH_PIECE].iter().rposition(|byte| *byte == b'/');
                cut.ok_or(Errno::NAMETOOLONG)? + 1
            };
            here = rustix::fs::openat2(&here, &rest[..end], DIRECTORY, Mode::empty(), inside)?;
            rest = &rest[end..];
        }
        Ok(here)
    }

    pub(super) fn whiteout(&self, directory: &OwnedFd, name: &[u8]) -> Result<()> {
        rustix::fs::mknodat(directory, name, FileType::CharacterDevice, Mode::empty(), 0)
    }

    /// Sets a mark of overlayfs on a directory.
    pub(super) fn mark(&self, place: &Place, name: &str, value: &[u8]) -> Result<()> {
        place.set_xattr(&[self.prefix, name.as_bytes()].concat(), value, XattrFlags::empty())
    }

    pub(super) fn read_mark(&self, place: &Place, name: &str) -> Result<Option<Vec<u8>>> {
        place.xattr(&[self.prefix, name.as_bytes()].concat())
    }

    /// The name on disk of an xattr that a program sees: what looks like a mark is escaped as overlayfs does.
    pub(super) fn stored_xattr(&self, name: &[u8]) -> Vec<u8> {
        match name.strip_prefix(self.prefix) {
            Some(rest) => [self.prefix, b"overlay.", rest].concat(),
            None => name.to_owned(),
        }
    }

    /// The inverse; `None` for marks.
    pub(super) fn shown_xattr(&self, stored: &[u8]) -> Option<Vec<u8>> {
        match stored.strip_prefix(self.prefix) {
            Some(rest) => rest.strip_prefix(b"overlay.").map(|rest| [self.prefix, rest].concat()),
            None => Some(stored.to_owned()),
        }
    }

    /// Swaps two names at once.
    pub(super) fn exchange(&self, a: &OwnedFd, a_name: &[u8], b: &OwnedFd, b_name: &[u8]) -> Result<()> {
        rustix::fs::renameat_with(a, a_name, b, b_name, RenameFlags::EXCHANGE)
    }

    /// Puts a whiteout in the place of something, at once, and removes that.
    pub(super) fn cover(&self, directory: &OwnedFd, name: &[u8]) -> Result<()> {
        let temporary = self.new_name();
        self.whiteout(&self.work, &temporary)?;
        let covered = self.opened(directory, name, || self.exchange(&self.work, &temporary, directory, name));
        self.discard(&temporary);
        covered
    }

    /// Moves a directory to another one, or out of it. Who is not root must have write permission on it for that, which it
    /// gets where it lacks it.
    pub(super) fn opened<T>(
        &self,
        directory: &OwnedFd,
        name: &[u8],
        change: impl Fn() -> Result<T>,
    ) -> Result<T> {
        match change() {
            Err(Errno::ACCESS) => {
                rustix::fs::chmodat(directory, name, Mode::RWXU, AtFlags::empty())?;
                change()
            }
            other => other,
        }
    }

    /// Removes something of the work directory: a file, or a directory with nothing but whiteouts. What fails is left for
    /// the next sweep.
    pub(super) fn discard(&self, name: &[u8]) {
        let removed = rustix::fs::unlinkat(&self.work, name, AtFlags::empty());
        if let Err(Errno::ISDIR | Errno::PERM) = removed {
            let _ = rustix::fs::chmodat(&self.work, name, Mode::RWXU, AtFlags::empty());
            let own = format!("/proc/self/fd/{}/", self.work.as_raw_fd()).into_bytes();
            let path = [&own[..], name].concat();
            if let Err(error) = std::fs::remove_dir_all(OsStr::from_bytes(&path)) {
                tracing::warn!(%error, "a removed directory is left in the scratch's work directory");
            }
        }
    }

    /// Does something in a directory that its user must not see as a change of it.
    pub(super) fn unnoticed<T>(&self, directory: &OwnedFd, change: impl Fn() -> Result<T>) -> Result<T> {
        let before = rustix::fs::fstat(directory)?;
        let again = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let done = match change() {
            // Who may change a file in a directory that may not be changed itself: its server, without privileges.
            Err(Errno::ACCESS) => {
                let mode = Mode::from_raw_mode(before.st_mode);
                rustix::fs::chmodat(CWD, &*again, mode | Mode::RWXU, AtFlags::empty())?;
                let done = change();
                rustix::fs::chmodat(CWD, &*again, mode, AtFlags::empty())?;
                done
            }
            other => other,
        };
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: before.st_mtime, tv_nsec: before.st_mtime_nsec as _ },
        };
        let _ = rustix::fs::utimensat(CWD, &*again, &times, AtFlags::empty());
        done
    }
}

pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}
