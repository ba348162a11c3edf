//! The reading half of an import: finds headers and files in the stream, and hands everything on.

use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use kiln_contract::Digest;
use kiln_erofs::{Attributes, Content, Data, INLINE_LIMIT, NodeId};

use crate::chunk::{Chunk, Chunks, Slice};
use crate::import::{Message, send};
use crate::layer_tree::{LayerTree, Name};
use crate::limits::{Budget, ImportLimits};
use crate::object_writer::{Job, Piece, Queue, SmallFile};
use crate::split::Segment;
use crate::tar::entry::{self, EntryKind, LayerEntry, Sparse, TarSource, padding};
use crate::tar::header::BLOCK;
use crate::{Result, StoreError, overlay};

/// Files up to this size are handed over whole: their digest tells whether they have to be written at all.
const WHOLE: u64 = 1 << 20;

/// Small files travel in batches, so that waking a worker costs little. Together with one whole file, a batch must not
/// pin as many chunks as there are.
const BATCH_FILES: usize = 32;
const BATCH_BYTES: u64 = 256 << 10;

/// How much is sent to the digest thread at once.
const LITERALS: usize = 64 << 10;

/// Pieces of a large file under way.
const PIECES: usize = 16;

pub(crate) struct LayerReader<'q, R> {
    chunks: Chunks<R>,
    chunk: Option<Arc<Chunk>>,
    /// Next byte in `chunk`.
    at: usize,
    offset: u64,
    sender: SyncSender<Message>,
    literals: Vec<u8>,
    /// Literal bytes since the last segment.
    literal_run: u64,
    queue: &'q Queue,
    batch: Vec<SmallFile>,
    batch_bytes: u64,
    tree: LayerTree,
    files: Vec<NodeId>,
    segments: Vec<Segment>,
}

/// What the reader found.
#[derive(Debug)]
pub(crate) struct ReadLayer {
    pub(crate) tree: LayerTree,
    /// The nodes whose content is known by slot only.
    pub(crate) files: Vec<NodeId>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) entries: u64,
}

impl<'q, R: Read> LayerReader<'q, R> {
    pub(crate) fn new(input: R, sender: SyncSender<Message>, queue: &'q Queue, limits: ImportLimits) -> Self {
        Self {
            chunks: Chunks::new(input),
            chunk: None,
            at: 0,
            offset: 0,
            sender,
            literals: Vec::with_capacity(LITERALS),
            literal_run: 0,
            queue,
            batch: Vec::new(),
            batch_bytes: 0,
            tree: LayerTree::new(Budget::of_layer(limits)),
            files: Vec::new(),
            segments: Vec::new(),
        }
    }

    /// Reads the archive, and the stream to its end.
    pub(crate) fn read(&mut self) -> Result<ReadLayer> {
        while let Some(entry) = entry::next(self)? {
            self.tree.budget().entry()?;
            self.entry(entry)?;
        }
        // Most programs pad archives to 10 KiB; whatever is there is part of the tar.
        while self.ensure()? {
            let (chunk, at) = (self.current(), self.at);
            self.tree.budget().bytes(b"", (chunk.len() - at) as u64, 0)?;
            self.literal(&chunk[at..]);
            self.advance(chunk.len() - at);
        }
        self.flush();
        self.send_literals();
        let entries = self.tree.budget().entries();
        let empty = LayerTree::new(Budget::of_layer(ImportLimits::default()));
        Ok(ReadLayer {
            tree: std::mem::replace(&mut self.tree, empty),
            files: std::mem::take(&mut self.files),
            segments: std::mem::take(&mut self.segments),
            entries,
        })
    }

    /// Skips what follows `size` bytes of data. Archives that were never closed lack it after their last file, and the two
    /// blocks of zeros as well; umoci writes such, and Go's reader takes them.
    fn skip_padding(&mut self, size: u64) -> Result<()> {
        let padding = padding(size);
        if padding > 0 && !self.ensure()? { Ok(()) } else { self.skip(padding) }
    }

    /// Reads the stream to its end, only for its digest.
    pub(crate) fn drain(&mut self) -> Result<()> {
        while self.ensure()? {
            let rest = self.current().len() - self.at;
            self.advance(rest);
        }
        Ok(())
    }

    fn entry(&mut self, entry: LayerEntry) -> Result<()> {
        let LayerEntry { path, kind, mode, uid, gid, mtime, xattrs } = entry;
        let xattrs = xattrs.into_iter().map(|(name, value)| (overlay::own_xattr(&name), value)).collect();
        let attributes = Attributes { mode, uid, gid, mtime, xattrs };
        let content = match kind {
            EntryKind::Regular { size, sparse } => {
                let real_size = sparse.as_ref().map_or(size, |sparse| sparse.real_size);
                self.tree.budget().bytes(&path, size, real_size - size)?;
                if LayerTree::classify(&path)? != Name::Entry {
                    self.tree.add(&path, Content::Fifo, Attributes::default())?;
                    return self.skip(size + padding(size));
                }
                if real_size > INLINE_LIMIT as u64 {
                    self.file(&path, attributes, size, real_size, sparse.as_ref())?;
                    return self.skip_padding(size);
                }
                let data = self.bytes(size as usize)?;
                self.skip_padding(size)?;
                Content::Regular(Data::Inline(expand(data, real_size, sparse.as_ref())))
            }
            EntryKind::HardLink(target) => return self.tree.hard_link(&path, &target),
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.len() > 4095 {
                    let what = format!("its link target has {} bytes (1 to 4095 are possible)", target.len());
                    return Err(StoreError::Entry { path, what });
                }
                Content::Symlink(target)
            }
            EntryKind::Directory => Content::Directory,
            EntryKind::CharDevice(device) => Content::CharDevice(device),
            EntryKind::BlockDevice(device) => Content::BlockDevice(device),
            EntryKind::Fifo => Content::Fifo,
        };
        self.tree.add(&path, content, attributes)?;
        Ok(())
    }

    /// Adds a file whose bytes become an object, and sends them to the workers.
    fn file(
        &mut self,
        path: &[u8],
        attributes: Attributes,
        size: u64,
        real_size: u64,
        sparse: Option<&Sparse>,
    ) -> Result<()> {
        let unknown = Data::Object { digest: Digest::from_bytes([0; 32]), size: real_size };
        let node = self.tree.add(path, Content::Regular(unknown), attributes)?;
        let slot = self.files.len() as u32;
        self.files.push(node);
        let whole = [(0, size)];
        let pieces = sparse.map_or(&whole[..], |sparse| &sparse.segments);
        self.tree.budget().segments(pieces.len())?;
        for (offset, length) in pieces {
            let literal = std::mem::take(&mut self.literal_run);
            self.segments.push(Segment { literal, slot, offset: *offset, length: *length });
        }
        if sparse.is_none() && size <= WHOLE {
            let mut slices = Vec::with_capacity(1);
            let mut left = size;
            while left > 0 {
                let slice = self.slice(left)?;
                left -= slice.len() as u64;
                slices.push(slice);
            }
            self.batch.push(SmallFile { slot, slices });
            self.batch_bytes += size;
            if self.batch.len() >= BATCH_FILES || self.batch_bytes >= BATCH_BYTES {
                self.flush();
            }
            return self.check_workers();
        }
        self.flush();
        let (sender, receiver) = sync_channel(PIECES);
        self.queue.push(Job::Stream { slot, pieces: receiver });
        let mut position = 0;
        // A worker that failed has hung up; it is asked for its error when all is over.
        let send = |piece| sender.send(piece).map_err(|_| stopped());
        for (offset, length) in pieces {
            if *offset > position {
                send(Piece::Zeros(offset - position))?;
            }
            let mut left = *length;
            while left > 0 {
                let slice = self.slice(left)?;
                left -= slice.len() as u64;
                send(Piece::Data(slice))?;
            }
            position = offset + length;
        }
        if real_size > position {
            send(Piece::Zeros(real_size - position))?;
        }
        send(Piece::End)
    }

    fn flush(&mut self) {
        if !self.batch.is_empty() {
            self.queue.push(Job::Small(std::mem::take(&mut self.batch)));
            self.batch_bytes = 0;
        }
    }

    fn check_workers(&self) -> Result<()> {
        if self.queue.has_failed() { Err(stopped()) } else { Ok(()) }
    }

    /// Makes sure that there is a byte to read; `false` at the end.
    fn ensure(&mut self) -> Result<bool> {
        if self.chunk.as_ref().is_some_and(|chunk| self.at < chunk.len()) {
            return Ok(true);
        }
        self.chunk = None;
        let Some(chunk) = self.chunks.next()? else { return Ok(false) };
        send(&self.sender, Message::Chunk(Arc::clone(&chunk)));
        self.chunk = Some(chunk);
        self.at = 0;
        Ok(true)
    }

    fn current(&self) -> Arc<Chunk> {
        Arc::clone(self.chunk.as_ref().expect("there is a chunk after `ensure`"))
    }

    fn advance(&mut self, length: usize) {
        self.at += length;
        self.offset += length as u64;
    }

    fn slice(&mut self, max: u64) -> Result<Slice> {
        if !self.ensure()? {
            return Err(self.truncated());
        }
        let chunk = self.current();
        let length = max.min((chunk.len() - self.at) as u64) as usize;
        let slice = Slice::new(&chunk, self.at..self.at + length);
        self.advance(length);
        Ok(slice)
    }

    fn literal(&mut self, bytes: &[u8]) {
        self.literals.extend_from_slice(bytes);
        self.literal_run += bytes.len() as u64;
        if self.literals.len() >= LITERALS {
            self.send_literals();
        }
    }

    fn send_literals(&mut self) {
        let literals = std::mem::replace(&mut self.literals, Vec::with_capacity(LITERALS));
        send(&self.sender, Message::Literals(literals));
    }

    fn truncated(&self) -> StoreError {
        StoreError::Tar { offset: self.offset, what: "it is truncated".to_owned() }
    }
}

impl<R: Read> TarSource for LayerReader<'_, R> {
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut have = 0;
        while have < BLOCK {
            if !self.ensure()? {
                return if have == 0 { Ok(false) } else { Err(self.truncated()) };
            }
            let slice = self.slice((BLOCK - have) as u64)?;
            block[have..have + slice.len()].copy_from_slice(&slice);
            have += slice.len();
        }
        self.literal(block);
        Ok(true)
    }

    fn bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length.min(WHOLE as usize));
        while bytes.len() < length {
            let slice = self.slice((length - bytes.len()) as u64)?;
            bytes.extend_from_slice(&slice);
            self.literal(&slice);
        }
        Ok(bytes)
    }

    fn skip(&mut self, mut length: u64) -> Result<()> {
        while length > 0 {
            let slice = self.slice(length)?;
            length -= slice.len() as u64;
            self.literal(&slice);
        }
        Ok(())
    }

    fn offset(&self) -> u64 {
        self.offset
    }
}

/// The whole of a small file of which the archive has some segments.
fn expand(data: Vec<u8>, real_size: u64, sparse: Option<&Sparse>) -> Vec<u8> {
    let Some(sparse) = sparse else { return data };
    let mut whole = vec![0; real_size as usize];
    let mut at = 0;
    for (offset, length) in &sparse.segments {
        let (offset, length) = (*offset as usize, *length as usize);
        whole[offset..offset + length].copy_from_slice(&data[at..at + length]);
        at += length;
    }
    whole
}

fn stopped() -> StoreError {
    StoreError::Stream { doing: "import the layer", source: std::io::Error::other("a worker stopped") }
}

#[cfg(test)]
mod tests {
    use kiln_contract::Home;

    use super::*;
    use crate::Store;

    #[test]
    fn a_tar_that_was_never_closed_is_read_and_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path())).unwrap();
        for content in [&b"hello\n"[..], &[7; 1000]] {
            let mut header = [0; BLOCK];
            let fields =
                [(0, "file"), (100, "0000644"), (257, "ustar"), (263, "00"), (148, "        "), (156, "0")];
            for (at, field) in fields {
                header[at..at + field.len()].copy_from_slice(field.as_bytes());
            }
            header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            let tar = [&header, content].concat();
            let layer = store.import_tar(&tar[..], None, ImportLimits::default()).unwrap();
            let mut back = Vec::new();
            store.export_tar(&layer.layer, &mut back).unwrap();
            assert_eq!(back, tar);
            let cut = store.import_tar(&tar[..tar.len() - 1], None, ImportLimits::default());
            assert!(matches!(cut, Err(StoreError::Tar { .. })), "{cut:?}");
        }
    }
}
