//! Open objects of the server.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_contract::Digest;
use kiln_erofs::Nid;

use super::fetches::Fetches;
use crate::objects::{ObjectError, Objects};

/// Objects kept open at once. The kernel keeps what it has read, so that only files being read for the first time
/// matter.
const KEPT: usize = 64;

/// Objects of which those that were read last stay open: whoever has very many files open takes no descriptor for each.
///
/// Who wants one says what is to be done with it. If it is here that is done at once, else when it has been fetched, by
/// another thread: those that answer requests never wait for a network. What cannot be had is told to the log.
pub(super) struct OpenObjects {
    objects: Arc<Objects>,
    fetches: Arc<Fetches>,
    recent: Arc<Mutex<RecentObjects>>,
}

impl OpenObjects {
    pub(super) fn new(objects: Objects) -> Self {
        let objects = Arc::new(objects);
        let fetches = Arc::new(Fetches::of(Arc::clone(&objects)));
        Self { objects, fetches, recent: Arc::default() }
    }

    /// An object for the caller alone.
    pub(super) fn open(
        &self,
        digest: &Digest,
        size: u64,
        then: impl FnOnce(Option<Arc<File>>) + Send + 'static,
    ) {
        match self.objects.open_local(digest, size) {
            Ok(Some(file)) => then(Some(Arc::new(file))),
            Ok(None) => self.fetch(digest, size, then),
            Err(_) => then(None),
        }
    }

    /// The object of an inode. Nothing is locked while it is opened: others read other objects meanwhile.
    pub(super) fn of(
        &self,
        nid: Nid,
        digest: &Digest,
        size: u64,
        then: impl FnOnce(Option<Arc<File>>) + Send + 'static,
    ) {
        let open = lock(&self.recent).get(nid);
        if open.is_some() {
            return then(open);
        }
        let recent = Arc::clone(&self.recent);
        self.open(digest, size, move |file| {
            let kept = file.map(|file| lock(&recent).keep(nid, file));
            then(kept);
        });
    }

    /// An object if it is here. `Ok(None)`: it has to be fetched.
    pub(super) fn local(&self, digest: &Digest, size: u64) -> Result<Option<File>, ObjectError> {
        self.objects.open_local(digest, size)
    }

    /// An object that was not here a moment ago. This returns at once, and never calls `then` itself.
    pub(super) fn fetch(
        &self,
        digest: &Digest,
        size: u64,
        then: impl FnOnce(Option<Arc<File>>) + Send + 'static,
    ) {
        self.fetches.add(digest, size, Box::new(then));
    }
}

fn lock(recent: &Mutex<RecentObjects>) -> MutexGuard<'_, RecentObjects> {
    recent.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Objects that were read last, by inode.
#[derive(Default)]
struct RecentObjects {
    files: HashMap<Nid, Arc<File>>,
    order: VecDeque<Nid>,
}

impl RecentObjects {
    /// The object of an inode, if it is open.
    fn get(&self, nid: Nid) -> Option<Arc<File>> {
        self.files.get(&nid).map(Arc::clone)
    }

    /// Keeps what was opened for an inode; what another thread opened meanwhile stays.
    fn keep(&mut self, nid: Nid, file: Arc<File>) -> Arc<File> {
        if let Some(file) = self.get(nid) {
            return file;
        }
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
