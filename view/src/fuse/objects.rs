//! Open objects of the server.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use kiln_erofs::Nid;
use memmap2::Mmap;

/// Objects kept open at once. The kernel keeps what it has read, so that only files being read for the first time
/// matter.
const KEPT: usize = 64;

/// Smaller objects, in bytes, are read: mapping one costs as much as copying that.
const MAPPED: u64 = 128 << 10;

/// An object that is being read.
#[derive(Debug)]
pub(super) struct OpenObject {
    file: File,
    /// Its bytes, from which the kernel copies them to who reads without their being copied here first.
    mapped: OnceLock<Option<Mmap>>,
}

impl From<File> for OpenObject {
    fn from(file: File) -> Self {
        Self { file, mapped: OnceLock::new() }
    }
}

impl OpenObject {
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Up to `size` bytes, fewer only at the end.
    pub(super) fn read<T>(&self, offset: u64, size: usize, then: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
        if let Some(bytes) = self.mapped.get_or_init(|| self.map().ok().flatten())
            // Objects do not change. One that is cut off all the same must not end this process.
            && self.file.metadata()?.len() >= bytes.len() as u64
        {
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            let to = from.saturating_add(size).min(bytes.len());
            return Ok(then(&bytes[from..to]));
        }
        read_at(&self.file, offset, size, then)
    }

    fn map(&self) -> io::Result<Option<Mmap>> {
        if self.file.metadata()?.len() < MAPPED {
            return Ok(None);
        }
        // SAFETY: objects are never written to once they are in the store, and their length is looked at before each use.
        unsafe { Mmap::map(&self.file) }.map(Some)
    }
}

/// Objects that were read last, by inode.
#[derive(Default)]
pub(super) struct RecentObjects {
    files: HashMap<Nid, Arc<OpenObject>>,
    order: VecDeque<Nid>,
}

impl RecentObjects {
    /// The object of an inode, if it is open.
    pub(super) fn get(&self, nid: Nid) -> Option<Arc<OpenObject>> {
        self.files.get(&nid).map(Arc::clone)
    }

    /// Keeps what was opened for an inode; what another thread opened meanwhile stays.
    pub(super) fn keep(&mut self, nid: Nid, file: File) -> Arc<OpenObject> {
        if let Some(file) = self.get(nid) {
            return file;
        }
        let file = Arc::new(OpenObject::from(file));
        if self.order.len() >= KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.files.remove(&oldest);
        }
        self.order.push_back(nid);
        self.files.insert(nid, Arc::clone(&file));
        file
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
) -> io::Result<T> {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let mut filled = 0;
        while filled < size {
            match file.read_at(&mut buffer[filled..size], offset + filled as u64) {
                Ok(0) => break,
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(then(&buffer[..filled]))
    })
}
