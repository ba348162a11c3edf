//! Layers packed: in chunks as they are made, or whole into a file.

use std::fs::File;
use std::io::{self, BufWriter, Seek as _, Write};

use bytes::Bytes;
use kiln_contract::{Digest, Hasher};
use kiln_store::Store;
use tokio::sync::mpsc;

use crate::chunked::{TocPlace, write};
use crate::compression::{Compression, Compressor};
use crate::unpack::scratch_file;
use crate::{RegistryError, Result};

/// What a thread gives that packs a layer into chunks.
pub(crate) enum Packed {
    Chunk(Bytes),
    /// The last bytes, the digest of all, and where a table of contents is.
    Last(Bytes, Digest, Table),
    Failed(RegistryError),
}

/// How layers are packed for a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// As one stream.
    Stream(Compression),
    /// With zstd, and so that a part of them can be had alone (zstd:chunked); also those that the registry has in another form.
    Chunked,
}

impl Packing {
    pub(crate) fn compression(self) -> Compression {
        match self {
            Self::Stream(compression) => compression,
            Self::Chunked => Compression::Zstd,
        }
    }
}

impl Default for Packing {
    fn default() -> Self {
        Self::Stream(Compression::default())
    }
}

/// Where a packed layer has its table of contents; or why it has none, if it was to have one.
pub(crate) type Table = Option<std::result::Result<TocPlace, String>>;

/// Packs a layer into `out`, which is given back.
fn pack<W: Write>(store: &Store, diff_id: &Digest, packing: Packing, out: W) -> Result<(W, Table)> {
    match packing {
        Packing::Chunked => {
            let (out, table) = write::pack(store, diff_id, out)?;
            Ok((out, Some(table)))
        }
        Packing::Stream(compression) => {
            let mut compressor = Compressor::new(compression, out).map_err(packing_failed)?;
            store.export_diff(diff_id, &mut compressor)?;
            Ok((compressor.finish().map_err(packing_failed)?, None))
        }
    }
}

/// Packs a layer into chunks of `size` bytes.
pub(crate) fn in_chunks(
    store: &Store,
    diff_id: &Digest,
    packing: Packing,
    size: usize,
    sender: &mpsc::Sender<Packed>,
) {
    let chunks = Chunks { size, filling: Vec::new(), hasher: Hasher::new(), sender };
    let packed = pack(store, diff_id, packing, chunks);
    // Nobody listens if the push has failed elsewhere.
    let _ = sender.blocking_send(match packed {
        Ok((chunks, table)) => Packed::Last(chunks.filling.into(), chunks.hasher.finish(), table),
        Err(error) => Packed::Failed(error),
    });
}

fn packing_failed(source: io::Error) -> RegistryError {
    RegistryError::Io { doing: "pack", path: "a layer".into(), source }
}

struct Chunks<'a> {
    size: usize,
    filling: Vec<u8>,
    hasher: Hasher,
    sender: &'a mpsc::Sender<Packed>,
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full chunk goes only when more follows: the last one travels with the closing request.
        if self.filling.len() >= self.size && !bytes.is_empty() {
            let full = std::mem::replace(&mut self.filling, Vec::with_capacity(self.size));
            self.sender
                .blocking_send(Packed::Chunk(full.into()))
                .map_err(|_| io::Error::other("the upload failed"))?;
        }
        let n = bytes.len().min(self.size - self.filling.len());
        self.filling.extend_from_slice(&bytes[..n]);
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A packed layer in a file without a name, at its beginning.
#[derive(Debug)]
pub(crate) struct Spooled {
    pub(crate) file: File,
    pub(crate) digest: Digest,
    pub(crate) length: u64,
    pub(crate) table: Table,
}

/// Packs a layer into a file: what has to be told about it before its first byte is known then.
pub(crate) fn into_file(store: &Store, diff_id: &Digest, packing: Packing) -> Result<Spooled> {
    let failed = |source| RegistryError::Io { doing: "write below", path: store.path().join("tmp"), source };
    let spool = Hashed {
        inner: BufWriter::with_capacity(256 << 10, scratch_file(store)?),
        hasher: Hasher::new(),
        length: 0,
    };
    let (Hashed { inner, hasher, length }, table) = pack(store, diff_id, packing, spool)?;
    let mut file = inner.into_inner().map_err(|error| failed(error.into_error()))?;
    file.rewind().map_err(failed)?;
    Ok(Spooled { file, digest: hasher.finish(), length, table })
}

struct Hashed<W> {
    inner: W,
    hasher: Hasher,
    length: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.length += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
