//! zstd:chunked, containers-storage's form of layers of which a part can be had alone.
//!
//! ```text
//! frames      headers of the tar, up to the first file
//! frames      the bytes of one file          ┐ again and again; together, decompressed, the tar
//! frames      headers, padding               ┘
//! skippable   the table of contents: JSON, compressed with zstd
//! skippable   tar-split: empty here (whoever needs it takes the layer whole)
//! skippable   footer of 64 bytes: where the two are, and a magic
//! ```
//! To every other program it is a zstd layer: decoders pass over skippable frames (RFC 8878 §3.1.2). Where the table is, and the
//! SHA-256 of its compressed form, say annotations of the layer's descriptor, so that the manifest's digest covers it.
//!
//! The [table](toc) has an entry for each of the tar's, in its order. One field is Kiln's own, `kilnData`: the bytes (base64)
//! of files so small that Kiln's trees hold them, so that a tree can be made from the table alone; others pass over it. A table
//! cannot tell everything that a tar can: names that are no UTF-8, sparse files, a name twice. So who [writes](write) a layer
//! makes the tree from its table, and if that is not the tree of the layer there is no table, and the layer is one of plain zstd.

pub(crate) mod read;
pub(crate) mod toc;
pub(crate) mod write;

use kiln_contract::Digest;
use kiln_store::{TOC_DIGEST, TOC_POSITION};
use oci_spec::image::Descriptor;

/// What containers-storage takes for a table, compressed and not: 150 MiB.
pub(crate) const TOC_MOST: u64 = 150 << 20;
/// The only type of table there is.
const TYPE: u64 = 1;
/// Magic and length of a skippable frame.
const SKIPPABLE: u64 = 8;

/// Where a layer's table of contents is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TocPlace {
    /// SHA-256 of the compressed table.
    pub(crate) digest: Digest,
    /// In the blob.
    pub(crate) offset: u64,
    /// Compressed.
    pub(crate) length: u64,
    /// Uncompressed.
    pub(crate) unpacked: u64,
}

impl TocPlace {
    /// As a descriptor's annotations tell it. `None` if they tell of none.
    ///
    /// # Errors
    /// What they tell makes no sense; in words.
    pub(crate) fn of(descriptor: &Descriptor) -> std::result::Result<Option<Self>, String> {
        let Some(annotations) = descriptor.annotations() else { return Ok(None) };
        let (Some(digest), Some(position)) = (annotations.get(TOC_DIGEST), annotations.get(TOC_POSITION))
        else {
            return Ok(None);
        };
        let digest =
            digest.parse().map_err(|error| format!("the digest of its table of contents: {error}"))?;
        let wrong = || format!("`{}` is no place of a table of contents", position.escape_debug());
        let numbers: Vec<u64> =
            position.split(':').map(|text| text.parse().map_err(|_| wrong())).collect::<Result<_, _>>()?;
        let &[offset, length, unpacked, kind] = numbers.as_slice() else { return Err(wrong()) };
        if kind != TYPE {
            return Err(format!("its table of contents is of type {kind}, and {TYPE} is known"));
        }
        if length > TOC_MOST || unpacked > TOC_MOST {
            return Err(format!(
                "its table of contents has {length} bytes, unpacked {unpacked}; at most {TOC_MOST} are read"
            ));
        }
        let end = offset.checked_add(length);
        if offset < SKIPPABLE || length == 0 || end.is_none_or(|end| end > descriptor.size()) {
            return Err("its table of contents would lie outside of it".to_owned());
        }
        Ok(Some(Self { digest, offset, length, unpacked }))
    }

    /// Says it in a descriptor's annotations.
    pub(crate) fn annotate(&self, descriptor: &mut Descriptor) {
        let position = format!("{}:{}:{}:{TYPE}", self.offset, self.length, self.unpacked);
        let mut annotations = descriptor.annotations().clone().unwrap_or_default();
        annotations.insert(TOC_DIGEST.to_owned(), self.digest.to_string());
        annotations.insert(TOC_POSITION.to_owned(), position);
        descriptor.set_annotations(Some(annotations));
    }

    /// Where the files' frames end.
    pub(crate) fn files_end(&self) -> u64 {
        self.offset - SKIPPABLE
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use kiln_contract::Home;
    use kiln_store::{ImportLimits, Store};
    use proptest::prelude::*;
    use tar_core::EntryType;
    use tar_core::builder::EntryBuilder;

    use super::*;

    /// An entry: kind, name, link, how many bytes, and of what.
    type Made = (u8, String, String, usize, u8);

    fn made() -> impl Strategy<Value = Made> {
        let name = prop_oneof![
            4 => "[abc](/[abc]){0,2}",
            1 => "[\u{1}-\u{ffff}]{1,40}",
            1 => "(x{30}/){1,9}y",
            1 => "[ab]/\\.wh\\.[ab]",
        ];
        let size =
            prop_oneof![Just(0_usize), 1..70_usize, 500..3000_usize, Just(1 << 20), Just((1 << 20) + 1)];
        (0..6_u8, name, "[abc](/[abc]){0,2}", size, any::<u8>())
    }

    fn tar(entries: &[Made]) -> Vec<u8> {
        let mut tar = Vec::new();
        for (kind, name, link, size, byte) in entries {
            let (kind, data) = match kind {
                0 => (EntryType::Directory, vec![]),
                1 => (EntryType::Symlink, vec![]),
                2 => (EntryType::Link, vec![]),
                // Not all of it compresses alike.
                _ => (EntryType::Regular, (0..*size).map(|at| byte.wrapping_mul((at >> 6) as u8)).collect()),
            };
            let mut builder = EntryBuilder::new_ustar();
            builder.path(name.as_bytes()).mode(0o644).unwrap();
            builder.entry_type(kind).size(data.len() as u64).unwrap().mtime(1).unwrap();
            builder.link_name(link.as_bytes());
            tar.extend_from_slice(&builder.finish_bytes());
            tar.extend_from_slice(&data);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.resize(tar.len() + 1024, 0);
        tar
    }

    fn unzstd(bytes: &[u8]) -> Vec<u8> {
        let mut all = Vec::new();
        zstd::Decoder::new(bytes).unwrap().read_to_end(&mut all).unwrap();
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

        #[test]
        fn packed_layers_are_their_tars_and_their_tables_lead_to_every_file(
            entries in prop::collection::vec(made(), 0..12)
        ) {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(&Home::at(directory.path())).unwrap();
            let tar = tar(&entries);
            // Links to nothing, files that are directories: what is no layer is not packed.
            let Ok(layer) = store.import_tar(&tar[..], None, ImportLimits::default()) else { return Ok(()) };
            let (blob, place) = write::pack(&store, &layer.diff_id, Vec::new()).unwrap();
            prop_assert!(unzstd(&blob) == tar);
            let Ok(place) = place else { return Ok(()) };
            let packed = &blob[place.offset as usize..(place.offset + place.length) as usize];
            prop_assert_eq!(Digest::of(packed), place.digest);
            let json = unzstd(packed);
            prop_assert_eq!(json.len() as u64, place.unpacked);
            toc::entries(&json, &mut |entry| {
                if entry.kind == "reg" && entry.size > 0 {
                    let bytes = unzstd(&blob[entry.offset as usize..entry.end_offset as usize]);
                    if Digest::of(&bytes).to_string() != entry.digest || bytes.len() as u64 != entry.size {
                        return Err(format!("`{}` is another", entry.name));
                    }
                }
                Ok(())
            }).unwrap();
        }
    }

    #[test]
    fn the_footer_says_where_the_table_is() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(directory.path())).unwrap();
        let tar = tar(&[(3, "a".into(), String::new(), 1000, 7)]);
        let layer = store.import_tar(&tar[..], None, ImportLimits::default()).unwrap();
        let (blob, place) = write::pack(&store, &layer.diff_id, Vec::new()).unwrap();
        let place = place.unwrap();
        let footer = blob.last_chunk::<64>().unwrap();
        let numbers: Vec<u64> =
            footer[..56].chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
        let split = place.offset + place.length + SKIPPABLE;
        assert_eq!(numbers, [place.offset, place.length, place.unpacked, TYPE, split, 0, 0]);
        assert_eq!(&footer[56..], b"GNUlInUx");
    }
}
