//! Objects on their way into the store: hashed and written on several threads, each once.

mod host_file;
mod queue;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Cursor, Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kiln_contract::{Digest, Hasher};
use kiln_erofs::Data;
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::error::{Context as _, is_full};
use crate::format::{Layout, OBJECT_MODE, SOUND, object_name};
use crate::{Result, StoreError};
use host_file::HostFile;
use queue::Worker;

pub(crate) use host_file::HostDirectory;
pub(crate) use queue::{Job, Piece, Queue, SeenFile, SmallFile};

/// Threads that create files in one directory wait for each other; and ext4 looks for free inodes near the directory,
/// which takes it long where many were freed a moment ago. But removing a directory that is on the disk costs
/// milliseconds: the first objects lie in the staging directory itself, so that small imports need no other.
const STAGING_DIRECTORIES: u8 = 4;
const FLAT_OBJECTS: usize = 64;

/// An object of at most so many bytes is kept until its layer's tar is made, and all together are at most so many.
const KEPT: usize = 16 << 10;
const ALL_KEPT: usize = 32 << 20;

/// The contents of files, by slot.
#[derive(Debug, Default)]
pub(crate) struct StoredFiles {
    pub(crate) files: Vec<(u32, Data)>,
    /// Files of the host that were changed after the walker had seen them.
    pub(crate) changed: Vec<(u32, Box<HostFile>)>,
}

/// The objects of one import, staged.
#[derive(Debug)]
pub(crate) struct ObjectWriter<'s> {
    layout: &'s Layout,
    objects: OwnedFd,
    staging: OwnedFd,
    /// Where each object lies below `staging`.
    staged: Mutex<HashMap<Digest, Place>>,
    /// Objects that are written even if there is a file of that name: it is damaged.
    rewrite: &'s BTreeSet<Digest>,
    /// Whether the process's umask takes something from the mode of objects.
    umask_interferes: OnceLock<bool>,
    /// Once the disk is full, nothing more is written; but what would have been is counted.
    full: AtomicBool,
    new_bytes: AtomicU64,
    needed_bytes: AtomicU64,
    kept: Mutex<Kept>,
}

impl<'s> ObjectWriter<'s> {
    /// Stages objects in the directory `staging`.
    pub(crate) fn new(layout: &'s Layout, staging: &Path, rewrite: &'s BTreeSet<Digest>) -> Result<Self> {
        let open = |path: &Path| {
            rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .doing("open", path)
        };
        Ok(Self {
            objects: open(&layout.objects())?,
            staging: open(staging)?,
            layout,
            staged: Mutex::default(),
            rewrite,
            umask_interferes: OnceLock::new(),
            full: AtomicBool::new(false),
            new_bytes: AtomicU64::new(0),
            needed_bytes: AtomicU64::new(0),
            kept: Mutex::default(),
        })
    }

    /// Takes jobs until the queue is closed and empty. Returns the content of each file by its slot.
    pub(crate) fn work(&self, queue: &Queue) -> Result<StoredFiles> {
        let _worker = Worker(queue);
        let mut stored = StoredFiles::default();
        while let Some(job) = queue.pop() {
            if let Err(error) = self.job(job, &mut stored) {
                queue.fail();
                return Err(error);
            }
        }
        Ok(stored)
    }

    fn job(&self, job: Job, stored: &mut StoredFiles) -> Result<()> {
        match job {
            Job::Small(files) => {
                for file in files {
                    let slices: Vec<&[u8]> = file.slices.iter().map(|slice| &**slice).collect();
                    stored.files.push((file.slot, self.put(&slices)?));
                }
            }
            Job::Stream { slot, pieces } => {
                if let Some(data) = self.stream(slot, &pieces)? {
                    stored.files.push((slot, data));
                }
            }
            Job::HostFiles { directory, files } => {
                let mut buffer = Vec::new();
                for file in files {
                    let (data, now) = self.host_file(&directory, &file, &mut buffer)?;
                    stored.files.push((file.slot, data));
                    stored.changed.extend(now.map(|now| (file.slot, now)));
                }
            }
        }
        Ok(())
    }

    /// Stages an object that is in memory, unless the store has it.
    fn put(&self, slices: &[&[u8]]) -> Result<Data> {
        let mut hasher = Hasher::new();
        slices.iter().for_each(|slice| hasher.update(slice));
        let digest = hasher.finish();
        let size = slices.iter().map(|slice| slice.len() as u64).sum();
        if let Some(place) = self.place_if_new(&digest, size)
            && !self.is_full()
        {
            let name = place.name(&digest);
            let written = self.create(&name).and_then(|mut file| {
                slices.iter().try_for_each(|slice| file.write_all(slice))?;
                mark_sound(&file)
            });
            self.settle(&name, written)?;
        }
        Ok(Data::Object { digest, size })
    }

    /// Stages an object of which the layer's tar is going to be made soon.
    fn put_and_keep(&self, bytes: &[u8]) -> Result<Data> {
        let data = self.put(&[bytes])?;
        if let Data::Object { digest, .. } = &data
            && bytes.len() <= KEPT
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.bytes + bytes.len() <= ALL_KEPT && kept.objects.insert(*digest, bytes.into()).is_none() {
                kept.bytes += bytes.len();
            }
        }
        Ok(data)
    }

    /// Stages an object that comes in pieces. `None` if its stream broke off: somebody else has an error to tell.
    fn stream(&self, slot: u32, pieces: &Receiver<Piece>) -> Result<Option<Data>> {
        let mut incoming = self.incoming(slot)?;
        loop {
            match pieces.recv() {
                Ok(Piece::Data(slice)) => incoming.data(&slice)?,
                Ok(Piece::Zeros(length)) => incoming.zeros(length),
                Ok(Piece::End) => return incoming.end().map(Some),
                Err(_) => return Ok(None),
            }
        }
    }

    fn incoming(&self, slot: u32) -> Result<Incoming<'_, 's>> {
        let name = format!("stream-{slot}");
        let mut file = None;
        if !self.is_full() {
            match self.create(&name) {
                Ok(created) => file = Some(created),
                Err(error) => self.settle(&name, Err(error))?,
            }
        }
        Ok(Incoming { writer: self, name, file, hole: 0, hasher: Hasher::new(), size: 0 })
    }

    /// Where an object is to be written, if it is neither in the store nor staged. It counts as staged from now on.
    fn place_if_new(&self, digest: &Digest, size: u64) -> Option<Place> {
        let place = {
            let mut staged = self.staged();
            if staged.contains_key(digest) {
                return None;
            }
            let place = Place::of(digest, staged.len());
            staged.insert(*digest, place);
            place
        };
        // Asked second: a thread that gets here is the only one that asks for this object.
        let there = !self.rewrite.contains(digest)
            && rustix::fs::statat(&self.objects, object_name(digest), AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| stat.st_size as u64 == size);
        if there {
            self.staged().remove(digest);
            return None;
        }
        self.new_bytes.fetch_add(size, Ordering::Relaxed);
        self.needed_bytes.fetch_add(size.next_multiple_of(4096), Ordering::Relaxed);
        Some(place)
    }

    fn staged(&self) -> MutexGuard<'_, HashMap<Digest, Place>> {
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something in the staging directory, after making the directory that `name` is in if that is missing.
    fn with_directory<T>(&self, name: &str, act: impl Fn() -> rustix::io::Result<T>) -> std::io::Result<T> {
        match (act(), name.split_once('/')) {
            (Err(Errno::NOENT), Some((directory, _))) => {
                match rustix::fs::mkdirat(&self.staging, directory, Mode::from_raw_mode(0o700)) {
                    Ok(()) | Err(Errno::EXIST) => Ok(act()?),
                    Err(error) => Err(error.into()),
                }
            }
            (done, _) => Ok(done?),
        }
    }

    fn create(&self, name: &str) -> std::io::Result<File> {
        let mode = Mode::from_raw_mode(OBJECT_MODE as rustix::fs::RawMode);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = self.with_directory(name, || rustix::fs::openat(&self.staging, name, flags, mode))?;
        let interferes = match self.umask_interferes.get() {
            Some(interferes) => *interferes,
            None => {
                let made = Mode::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
                *self.umask_interferes.get_or_init(|| made != mode)
            }
        };
        if interferes {
            rustix::fs::fchmod(&file, mode)?;
        }
        Ok(file.into())
    }

    /// A full disk is noted, and what was half-written removed; any other error is one.
    fn settle(&self, name: &str, written: std::io::Result<()>) -> Result<()> {
        match written {
            Err(error) if is_full(&error) => {
                self.full.store(true, Ordering::Relaxed);
                let _ = rustix::fs::unlinkat(&self.staging, name, AtFlags::empty());
                Ok(())
            }
            written => written.doing("write an object in", self.layout.tmp()),
        }
    }

    /// Whether the disk was full at some time.
    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// The number of new objects, their bytes, and the bytes that they take on the disk.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        let staged = self.staged().len() as u64;
        (staged, self.new_bytes.load(Ordering::Relaxed), self.needed_bytes.load(Ordering::Relaxed))
    }

    /// Makes the staged objects visible. They have to be on the disk.
    pub(crate) fn publish(&self) -> Result<()> {
        let staged = self.staged();
        for (digest, place) in staged.iter() {
            let (from, to) = (place.name(digest), object_name(digest));
            let rename = || rustix::fs::renameat(&self.staging, &from, &self.objects, &to);
            let mut renamed = rename();
            if renamed == Err(Errno::NOENT) {
                match rustix::fs::mkdirat(&self.objects, &to[..2], Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => renamed = rename(),
                    Err(error) => return Err(error).doing("create", self.layout.objects().join(&to[..2])),
                }
            }
            renamed.doing("rename to", self.layout.object(digest))?;
        }
        Ok(())
    }

    /// Reads an object that is staged or in the store.
    pub(crate) fn open(&self, digest: &Digest) -> Result<ObjectReader> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).objects.get(digest).cloned();
        if let Some(bytes) = kept {
            return Ok(ObjectReader::Kept(Cursor::new(bytes)));
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let place = self.staged().get(digest).copied();
        let opened = match place {
            Some(place) => rustix::fs::openat(&self.staging, place.name(digest), flags, Mode::empty()),
            None => rustix::fs::openat(&self.objects, object_name(digest), flags, Mode::empty()),
        };
        match opened {
            Ok(file) => Ok(ObjectReader::File(file.into())),
            Err(Errno::NOENT) => Err(StoreError::Missing { what: "object", digest: *digest }),
            Err(error) => Err(error).doing("open", self.layout.object(digest)),
        }
    }
}

/// Says that the file of an object is what the store wrote ([`SOUND`]).
fn mark_sound(file: &File) -> std::io::Result<()> {
    let time = Timespec { tv_sec: SOUND, tv_nsec: 0 };
    Ok(rustix::fs::futimens(file, &Timestamps { last_access: time, last_modification: time })?)
}

/// Objects that are read again soon.
#[derive(Debug, Default)]
struct Kept {
    objects: HashMap<Digest, Arc<[u8]>>,
    bytes: usize,
}

/// The bytes of an object, from its beginning.
#[derive(Debug)]
pub(crate) enum ObjectReader {
    Kept(Cursor<Arc<[u8]>>),
    File(File),
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Kept(bytes) => bytes.read(buffer),
            Self::File(file) => file.read(buffer),
        }
    }
}

/// An object whose digest is not known yet.
struct Incoming<'w, 's> {
    writer: &'w ObjectWriter<'s>,
    name: String,
    /// None once the disk is full.
    file: Option<File>,
    /// Zeros that have not been written yet, and need not be.
    hole: u64,
    hasher: Hasher,
    size: u64,
}

impl Incoming<'_, '_> {
    fn data(&mut self, data: &[u8]) -> Result<()> {
        self.hasher.update(data);
        self.size += data.len() as u64;
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut write = || {
            if self.hole > 0 {
                file.seek(SeekFrom::Current(self.hole as i64))?;
                self.hole = 0;
            }
            file.write_all(data)
        };
        let written = write();
        if written.is_err() {
            self.file = None;
            self.writer.settle(&self.name, written)?;
        }
        Ok(())
    }

    fn zeros(&mut self, length: u64) {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut left = length;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..part as usize]);
            left -= part;
        }
        self.size += length;
        self.hole += length;
    }

    fn discard(self) -> Result<()> {
        match self.file {
            Some(_) => rustix::fs::unlinkat(&self.writer.staging, &self.name, AtFlags::empty())
                .doing("remove", self.writer.layout.tmp()),
            None => Ok(()),
        }
    }

    fn end(self) -> Result<Data> {
        let (writer, size, name) = (self.writer, self.size, self.name);
        let digest = self.hasher.finish();
        let had_file = self.file.is_some();
        if let Some(file) = self.file {
            let lengthened = if self.hole > 0 { file.set_len(size) } else { Ok(()) };
            writer.settle(&name, lengthened.and_then(|()| mark_sound(&file)))?;
        }
        let place = writer.place_if_new(&digest, size);
        if had_file && !writer.is_full() {
            let staging = &writer.staging;
            match place {
                Some(place) => {
                    let to = place.name(&digest);
                    writer
                        .with_directory(&to, || rustix::fs::renameat(staging, &name, staging, &to))
                        .doing("rename", writer.layout.tmp())?;
                }
                None => {
                    rustix::fs::unlinkat(staging, &name, AtFlags::empty())
                        .doing("remove", writer.layout.tmp())?;
                }
            }
        }
        Ok(Data::Object { digest, size })
    }
}

/// A directory below the staging directory; none is the staging directory itself.
#[derive(Debug, Clone, Copy)]
struct Place(Option<u8>);

impl Place {
    fn of(digest: &Digest, staged: usize) -> Self {
        Self((staged >= FLAT_OBJECTS).then_some(digest.as_bytes()[0] % STAGING_DIRECTORIES))
    }

    fn name(self, digest: &Digest) -> String {
        match self.0 {
            Some(directory) => format!("{directory}/{}", digest.hex()),
            None => digest.hex(),
        }
    }
}
