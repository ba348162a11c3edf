//! Open files.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::hash::Hash;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use kiln_contract::Digest;
use kiln_erofs::Nid;
use rustix::io::{Errno, Result};

use super::super::objects::{OpenObjects, read_at};
use super::copy_up::errno;
use super::nodes::Id;

/// Where the bytes of an open file are.
pub(super) enum Source {
    /// In the tree itself.
    Bytes(Cow<'static, [u8]>),
    /// In an object. No descriptor is held for it: the number of files that are open at once is not to be that of the
    /// server's descriptors.
    Object(Object),
    /// In the scratch.
    File(Arc<File>),
}

/// An object that is opened when it is read.
#[derive(Clone)]
pub(super) struct Object {
    pub(super) among: Arc<OpenObjects>,
    pub(super) nid: Nid,
    pub(super) digest: Digest,
    pub(super) size: u64,
}

/// What is read from.
pub(super) enum Opened<'a> {
    Bytes(&'a [u8]),
    File(&'a File),
}

/// An open file.
pub(super) struct Handle {
    /// Replaced when the file is copied up.
    source: RwLock<Source>,
    /// Whether it was opened to be written.
    writes: bool,
}

/// Everything that is open. A number is never given twice.
#[derive(Default)]
pub(super) struct Handles {
    files: RwLock<HashMap<u64, Arc<Handle>>>,
    /// By file.
    of_file: RwLock<HashMap<Id, Vec<u64>>>,
    /// How many were opened to be written.
    writers: AtomicUsize,
    last: AtomicU64,
}

impl Handles {
    fn new_number(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn open(&self, source: Source, id: Id, writes: bool) -> u64 {
        let number = self.new_number();
        self.writers.fetch_add(usize::from(writes), Ordering::AcqRel);
        write(&self.files).insert(number, Arc::new(Handle { source: RwLock::new(source), writes }));
        write(&self.of_file).entry(id).or_default().push(number);
        number
    }

    pub(super) fn get(&self, number: u64) -> Result<Arc<Handle>> {
        read(&self.files).get(&number).cloned().ok_or(Errno::BADF)
    }

    pub(super) fn close(&self, number: u64, id: Id) {
        let closed = write(&self.files).remove(&number);
        self.writers.fetch_sub(usize::from(closed.is_some_and(|handle| handle.writes)), Ordering::AcqRel);
        let mut of_file = write(&self.of_file);
        if let Some(numbers) = of_file.get_mut(&id) {
            numbers.retain(|open| *open != number);
            if numbers.is_empty() {
                of_file.remove(&id);
            }
        }
    }

    /// Whoever reads a file from the tree reads from its copy from now on: all by one descriptor.
    pub(super) fn moved(&self, id: Id, open: impl FnOnce() -> Result<File>) -> Result<()> {
        let handles = self.of(id);
        if handles.is_empty() {
            return Ok(());
        }
        let copy = Arc::new(open()?);
        for handle in handles {
            *handle.source.write().unwrap_or_else(PoisonError::into_inner) = Source::File(Arc::clone(&copy));
        }
        Ok(())
    }

    fn of(&self, id: Id) -> Vec<Arc<Handle>> {
        let numbers = read(&self.of_file).get(&id).cloned().unwrap_or_default();
        numbers.into_iter().filter_map(|number| self.get(number).ok()).collect()
    }

    /// Whether nothing is open.
    pub(super) fn is_empty(&self) -> bool {
        read(&self.files).is_empty()
    }

    /// Whether something, or this file, is open to be written.
    pub(super) fn is_written(&self, id: Option<Id>) -> bool {
        match id {
            None => self.writers.load(Ordering::Acquire) > 0,
            Some(id) => self.of(id).iter().any(|handle| handle.writes),
        }
    }

    /// A descriptor of a file that is open.
    pub(super) fn descriptor(&self, id: Id) -> Result<Option<OwnedFd>> {
        let duplicate = |handle: &Handle| match &*read_lock(&handle.source) {
            Source::File(file) => Some(rustix::io::fcntl_dupfd_cloexec(file, 0)),
            Source::Bytes(_) | Source::Object(_) => None,
        };
        self.of(id).iter().find_map(|handle| duplicate(handle)).transpose()
    }
}

impl Handle {
    /// Hands on what is read from. An object is compared with its digest; if it has to be fetched, another thread hands it on
    /// afterwards.
    pub(super) fn opened(self: &Arc<Self>, then: impl FnOnce(Result<Opened<'_>>) + Send + 'static) {
        let object = match &*read_lock(&self.source) {
            Source::Object(object) => object.clone(),
            Source::Bytes(bytes) => return then(Ok(Opened::Bytes(bytes))),
            Source::File(file) => return then(Ok(Opened::File(file))),
        };
        let handle = Arc::clone(self);
        object.among.of(object.nid, &object.digest, object.size, move |file| {
            // It may have been copied up since.
            match (&*read_lock(&handle.source), &file) {
                (Source::File(copy), _) => then(Ok(Opened::File(copy))),
                (_, Some(file)) => then(Ok(Opened::File(file))),
                // What is wrong with it was told to the log.
                (_, None) => then(Err(Errno::IO)),
            }
        });
    }

    /// Does something with the file of one that is in the scratch.
    pub(super) fn with_file<T>(&self, then: impl FnOnce(&File) -> Result<T>) -> Result<T> {
        match &*read_lock(&self.source) {
            Source::File(file) => then(file),
            Source::Bytes(_) | Source::Object(_) => Err(Errno::BADF),
        }
    }
}

impl Opened<'_> {
    /// Up to `size` bytes, fewer only at the end.
    pub(super) fn read<T>(&self, offset: u64, size: usize, then: impl FnOnce(&[u8]) -> T) -> Result<T> {
        match self {
            Self::Bytes(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let to = from.saturating_add(size).min(bytes.len());
                Ok(then(&bytes[from..to]))
            }
            Self::File(file) => read_at(file, offset, size, then).map_err(|error| errno(&error)),
        }
    }

    /// Where data or a hole begins, from an offset on (lseek(2), `SEEK_DATA` and `SEEK_HOLE`).
    pub(super) fn seek(&self, offset: u64, hole: bool) -> Result<u64> {
        match self {
            Self::Bytes(bytes) if offset >= bytes.len() as u64 => Err(Errno::NXIO),
            Self::Bytes(bytes) => Ok(if hole { bytes.len() as u64 } else { offset }),
            Self::File(file) => {
                use rustix::fs::SeekFrom;
                rustix::fs::seek(file, if hole { SeekFrom::Hole(offset) } else { SeekFrom::Data(offset) })
            }
        }
    }
}

fn read<K: Eq + Hash, V>(lock: &RwLock<HashMap<K, V>>) -> std::sync::RwLockReadGuard<'_, HashMap<K, V>> {
    read_lock(lock)
}

fn read_lock<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
