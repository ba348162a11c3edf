//! Lazy layers made from the tables of contents of zstd:chunked layers.

use std::collections::HashMap;
use std::io::{self, Read};

use kiln_contract::Digest;
use kiln_erofs::INLINE_LIMIT;
use kiln_store::{ImportLimits, LazyLayer, LazySource, Store, ZSTD_WINDOW_LOG};
use oci_spec::image::Descriptor;

use super::{TocPlace, toc};
use crate::download::{self, Blob};
use crate::endpoint::Endpoint;
use crate::transport::Transport;
use crate::{RegistryError, Result};

/// Small files that a table has no bytes of are fetched: those that lie no further from each other than this together.
const GAP: u64 = 64 << 10;
/// With so many requests at most.
const SPANS_MOST: usize = 32;
/// And so many bytes of them together.
const BYTES_MOST: u64 = 64 << 20;

/// What came of a layer for a lazy pull.
#[derive(Debug)]
pub(crate) struct Table {
    place: TocPlace,
    json: Vec<u8>,
    /// The bytes of small files that the table lacks, by the offsets of their frames.
    small: HashMap<u64, Vec<u8>>,
}

/// Fetches what it takes to make a layer's tree. If that is not to be had, the error is in words: then the layer has to
/// be taken whole. `advance` is told of bytes that came.
///
/// # Errors
/// The registry cannot be asked; the table is not what the manifest says, or none.
pub(crate) async fn fetch(
    transport: &Transport,
    endpoint: &Endpoint,
    blob: &Blob,
    descriptor: &Descriptor,
    advance: &(dyn Fn(i64) + Sync),
) -> Result<std::result::Result<Table, String>> {
    let place = match TocPlace::of(descriptor) {
        Ok(Some(place)) => place,
        Ok(None) => return Ok(Err("it is no zstd:chunked, so that nothing can be had of it alone".into())),
        Err(why) => return Err(invalid(blob, why)),
    };
    let no_parts = || format!("{} gives no parts of layers", endpoint.host);
    let get = async |from, to| download::part(transport, endpoint, blob, from, to, advance).await;
    let Some(packed) = get(place.offset, place.offset + place.length).await? else {
        return Ok(Err(no_parts()));
    };
    let actual = Digest::of(&packed);
    if actual != place.digest {
        let (name, expected) = (blob.name.clone(), place.digest);
        return Err(RegistryError::WrongDigest { what: "table of contents", name, expected, actual });
    }
    let json = unpack(&packed, place.unpacked).map_err(|error| invalid(blob, error.to_string()))?;
    let files = small_files(&json, place.files_end()).map_err(|why| invalid(blob, why))?;
    let Some(spans) = spans(&files, blob.size) else {
        let count = files.len();
        return Ok(Err(format!(
            "{count} small files lie scattered in it, and its table of contents has them not"
        )));
    };
    let mut small = HashMap::new();
    let mut rest = &files[..];
    for (from, to) in spans {
        let Some(bytes) = get(from, to).await? else { return Ok(Err(no_parts())) };
        let count = rest.iter().take_while(|file| file.end <= to).count();
        let (here, next) = rest.split_at(count);
        for file in here {
            let frames = &bytes[(file.offset - from) as usize..(file.end - from) as usize];
            small.insert(
                file.offset,
                unpack(frames, file.size).map_err(|error| invalid(blob, error.to_string()))?,
            );
        }
        rest = next;
    }
    Ok(Ok(Table { place, json, small }))
}

/// Keeps the layer of a table. Returns its digest.
///
/// # Errors
/// The table makes no sense; nothing is kept then.
pub(crate) fn put(
    store: &Store,
    table: &Table,
    descriptor: &Descriptor,
    diff_id: &Digest,
    limits: ImportLimits,
    blob: &Blob,
) -> Result<Digest> {
    let mut layer = LazyLayer::new(limits);
    let mut failed = None;
    let read = toc::entries(&table.json, &mut |entry| match entry
        .layer_entry(|entry| table.small.get(&entry.offset).cloned())?
    {
        Some((entry, bytes)) => layer.add(entry, bytes).map_err(|error| {
            failed = Some(error);
            String::new()
        }),
        None => Ok(()),
    });
    // What the store says has a hint.
    if let Some(error) = failed {
        return Err(error.into());
    }
    read.map_err(|why| invalid(blob, why))?;
    let (diff_id, toc, files_end) = (*diff_id, table.place.digest, table.place.files_end());
    Ok(store.put_lazy(layer, &LazySource { diff_id, blob: descriptor.clone(), toc, files_end })?)
}

fn invalid(blob: &Blob, reason: String) -> RegistryError {
    let name = format!("{}, layer {}", blob.name, blob.digest.short());
    RegistryError::Invalid { what: "table of contents", name, reason }
}

/// Decompresses what must have `size` bytes then.
fn unpack(packed: &[u8], size: u64) -> io::Result<Vec<u8>> {
    let mut decoder = zstd::Decoder::with_buffer(packed)?;
    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
    let mut bytes = Vec::new();
    decoder.take(size + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == size {
        return Ok(bytes);
    }
    let what = format!(
        "what should have {size} bytes unpacked has {}",
        if bytes.len() as u64 > size { "more" } else { "fewer" }
    );
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// A file of which a tree holds the bytes.
struct Small {
    offset: u64,
    end: u64,
    size: u64,
}

/// Those that a table has no bytes of, in the order in which they lie in the blob.
fn small_files(json: &[u8], files_end: u64) -> std::result::Result<Vec<Small>, String> {
    let mut files = Vec::new();
    toc::entries(json, &mut |entry| {
        if entry.lacks_data() {
            let (offset, end, size) = (entry.offset, entry.end_offset, entry.size);
            // Frames of 64 bytes that need more are no honest ones.
            let most = offset.saturating_add(16 * INLINE_LIMIT as u64);
            if offset >= end || end > files_end || end > most {
                return Err(format!("`{}` lies where no file is", entry.name.escape_debug()));
            }
            files.push(Small { offset, end, size });
        }
        Ok(())
    })?;
    files.sort_by_key(|file| file.offset);
    files.dedup_by_key(|file| file.offset);
    Ok(files)
}

/// The parts of the blob in which these files are. `None` if that were too many, or too much of it.
fn spans(files: &[Small], blob: u64) -> Option<Vec<(u64, u64)>> {
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for file in files {
        match spans.last_mut() {
            Some((_, end)) if file.offset <= end.saturating_add(GAP) => *end = file.end.max(*end),
            _ => spans.push((file.offset, file.end)),
        }
    }
    let bytes: u64 = spans.iter().map(|(from, to)| to - from).sum();
    (spans.len() <= SPANS_MOST && bytes <= (blob / 4).clamp(1 << 20, BYTES_MOST)).then_some(spans)
}
