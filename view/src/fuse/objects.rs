//! Objects, opened for the server.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::Errno;
use kiln_contract::Digest;
use kiln_erofs::{Nid, object_redirect};
use rustix::fs::{Mode, OFlags};

/// The directory of objects. Held open, so that it stays the same wherever the server's namespace goes.
pub(super) struct Objects {
    directory: OwnedFd,
    /// For messages.
    path: PathBuf,
}

impl Objects {
    pub(super) fn new(directory: OwnedFd, path: &Path) -> Self {
        Self { directory, path: path.to_owned() }
    }

    /// Opens an object of the size that the tree says. Its digest is not computed: that is what checks are for.
    pub(super) fn open(&self, digest: &Digest, size: u64) -> Result<File, Errno> {
        let redirect = object_redirect(digest);
        let path = OsStr::from_bytes(&redirect[1..]);
        let report = |why: &dyn std::fmt::Display| {
            let path = self.path.join(path);
            tracing::error!(object = %path.display(), "the object cannot be read: {why}");
            Errno::EIO
        };
        let fd = rustix::fs::openat(&self.directory, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| report(&error))?;
        let file = File::from(fd);
        let found = file.metadata().map_err(|error| report(&error))?.len();
        if found != size {
            return Err(report(&format!("it has {found} bytes instead of {size}")));
        }
        Ok(file)
    }
}

/// Objects kept open at once. The kernel keeps what it has read, so that only files being read for the first time
/// matter.
const KEPT: usize = 64;

/// Objects that were read last, by inode.
#[derive(Default)]
pub(super) struct RecentObjects {
    files: HashMap<Nid, Arc<File>>,
    order: VecDeque<Nid>,
}

impl RecentObjects {
    /// The object of an inode, opened if it is not open.
    pub(super) fn file(
        &mut self,
        nid: Nid,
        open: impl FnOnce() -> Result<File, Errno>,
    ) -> Result<Arc<File>, Errno> {
        if let Some(file) = self.files.get(&nid) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(open()?);
        if self.order.len() >= KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.files.remove(&oldest);
        }
        self.order.push_back(nid);
        self.files.insert(nid, Arc::clone(&file));
        Ok(file)
    }
}

thread_local! {
    /// Of each thread that answers requests; as large as the largest read was.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Reads up to `size` bytes of a file, fewer only at its end, and hands them on.
pub(super) fn read_at<T>(
    file: &File,
    offset: u64,
    size: usize,
    then: impl FnOnce(&[u8]) -> T,
) -> std::io::Result<T> {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let mut filled = 0;
        while filled < size {
            match file.read_at(&mut buffer[filled..size], offset + filled as u64) {
                Ok(0) => break,
                Ok(length) => filled += length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(then(&buffer[..filled]))
    })
}
