//! Something in a scratch, by the name that it has there, or by a descriptor where it has none any more.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Stat, Timestamps, Uid, XattrFlags};
use rustix::io::{Errno, Result};

/// The most bytes that Linux takes or gives for an extended attribute, or for a list of their names (xattr(7)).
const XATTR_MOST: usize = 64 * 1024;

/// Where something is. Symbolic links are never followed.
#[derive(Debug)]
pub(super) struct Place {
    /// The directory (`O_PATH`) that has the name, or the thing itself.
    fd: OwnedFd,
    name: Option<Vec<u8>>,
}

impl Place {
    /// A name in a directory.
    pub(super) fn named(directory: OwnedFd, name: &[u8]) -> Self {
        Self { fd: directory, name: Some(name.to_owned()) }
    }

    /// What was removed, but is still in use.
    pub(super) fn lost(fd: OwnedFd) -> Self {
        Self { fd, name: None }
    }

    /// For system calls that know neither descriptors of `O_PATH` nor directories. With a name, its last part must not
    /// be followed; without, it must.
    fn path(&self) -> Vec<u8> {
        let mut path = format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into_bytes();
        if let Some(name) = &self.name {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        path
    }

    pub(super) fn stat(&self) -> Result<Stat> {
        match &self.name {
            Some(name) => rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW),
            None => rustix::fs::fstat(&self.fd),
        }
    }

    pub(super) fn open(&self, flags: OFlags) -> Result<File> {
        let flags = flags | OFlags::CLOEXEC;
        let fd = match &self.name {
            Some(name) => rustix::fs::openat(&self.fd, name, flags | OFlags::NOFOLLOW, Mode::empty()),
            None => rustix::fs::openat(CWD, self.path(), flags, Mode::empty()),
        };
        fd.map(File::from)
    }

    /// A descriptor (`O_PATH`) that stays when the name goes.
    pub(super) fn hold(&self) -> Result<OwnedFd> {
        match &self.name {
            Some(_) => self.open(OFlags::PATH).map(OwnedFd::from),
            None => rustix::io::fcntl_dupfd_cloexec(&self.fd, 0),
        }
    }

    /// Not for symbolic links, which have no permissions of their own.
    pub(super) fn chmod(&self, mode: u32) -> Result<()> {
        let mode = Mode::from_raw_mode(mode);
        match &self.name {
            Some(name) => rustix::fs::chmodat(&self.fd, name, mode, AtFlags::empty()),
            None => rustix::fs::chmodat(CWD, self.path(), mode, AtFlags::empty()),
        }
    }

    pub(super) fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        match &self.name {
            Some(name) => rustix::fs::chownat(&self.fd, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
            None => rustix::fs::chownat(&self.fd, c"", uid, gid, AtFlags::EMPTY_PATH),
        }
    }

    pub(super) fn set_times(&self, times: &Timestamps) -> Result<()> {
        match &self.name {
            Some(name) => rustix::fs::utimensat(&self.fd, name, times, AtFlags::SYMLINK_NOFOLLOW),
            None => rustix::fs::utimensat(CWD, self.path(), times, AtFlags::empty()),
        }
    }

    pub(super) fn read_link(&self) -> Result<Vec<u8>> {
        let target = match &self.name {
            Some(name) => rustix::fs::readlinkat(&self.fd, name, Vec::new()),
            None => rustix::fs::readlinkat(&self.fd, c"", Vec::new()),
        };
        target.map(std::ffi::CString::into_bytes)
    }

    /// Gives it one more name.
    pub(super) fn link(&self, directory: &OwnedFd, name: &[u8]) -> Result<()> {
        match &self.name {
            Some(own) => rustix::fs::linkat(&self.fd, own, directory, name, AtFlags::empty()),
            None => rustix::fs::linkat(CWD, self.path(), directory, name, AtFlags::SYMLINK_FOLLOW),
        }
    }

    /// `None` if it has none of that name.
    pub(super) fn xattr(&self, name: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut value = vec![0; XATTR_MOST];
        let got = match self.name {
            Some(_) => rustix::fs::lgetxattr(self.path(), name, &mut value[..]),
            None => rustix::fs::getxattr(self.path(), name, &mut value[..]),
        };
        match got {
            Ok(length) => {
                value.truncate(length);
                Ok(Some(value))
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn xattr_names(&self) -> Result<Vec<Vec<u8>>> {
        let mut list = vec![0; XATTR_MOST];
        let length = match self.name {
            Some(_) => rustix::fs::llistxattr(self.path(), &mut list[..]),
            None => rustix::fs::listxattr(self.path(), &mut list[..]),
        };
        let length = match length {
            Err(Errno::OPNOTSUPP) => 0,
            other => other?,
        };
        let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
        Ok(names.map(<[u8]>::to_vec).collect())
    }

    pub(super) fn set_xattr(&self, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<()> {
        match self.name {
            Some(_) => rustix::fs::lsetxattr(self.path(), name, value, flags),
            None => rustix::fs::setxattr(self.path(), name, value, flags),
        }
    }

    pub(super) fn remove_xattr(&self, name: &[u8]) -> Result<()> {
        match self.name {
            Some(_) => rustix::fs::lremovexattr(self.path(), name),
            None => rustix::fs::removexattr(self.path(), name),
        }
    }
}
