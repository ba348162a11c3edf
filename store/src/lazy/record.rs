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
//!      SHA-256 of all before it
//! ```
//! Numbers are little-endian. Of another version, or removed, the layer counts as missing, and the next pull brings it.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use kiln_contract::Digest;
use oci_spec::image::Descriptor;
use serde::{Deserialize, Serialize};

use super::{LazySource, Placed, key};
use crate::error::Context as _;
use crate::image::digest_of;
use crate::{Result, StoreError};

const MAGIC: &[u8; 8] = b"KILNLAZY";
const VERSION: u32 = 1;
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

    /// Where an object lies.
    pub(crate) fn find(&self, digest: &Digest) -> Option<&Placed> {
        let at = self.objects.binary_search_by(|object| object.digest.cmp(digest)).ok()?;
        self.objects.get(at)
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let head = serde_json::to_vec(&self.head).map_err(io::Error::from);
        let head =
            head.map_err(|source| StoreError::Stream { doing: "write a lazy layer's record", source })?;
        let mut bytes = Vec::with_capacity(START + head.len() + 8 + self.objects.len() * OBJECT + 32);
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
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        Ok(bytes)
    }

    /// Reads a record whole; `None` if there is none.
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
            let (head, length) = head(body)?;
            let (count, objects) = body.get(START + length..)?.split_first_chunk::<8>()?;
            let number = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?));
            if number(count)?.checked_mul(OBJECT as u64)? != objects.len() as u64 {
                return None;
            }
            let object = |bytes: &[u8]| {
                Some(Placed {
                    digest: Digest::from_bytes(bytes[..32].try_into().ok()?),
                    size: number(&bytes[32..40])?,
                    offset: number(&bytes[40..48])?,
                    length: number(&bytes[48..])?,
                })
            };
            let objects = objects.chunks_exact(OBJECT).map(object).collect::<Option<Vec<_>>>()?;
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

    #[test]
    fn a_record_comes_back_as_it_was_and_a_changed_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let blob: Descriptor = serde_json::from_value(serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "size": 7,
            "digest": Digest::of(b"blob").to_string(), "annotations": {"a": "b".repeat(6000)},
        }))
        .unwrap();
        let (toc, diff_id) = (Digest::of(b"toc"), Digest::of(b"tar"));
        let source = LazySource { diff_id, blob: blob.clone(), toc, files_end: 7 };
        let mut objects: Vec<Placed> = (0..5_u64)
            .map(|n| Placed { digest: Digest::of(&[n as u8]), size: n, offset: n * 3, length: 2 })
            .collect();
        objects.sort();
        let record = Record::new(Digest::of(b"layer"), &source, objects.clone()).unwrap();
        let bytes = record.to_bytes().unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let back = Record::open(&path).unwrap().unwrap();
        assert_eq!((back.objects, &back.head.blob), (objects.clone(), &blob));
        assert_eq!(Record::head(&path).unwrap().unwrap().layer, Digest::of(b"layer"));
        assert_eq!(record.find(&objects[3].digest), Some(&objects[3]));
        assert_eq!(record.find(&Digest::of(b"none")), None);
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
    }
}
