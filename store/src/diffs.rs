//! What is known of tars: the layer that each became, and its compressed forms.

use std::str::FromStr as _;

use kiln_contract::Digest;
use oci_spec::image::{Descriptor, DescriptorBuilder, MediaType};

use crate::lazy::{TOC_DIGEST, TOC_POSITION};
use crate::split::{Split, SplitInfo};
use crate::{Result, Store, StoreError, lines};

impl Store {
    /// The layer that came from the tar with this digest, if the store has it.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn layer_of_diff_id(&self, diff_id: &Digest) -> Result<Option<Digest>> {
        Ok(self.recorded_layer(diff_id)?.filter(|layer| self.layout.layer(layer).exists()))
    }

    /// The layer that the tar with this digest became, whether it is there or not.
    pub(crate) fn recorded_layer(&self, diff_id: &Digest) -> Result<Option<Digest>> {
        let lines = lines::read(&self.layout.diff(diff_id))?;
        Ok(lines.iter().rev().find_map(|line| line.strip_prefix("layer ")?.parse().ok()))
    }

    /// The digest of the tar that [`Store::export_tar`] gives for a layer.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if there is no such layer.
    pub fn diff_id_of_layer(&self, layer: &Digest) -> Result<Digest> {
        Ok(self.split_of_layer(layer)?.diff_id)
    }

    pub(crate) fn split_of_layer(&self, layer: &Digest) -> Result<SplitInfo> {
        self.split_info(layer)?.ok_or(StoreError::Missing { what: "layer", digest: *layer })
    }

    pub(crate) fn split_info(&self, layer: &Digest) -> Result<Option<SplitInfo>> {
        let path = self.layout.layer_split(layer);
        Ok(Split::open(&path)?.map(|split| split.info()))
    }

    /// Compressed blobs that are known to hold the tar with this digest, from pulls and pushes: for mounts across
    /// repositories, and so that nothing is compressed twice.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn blobs_of_diff_id(&self, diff_id: &Digest) -> Result<Vec<Descriptor>> {
        Ok(lines::read(&self.layout.diff(diff_id))?.iter().filter_map(|line| blob_of_line(line)).collect())
    }

    /// Records that `blob` holds the tar with this digest. What its annotations say of a table of contents is not kept: of
    /// what came from elsewhere it is not known whether the table tells what the tar holds.
    ///
    /// # Errors
    /// The record cannot be written, or the blob's digest is no SHA-256.
    pub fn remember_blob(&self, diff_id: &Digest, blob: &Descriptor) -> Result<()> {
        self.record_blob(diff_id, blob, "")
    }

    /// The same of a blob that was packed here, with its table of contents.
    ///
    /// # Errors
    /// As [`Store::remember_blob`].
    pub fn remember_packed_blob(&self, diff_id: &Digest, blob: &Descriptor) -> Result<()> {
        self.record_blob(diff_id, blob, &toc_words(blob).unwrap_or_default())
    }

    fn record_blob(&self, diff_id: &Digest, blob: &Descriptor, toc: &str) -> Result<()> {
        let digest: Digest = blob.digest().to_string().parse()?;
        let media_type = blob.media_type().to_string();
        if media_type.is_empty() || media_type.contains(char::is_whitespace) {
            let why = format!("`{}` is no media type", media_type.escape_debug());
            return Err(StoreError::BadImage { what: "descriptor", why });
        }
        lines::add(&self.layout.diff(diff_id), &format!("blob {media_type} {digest} {}{toc}", blob.size()))?;
        lines::add(&self.layout.diff_of_blob(&digest), &diff_id.to_string())
    }

    /// The digest of the tar that a compressed blob holds, if that is known.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn diff_id_of_blob(&self, blob: &Digest) -> Result<Option<Digest>> {
        let lines = lines::read(&self.layout.diff_of_blob(blob))?;
        Ok(lines.last().and_then(|line| line.parse().ok()))
    }

    pub(crate) fn record_diff(&self, diff_id: &Digest, layer: &Digest) -> Result<()> {
        if self.recorded_layer(diff_id)?.is_some_and(|before| before != *layer) {
            self.forget_stacks()?;
        }
        lines::add(&self.layout.diff(diff_id), &format!("layer {layer}"))
    }
}

fn blob_of_line(line: &str) -> Option<Descriptor> {
    let mut words = line.strip_prefix("blob ")?.split(' ');
    let (media_type, digest, size) = (words.next()?, words.next()?, words.next()?);
    let mut blob = DescriptorBuilder::default()
        .media_type(MediaType::from(media_type))
        .digest(oci_spec::image::Digest::from_str(digest).ok()?)
        .size(size.parse::<u64>().ok()?)
        .build()
        .ok()?;
    if let (Some(toc), Some(position)) = (words.next(), words.next()) {
        let annotations = [(TOC_DIGEST, toc), (TOC_POSITION, position)];
        blob.set_annotations(Some(annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into()));
    }
    Some(blob)
}

/// What a blob's line says of its table of contents; nothing of what has no such, or one that fits no line.
fn toc_words(blob: &Descriptor) -> Option<String> {
    let annotations = blob.annotations().as_ref()?;
    let toc: Digest = annotations.get(TOC_DIGEST)?.parse().ok()?;
    let position = annotations.get(TOC_POSITION)?;
    let fits = position.len() <= 100 && position.bytes().all(|byte| byte.is_ascii_digit() || byte == b':');
    fits.then(|| format!(" {toc} {position}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_contract::Home;

    #[test]
    fn blobs_are_remembered_as_the_format_says() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path())).unwrap();
        let (diff_id, blob) = (Digest::of(b"tar"), Digest::of(b"gzip"));
        let line = format!("blob application/vnd.oci.image.layer.v1.tar+gzip {blob} 42");
        let descriptor = blob_of_line(&line).unwrap();
        for _ in 0..2 {
            store.remember_blob(&diff_id, &descriptor).unwrap();
        }
        assert_eq!(store.blobs_of_diff_id(&diff_id).unwrap(), [descriptor]);
        assert_eq!(store.diff_id_of_blob(&blob).unwrap(), Some(diff_id));
        assert_eq!(store.layer_of_diff_id(&diff_id).unwrap(), None);
        let record = std::fs::read_to_string(dir.path().join("store/diffs").join(diff_id.hex())).unwrap();
        assert_eq!(record, format!("{line}\n"));
        let back = std::fs::read_to_string(dir.path().join("store/diffs/blobs").join(blob.hex())).unwrap();
        assert_eq!(back, format!("{diff_id}\n"));
    }
}
