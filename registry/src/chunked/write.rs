//! Layers packed as zstd:chunked.

use std::io::{self, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_contract::{Digest, Hasher};
use kiln_erofs::INLINE_LIMIT;
use kiln_store::{ImportLimits, LayerEntry, LazyLayer, Store, TarParts};
use zstd::stream::raw::{Encoder, InBuffer, Operation, OutBuffer};

use super::toc::{Toc, TocEntry, VERSION};
use super::{SKIPPABLE, TOC_MOST, TYPE, TocPlace};
use crate::{RegistryError, Result};

/// The first of the magics of skippable frames.
const SKIPPABLE_MAGIC: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// Ends the footer.
const FOOTER_MAGIC: &[u8; 8] = b"GNUlInUx";

/// Packs the tar of a layer. Gives `out` back, and where the table of contents is; if there is none, why not.
///
/// # Errors
/// The tar cannot be had, or `out` fails.
pub(crate) fn pack<W: Write>(
    store: &Store,
    diff_id: &Digest,
    out: W,
) -> Result<(W, std::result::Result<TocPlace, String>)> {
    let failed = |source| RegistryError::Io { doing: "pack", path: "a layer".into(), source };
    let mut writer = Writer {
        frames: Frames::new(out).map_err(failed)?,
        toc: Toc { version: VERSION, entries: Vec::new() },
        poor: None,
        file: None,
    };
    store.export_parts(diff_id, &mut writer)?;
    writer.frames.end().map_err(failed)?;
    let Writer { mut frames, toc, poor, .. } = writer;
    let told = match poor {
        Some(why) => Err(why),
        None => check(store, diff_id, &toc)?.map(|()| toc),
    };
    let place = match told {
        Ok(toc) => frames.table(&toc).map_err(failed)?,
        Err(why) => Err(why),
    };
    Ok((frames.out, place))
}

/// Whether a table tells the layer that there is: its tree is made from it.
fn check(store: &Store, diff_id: &Digest, toc: &Toc) -> Result<std::result::Result<(), String>> {
    let layer = store.layer_of_diff_id(diff_id)?;
    // It was let in once.
    let limits = ImportLimits { max_size: None, max_entries: u64::MAX, max_memory: u64::MAX };
    let mut told = LazyLayer::new(limits);
    for entry in &toc.entries {
        let added = entry.clone().layer_entry(|_| None).and_then(|entry| match entry {
            Some((entry, bytes)) => told.add(entry, bytes).map_err(|error| error.to_string()),
            None => Ok(()),
        });
        if let Err(why) = added {
            return Ok(Err(why));
        }
    }
    Ok(match told.digest() {
        Ok(told) if Some(told) == layer => Ok(()),
        Ok(_) => Err("a table of contents cannot tell all that it has".to_owned()),
        Err(error) => Err(error.to_string()),
    })
}

struct Writer<W> {
    frames: Frames<W>,
    toc: Toc,
    /// Why there can be no table.
    poor: Option<String>,
    /// The file that is being packed.
    file: Option<File>,
}

struct File {
    hasher: Hasher,
    /// Its first bytes, one more than a tree would hold.
    start: Vec<u8>,
    offset: u64,
}

impl<W: Write> TarParts for Writer<W> {
    fn between(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.frames.add(bytes)
    }

    fn entry(&mut self, entry: LayerEntry) -> io::Result<()> {
        match TocEntry::of(entry) {
            Ok(entry) if self.poor.is_none() => self.toc.entries.push(entry),
            Ok(_) => {}
            Err(why) => {
                self.toc.entries.clear();
                self.poor.get_or_insert(why);
            }
        }
        Ok(())
    }

    fn file(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.frames.end()?;
            self.file = Some(File { hasher: Hasher::new(), start: Vec::new(), offset: self.frames.written });
        }
        if let Some(file) = &mut self.file {
            file.hasher.update(bytes);
            let room = (INLINE_LIMIT + 1).saturating_sub(file.start.len());
            file.start.extend_from_slice(&bytes[..bytes.len().min(room)]);
        }
        self.frames.add(bytes)
    }

    fn file_end(&mut self) -> io::Result<()> {
        self.frames.end()?;
        if let (Some(file), Some(entry)) = (self.file.take(), self.toc.entries.last_mut()) {
            entry.digest = file.hasher.finish().to_string();
            (entry.offset, entry.end_offset) = (file.offset, self.frames.written);
            entry.kiln_data = (file.start.len() <= INLINE_LIMIT).then(|| STANDARD.encode(&file.start));
        }
        Ok(())
    }
}

/// Frames of zstd, one after the other.
struct Frames<W> {
    out: W,
    encoder: Encoder<'static>,
    buffer: Vec<u8>,
    /// Bytes that went out.
    written: u64,
    /// Something was added to the frame that is open.
    open: bool,
}

impl<W: Write> Frames<W> {
    fn new(out: W) -> io::Result<Self> {
        let encoder = Encoder::new(zstd::DEFAULT_COMPRESSION_LEVEL)?;
        let buffer = vec![0; zstd::zstd_safe::CCtx::out_size()];
        Ok(Self { out, encoder, buffer, written: 0, open: false })
    }

    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.open |= !bytes.is_empty();
        let mut input = InBuffer::around(bytes);
        while input.pos() < bytes.len() {
            let mut output = OutBuffer::around(&mut self.buffer);
            self.encoder.run(&mut input, &mut output)?;
            let length = output.pos();
            self.give(length)?;
        }
        Ok(())
    }

    /// Ends the frame that is open, if one is.
    fn end(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        loop {
            let mut output = OutBuffer::around(&mut self.buffer);
            let left = self.encoder.finish(&mut output, true)?;
            let length = output.pos();
            self.give(length)?;
            if left == 0 {
                break;
            }
        }
        self.encoder.reinit()
    }

    fn give(&mut self, length: usize) -> io::Result<()> {
        self.out.write_all(&self.buffer[..length])?;
        self.written += length as u64;
        Ok(())
    }

    fn skippable(&mut self, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a frame of more than 4 GiB"))?;
        for part in [&SKIPPABLE_MAGIC[..], &length.to_le_bytes(), data] {
            self.out.write_all(part)?;
            self.written += part.len() as u64;
        }
        Ok(())
    }

    /// Writes what follows the tar.
    fn table(&mut self, toc: &Toc) -> io::Result<std::result::Result<TocPlace, String>> {
        let json = serde_json::to_vec(toc).map_err(io::Error::from)?;
        let packed = zstd::encode_all(&json[..], zstd::DEFAULT_COMPRESSION_LEVEL)?;
        let (length, unpacked) = (packed.len() as u64, json.len() as u64);
        if unpacked > TOC_MOST || length > TOC_MOST {
            return Ok(Err(format!(
                "its table of contents would have {unpacked} bytes; at most {TOC_MOST} are read"
            )));
        }
        let offset = self.written + SKIPPABLE;
        self.skippable(&packed)?;
        let split = offset + length + SKIPPABLE;
        self.skippable(&[])?;
        let mut footer = Vec::with_capacity(64);
        for number in [offset, length, unpacked, TYPE, split, 0, 0] {
            footer.extend_from_slice(&number.to_le_bytes());
        }
        footer.extend_from_slice(FOOTER_MAGIC);
        self.skippable(&footer)?;
        Ok(Ok(TocPlace { digest: Digest::of(&packed), offset, length, unpacked }))
    }
}
