//! Where the objects of a lazy layer lie: `lazy/<sha256>`, named by the SHA-256 of the digests of its blob and of the blob's
//! table of contents.
//!
//! ```text
//! 0    "KILNLAZY"
//! 8    u32   the format's version
//! 12   u32   length of the head
//! 16   head  JSON: `layer`, `diff_id`, `toc`, `blob` (a descriptor)
//!      u64   how many objects
//!      each: SHA-256, u64 size, u64 offset in the blob, u64 length of its zstd frames; sorted by SHA-256
//!      each: u32, its place in this list; sorted by their offsets
//!      SHA-256 of all before it
//! ```
//! Numbers are little-endian. Of another version, or removed, the layer counts as missing, and the next pull brings it.
//!
//! An object is looked up in the mapped file ([`Lookup`]): what that costs does not depend on how many there are. The last
//! digest is for [`Store::check`](crate::Store::check); what a damaged record leads to has not the digest of the object that was looked up, and is
//! refused for that.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use kiln_contract::Digest;
use memmap2::Mmap;
use oci_spec::image::Descriptor;
use serde::{Deserialize, Serialize};

use super::{LazySource, Placed, key};
use crate::error::Context as _;
use crate::image::digest_of;
use crate::{Result, StoreError};

const MAGIC: &[u8; 8] = b"KILNLAZY";
const VERSION: u32 = 2;
const START: usize = 16;
/// As many bytes as a manifest may have, and so a descriptor in it.
const HEAD_MOST: usize = 8 << 20;
const OBJECT: usize = 32 + 3 * 8;

/// What a record says of its layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) layer: Digest,
    pub(crate) diff_id: Digest,
    pub(crate) toc: Digest,
    pub(crate) blob: Descriptor,
}

#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) head: Head,
    /// Sorted by digest.
    pub(crate) objects: Vec<Placed>,
    blob: Digest,
}

impl Record {
    pub(super) fn new(layer: Digest, source: &LazySource, objects: Vec<Placed>) -> Result<Self> {
        let LazySource { diff_id, blob, toc, .. } = source.clone();
        let digest = digest_of(&blob)?;
        Ok(Self { head: Head { layer, diff_id, toc, blob }, objects, blob: digest })
    }

    /// What it is named by.
    pub(crate) fn key(&self) -> Digest {
        key(&self.blob, &self.head.toc)
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let head = serde_json::to_vec(&self.head).map_err(io::Error::from);
        let head =
            head.map_err(|source| StoreError::Stream { doing: "write a lazy layer's record", source })?;
        let mut bytes = Vec::with_capacity(START + head.len() + 8 + self.objects.len() * (OBJECT + 4) + 32);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&(self.objects.len() as u64).to_le_bytes());
        for Placed { digest, size, offset, length } in &self.objects {
            bytes.extend_from_slice(digest.as_bytes());
            for number in [size, offset, length] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        let too_many = |_| StoreError::BadImage {
            what: "table of contents",
            why: format!("it has {} objects", self.objects.len()),
        };
        let mut order: Vec<u32> = (0..u32::try_from(self.objects.len()).map_err(too_many)?).collect();
        order.sort_by_key(|at| self.objects[*at as usize].offset);
        order.iter().for_each(|at| bytes.extend_from_slice(&at.to_le_bytes()));
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        Ok(bytes)
    }

    /// Reads a record whole, and compares it with its digest; `None` if there is none.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.doing("read", path)?,
        };
        let damaged = |what: &str| StoreError::Damaged { path: path.to_owned(), what: what.to_owned() };
        let parse = || {
            let (body, digest) = bytes.split_last_chunk::<32>()?;
            if Digest::of(body).as_bytes() != digest {
                return None;
            }
            let (head, parts) = Parts::of(body)?;
            let objects = (0..parts.count).map(|at| parts.object(body, at)).collect::<Option<Vec<_>>>()?;
            Some(Self { blob: digest_of(&head.blob).ok()?, head, objects })
        };
        parse().map(Some).ok_or_else(|| damaged("it is no record of a lazy layer"))
    }

    /// Reads only what a record says of its layer; `None` if there is none, or none that this program can read.
    pub(crate) fn head(path: &Path) -> Result<Option<Head>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.doing("open", path)?,
        };
        let mut bytes = Vec::new();
        let mut start = file.take((START + HEAD_MOST) as u64);
        start.by_ref().take(4096).read_to_end(&mut bytes).doing("read", path)?;
        if head(&bytes).is_none() {
            start.read_to_end(&mut bytes).doing("read", path)?;
        }
        Ok(head(&bytes).map(|(head, _)| head))
    }
}

/// A record in which objects are looked up.
#[derive(Debug)]
pub(crate) struct Lookup {
    pub(crate) head: Head,
    pub(crate) key: Digest,
    map: Mmap,
    parts: Parts,
}

impl Lookup {
    /// Maps a record; `None` if there is none, or none that this program can read.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.doing("open", path)?,
        };
        // SAFETY: as all files of the store, records are replaced and removed, but never written to or truncated.
        let map = unsafe { Mmap::map(&file) }.doing("map", path)?;
        let parse = || {
            let (body, _) = map.split_last_chunk::<32>()?;
            let (head, parts) = Parts::of(body)?;
            let key = key(&digest_of(&head.blob).ok()?, &head.toc);
            Some((head, key, parts))
        };
        Ok(parse().map(|(head, key, parts)| Self { head, key, map, parts }))
    }

    /// Where an object lies.
    pub(crate) fn find(&self, digest: &Digest) -> Option<Placed> {
        let at = partition_point(self.parts.count, |at| {
            self.object(at).is_some_and(|object| object.digest < *digest)
        });
        self.object(at).filter(|object| object.digest == *digest)
    }

    /// The objects that begin at an offset or behind it, in the order of their offsets.
    pub(crate) fn from(&self, offset: u64) -> impl Iterator<Item = Placed> + '_ {
        let first = partition_point(self.parts.count, |at| {
            self.ordered(at).is_some_and(|object| object.offset < offset)
        });
        (first..self.parts.count).map_while(|at| self.ordered(at))
    }

    fn object(&self, at: usize) -> Option<Placed> {
        self.parts.object(&self.map, at)
    }

    fn ordered(&self, at: usize) -> Option<Placed> {
        let from = self.parts.order + at * 4;
        let at = u32::from_le_bytes(self.map.get(from..from + 4)?.try_into().ok()?);
        self.object(at as usize)
    }
}

/// The first of so many that is not before what is looked for.
fn partition_point(count: usize, is_before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        if is_before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// What follows the head of a record.
#[derive(Debug, Clone, Copy)]
struct Parts {
    /// Where objects begin, and how many there are.
    objects: usize,
    count: usize,
    /// Where their order begins.
    order: usize,
}

impl Parts {
    /// Reads what a record without its last digest begins with, and sees that nothing is missing or too much.
    fn of(body: &[u8]) -> Option<(Head, Self)> {
        let (head, length) = head(body)?;
        let objects = START + length + 8;
        let count = body.get(objects - 8..objects)?;
        let count = usize::try_from(u64::from_le_bytes(count.try_into().ok()?)).ok()?;
        let order = objects.checked_add(count.checked_mul(OBJECT)?)?;
        let end = order.checked_add(count.checked_mul(4)?)?;
        (end == body.len()).then_some((head, Self { objects, count, order }))
    }

    fn object(&self, record: &[u8], at: usize) -> Option<Placed> {
        let from = self.objects + at * OBJECT;
        let bytes = record.get(from..from + OBJECT).filter(|_| at < self.count)?;
        let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let digest = Digest::from_bytes(bytes[..32].try_into().ok()?);
        Some(Placed { digest, size: number(32)?, offset: number(40)?, length: number(48)? })
    }
}

/// The head at the beginning of a record, and its length.
fn head(bytes: &[u8]) -> Option<(Head, usize)> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (version, rest) = rest.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    if u32::from_le_bytes(*version) != VERSION || length > HEAD_MOST {
        return None;
    }
    Some((serde_json::from_slice(rest.get(..length)?).ok()?, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(number: u64) -> Placed {
        let digest = Digest::of(&number.to_le_bytes());
        Placed { digest, size: number, offset: number * 7, length: 5 }
    }

    fn record(count: u64) -> Record {
        let blob: Descriptor = serde_json::from_value(serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "size": 7,
            "digest": Digest::of(b"blob").to_string(), "annotations": {"a": "b".repeat(6000)},
        }))
        .unwrap();
        let (toc, diff_id) = (Digest::of(b"toc"), Digest::of(b"tar"));
        let source = LazySource { diff_id, blob, toc, files_end: 7 };
        let mut objects: Vec<Placed> = (0..count).map(placed).collect();
        objects.sort();
        Record::new(Digest::of(b"layer"), &source, objects).unwrap()
    }

    #[test]
    fn a_record_comes_back_as_it_was_and_a_changed_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let record = record(5);
        let bytes = record.to_bytes().unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let back = Record::open(&path).unwrap().unwrap();
        assert_eq!((back.objects, &back.head.blob), (record.objects.clone(), &record.head.blob));
        assert_eq!(Record::head(&path).unwrap().unwrap().layer, Digest::of(b"layer"));
        for at in (0..bytes.len()).step_by(61) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            std::fs::write(&path, &changed).unwrap();
            assert!(matches!(Record::open(&path), Err(StoreError::Damaged { .. })), "at {at}");
            std::fs::write(&path, &bytes[..at]).unwrap();
            assert!(matches!(Record::open(&path), Err(StoreError::Damaged { .. })), "cut at {at}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(Record::open(&path).unwrap().is_none() && Record::head(&path).unwrap().is_none());
        assert!(Lookup::open(&path).unwrap().is_none());
    }

    #[test]
    fn objects_are_looked_up_by_their_digests_and_by_their_offsets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let record = record(1000);
        std::fs::write(&path, record.to_bytes().unwrap()).unwrap();
        assert_eq!(Record::open(&path).unwrap().unwrap().objects, record.objects);
        let lookup = Lookup::open(&path).unwrap().unwrap();
        assert_eq!((lookup.key, lookup.head.layer), (record.key(), record.head.layer));
        for number in 0..1000 {
            assert_eq!(lookup.find(&placed(number).digest), Some(placed(number)));
            let next: Vec<Placed> = lookup.from(number * 7).take(3).collect();
            let expected: Vec<Placed> = (number..1000).take(3).map(placed).collect();
            assert_eq!(next, expected);
        }
        assert_eq!(lookup.find(&Digest::of(b"none")), None);
        assert_eq!(lookup.from(999 * 7 + 1).next(), None);
    }

    /// Pages that the calling thread has touched for the first time so far (proc_pid_stat(5), `minflt`).
    #[cfg(target_os = "linux")]
    fn pages_touched() -> u64 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        stat.rsplit_once(") ").unwrap().1.split(' ').nth(7).unwrap().parse().unwrap()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn little_is_read_of_a_record_of_very_many_objects() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        std::fs::write(&path, record(300_000).to_bytes().unwrap()).unwrap();
        let before = pages_touched();
        let lookup = Lookup::open(&path).unwrap().unwrap();
        assert_eq!(lookup.find(&placed(271_828).digest), Some(placed(271_828)));
        assert_eq!(lookup.from(271_828 * 7).nth(20), Some(placed(271_848)));
        // It has more than four thousand pages, and the kernel maps sixteen at once.
        let few = pages_touched() - before;
        assert!(few < 100, "{few} times something was read of the file");
    }

    #[test]
    fn no_damaged_record_leads_out_of_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let bytes = record(20).to_bytes().unwrap();
        for at in (0..bytes.len()).step_by(5) {
            let mut changed = bytes.clone();
            changed[at] ^= if at % 2 == 0 { 1 } else { 0x80 };
            std::fs::write(&path, &changed).unwrap();
            let Some(lookup) = Lookup::open(&path).unwrap() else { continue };
            for number in 0..20 {
                let wanted = placed(number).digest;
                assert!(lookup.find(&wanted).is_none_or(|found| found.digest == wanted));
                assert!(lookup.from(number).count() <= 20);
            }
        }
    }
}
