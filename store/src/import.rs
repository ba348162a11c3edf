//! Tars become layers, in one pass.
//!
//! ```text
//! caller   reads the stream into chunks, finds headers and files in them
//!   ├─→ digest thread   hashes every chunk; compresses what is no file content into the split stream
//!   └─→ workers         hash files and write them to the staging directory, each object once
//! ```
//! Chunks are shared, never copied; their number bounds the memory. When the stream is at its end the tree is written,
//! everything is put on the disk by one `syncfs`, and renamed into place.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use kiln_contract::{Digest, Hasher};
use kiln_erofs::{Content, Data, Tree};

use crate::chunk::Chunk;
use crate::error::{Context as _, is_full};
use crate::format::Layout;
use crate::layer_reader::{LayerReader, ReadLayer};
use crate::limits::ImportLimits;
use crate::object_writer::{ObjectWriter, Queue, StoredFiles};
use crate::split::{self, SplitWriter};
use crate::staging::Staging;
use crate::{Result, Store, StoreError};

/// A layer that was brought into the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedLayer {
    /// Its identity: the digest of its tree.
    pub layer: Digest,
    /// The digest of its uncompressed tar.
    pub diff_id: Digest,
    /// The length of that tar.
    pub tar_size: u64,
    /// Entries of the tar, or nodes of the directory.
    pub entries: u64,
    /// Bytes of the objects that the store did not have before.
    pub new_object_bytes: u64,
}

/// So many objects are put on the disk while the layer's tar is made.
const MANY: u64 = 256;

/// What goes to the digest thread.
pub(crate) enum Message {
    /// The next part of the tar.
    Chunk(Arc<Chunk>),
    /// The next bytes that are no file content.
    Literals(Vec<u8>),
}

impl Store {
    /// Reads one uncompressed tar as a layer.
    ///
    /// The tar is read as a stream, in bounded memory, by the calling thread; others hash and write. Nothing is visible
    /// before all of it is on the disk, which one `syncfs` sees to. Objects that the store has are not written again.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`] if `expected` is given and the tar has another digest;
    /// [`StoreError::Tar`] and [`StoreError::Entry`] for archives that are damaged or hostile;
    /// [`StoreError::TooLarge`] beyond `limits`; [`StoreError::DiskFull`]. Nothing is kept then.
    pub fn import_tar(
        &self,
        tar: impl Read + Send,
        expected: Option<&Digest>,
        limits: ImportLimits,
    ) -> Result<ImportedLayer> {
        self.import_tar_replacing(tar, expected, limits, &self.known_damage()?)
    }

    /// As [`Store::import_tar`], but puts what it makes in the place of what is damaged.
    pub(crate) fn import_tar_replacing(
        &self,
        tar: impl Read,
        expected: Option<&Digest>,
        limits: ImportLimits,
        replaced: &Replaced,
    ) -> Result<ImportedLayer> {
        let staged = StagedLayer::new(self, replaced)?;
        let read = staged.read_tar(tar, expected, limits)?;
        staged.publish(&read)
    }
}

/// What an import must not take for good although it is there.
#[derive(Debug, Default)]
pub(crate) struct Replaced {
    /// Objects.
    pub(crate) objects: BTreeSet<Digest>,
    /// The layer's split stream, and where it is.
    pub(crate) split: Option<(Digest, PathBuf)>,
    /// Split streams whose word on which tar they are of does not count.
    pub(crate) splits: BTreeSet<PathBuf>,
}

/// A layer on its way in.
pub(crate) struct StagedLayer<'s> {
    store: &'s Store,
    replaced: &'s Replaced,
    objects: ObjectWriter<'s>,
    // Last: it is removed after everything in it is closed.
    staging: Staging,
}

/// A layer that is complete but not visible.
struct NewLayer {
    tree: Tree,
    diff_id: Digest,
    tar_size: u64,
    entries: u64,
}

impl<'s> StagedLayer<'s> {
    pub(crate) fn new(store: &'s Store, replaced: &'s Replaced) -> Result<Self> {
        let staging = Staging::new(&store.layout)?;
        let objects = ObjectWriter::new(&store.layout, &staging.path(""), &replaced.objects)?;
        Ok(Self { store, replaced, objects, staging })
    }

    pub(crate) fn objects(&self) -> &ObjectWriter<'s> {
        &self.objects
    }

    fn read_tar(&self, tar: impl Read, expected: Option<&Digest>, limits: ImportLimits) -> Result<NewLayer> {
        let queue = Queue::new();
        let (sender, receiver) = sync_channel(128);
        let split = SplitWriter::create(&self.staging.path("split"));
        let (read, hashed, worked) = thread::scope(|scope| {
            let hasher = scope.spawn(move || digest_thread(&receiver, split));
            let workers = self.spawn_workers(scope, &queue);
            let mut reader = LayerReader::new(tar, sender, &queue, limits);
            let mut read = reader.read();
            if matches!(read, Err(StoreError::Tar { .. } | StoreError::Entry { .. })) && expected.is_some() {
                // A tar that is not the one that was promised: that is the better message.
                if let Err(error) = reader.drain() {
                    read = Err(error);
                }
            }
            drop(reader);
            if read.is_err() {
                queue.abandon();
            }
            queue.close();
            let worked: Vec<_> = workers.into_iter().map(join).collect();
            (read, join(hasher), worked)
        });
        let stored = collect(worked)?;
        if let (Some(expected), Ok(_) | Err(StoreError::Tar { .. } | StoreError::Entry { .. })) =
            (expected, &read)
            && hashed.digest != *expected
        {
            let what = "the layer's tar".to_owned();
            return Err(StoreError::DigestMismatch { what, expected: *expected, found: hashed.digest });
        }
        let ReadLayer { mut tree, files, segments, entries } = read?;
        let mut digests = vec![Digest::from_bytes([0; 32]); files.len()];
        for (slot, data) in stored.files {
            if let Data::Object { digest, .. } = &data {
                digests[slot as usize] = *digest;
            }
            tree.set_content(files[slot as usize], Content::Regular(data));
        }
        let finished =
            hashed.split.and_then(|split| split.finish(&hashed.digest, hashed.length, &segments, &digests));
        match finished {
            Err(error) if is_full(&error) => return Err(self.disk_full()),
            finished => finished.doing("write", self.staging.path("split"))?,
        }
        Ok(NewLayer { tree: tree.into_tree(), diff_id: hashed.digest, tar_size: hashed.length, entries })
    }

    /// Starts the threads that take objects from `queue`.
    pub(crate) fn spawn_workers<'scope, 'env>(
        &'env self,
        scope: &'scope thread::Scope<'scope, 'env>,
        queue: &'env Queue,
    ) -> Vec<thread::ScopedJoinHandle<'scope, Result<StoredFiles>>> {
        let threads = thread::available_parallelism().map_or(2, |count| count.get().clamp(1, 4));
        (0..threads).map(|_| scope.spawn(move || self.objects.work(queue))).collect()
    }

    /// Publishes a layer that came without a tar: its tar is the one that Kiln writes.
    pub(crate) fn publish_tree(self, tree: Tree) -> Result<ImportedLayer> {
        let mut hasher = Hasher::new();
        let open = |digest: &Digest| self.objects.open(digest);
        let tar_size = thread::scope(|scope| {
            // The disk takes its time for many objects: it may begin. An error of it is told once only.
            let begun = (self.objects.counts().0 >= MANY).then(|| scope.spawn(|| self.staging.sync()));
            let written = crate::tar::write::write_tree(&tree, &mut hasher, open);
            begun.map_or(Ok(()), join)?;
            written
        })?;
        let (entries, diff_id) = (tree.len() as u64, hasher.finish());
        self.publish(&NewLayer { tree, diff_id, tar_size, entries })
    }

    /// Writes the tree, puts everything on the disk, and makes it visible.
    fn publish(self, new: &NewLayer) -> Result<ImportedLayer> {
        let layout = &self.store.layout;
        let tree = self.staging.path("tree");
        let written = write_tree(&new.tree, &tree);
        let NewLayer { diff_id, tar_size, entries, .. } = *new;
        let layer = match written {
            Err(error) if error.is_disk_full() => return Err(self.disk_full()),
            written => written?,
        };
        let split = self.staging.path("split");
        if !split.exists() {
            std::fs::write(&split, split::from_tree(&diff_id, tar_size)).doing("write", &split)?;
        }
        if self.objects.is_full() {
            return Err(self.disk_full());
        }
        self.staging.sync()?;
        self.objects.publish()?;
        let split_to = match &self.replaced.split {
            Some((of, path)) if *of == layer => path.clone(),
            _ => match self.store.split_info(&layer) {
                Ok(Some(info))
                    if info.diff_id != diff_id
                        && !self.replaced.splits.contains(&layout.layer_split(&layer)) =>
                {
                    layout.diff_split(&diff_id)
                }
                // A stream that cannot be read is replaced.
                _ => layout.layer_split(&layer),
            },
        };
        std::fs::rename(&split, &split_to).doing("rename to", &split_to)?;
        let layer_to = layout.layer(&layer);
        std::fs::rename(&tree, &layer_to).doing("rename to", &layer_to)?;
        self.store.record_diff(&diff_id, &layer)?;
        self.store.forget_damage(&layer)?;
        let (_, new_object_bytes, _) = self.objects.counts();
        Ok(ImportedLayer { layer, diff_id, tar_size, entries, new_object_bytes })
    }

    /// The error of a full disk, with figures of the disk as it is without this import.
    pub(crate) fn disk_full(&self) -> StoreError {
        let (files, _, needed) = self.objects.counts();
        self.staging.clear();
        disk_full(&self.store.layout, files, needed)
    }
}

/// The error of a disk that had no room for `needed` bytes in `files` files, with figures of the disk as it is.
pub(crate) fn disk_full(layout: &Layout, files: u64, needed: u64) -> StoreError {
    let path = layout.root().to_owned();
    let Ok(disk) = rustix::fs::statvfs(&path) else {
        return StoreError::DiskFull { path, needed, available: 0 };
    };
    let blocks = if rustix::process::geteuid().is_root() { disk.f_bfree } else { disk.f_bavail };
    let available = blocks * disk.f_frsize;
    if disk.f_files > 0 && disk.f_favail < files {
        return StoreError::NoInodes { path, needed: files, available: disk.f_favail };
    }
    // What is known is the least: the file system's own records come on top.
    StoreError::DiskFull { path, needed: needed.max(available + 4096), available }
}

/// The results of all workers, or the first error.
pub(crate) fn collect(results: Vec<Result<StoredFiles>>) -> Result<StoredFiles> {
    let mut all = StoredFiles::default();
    for result in results {
        let mut some = result?;
        all.files.append(&mut some.files);
        all.changed.append(&mut some.changed);
    }
    Ok(all)
}

/// The result of a thread; its panic is passed on.
pub(crate) fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

struct Hashed {
    digest: Digest,
    length: u64,
    split: std::io::Result<SplitWriter>,
}

fn digest_thread(messages: &Receiver<Message>, mut split: std::io::Result<SplitWriter>) -> Hashed {
    let mut hasher = Hasher::new();
    let mut length = 0;
    for message in messages {
        match message {
            Message::Chunk(chunk) => {
                hasher.update(&chunk);
                length += chunk.len() as u64;
            }
            Message::Literals(bytes) => {
                if let Ok(writer) = &mut split
                    && let Err(error) = writer.literals(&bytes)
                {
                    split = Err(error);
                }
            }
        }
    }
    Hashed { digest: hasher.finish(), length, split }
}

/// Sends to the digest thread, which lives as long as there is something to send.
pub(crate) fn send(sender: &SyncSender<Message>, message: Message) {
    let _ = sender.send(message);
}

/// Writes a tree to a new file. Returns its digest.
pub(crate) fn write_tree(tree: &Tree, path: &Path) -> Result<Digest> {
    let file = File::create_new(path).doing("create", path)?;
    let mut out = Hashing::new(file);
    let mut buffered = BufWriter::with_capacity(256 << 10, &mut out);
    kiln_erofs::write_metadata(tree, &mut buffered)?;
    buffered.flush().doing("write", path)?;
    drop(buffered);
    Ok(out.digest())
}

/// Writes on, and knows the digest of what was written.
pub(crate) struct Hashing<W> {
    out: W,
    hasher: Hasher,
}

impl<W> Hashing<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, hasher: Hasher::new() }
    }

    pub(crate) fn digest(self) -> Digest {
        self.hasher.finish()
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
