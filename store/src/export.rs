//! Layers and stacks as tars.

use std::io::Write;

use kiln_contract::Digest;

use crate::merge::Marks;
use crate::split::{Split, SplitInfo};
use crate::tar::write::write_tree;
use crate::{Result, Store, StoreError};

impl Store {
    /// Writes a layer's tar: byte for byte the one that it came from; else one that is always the same, with the
    /// digest that [`Store::diff_id_of_layer`] tells.
    ///
    /// # Errors
    /// [`StoreError::Missing`] without such a layer or one of its objects; [`StoreError::Stream`] if `out` fails.
    pub fn export_tar(&self, layer: &Digest, mut out: impl Write) -> Result<()> {
        let path = self.layout.layer_split(layer);
        let split = Split::open(&path)?.ok_or(StoreError::Missing { what: "layer", digest: *layer })?;
        self.export(layer, &split, &mut out)
    }

    /// Writes the tar with this digest. Two tars can become the same layer; an image knows its own.
    ///
    /// # Errors
    /// As [`Store::export_tar`].
    pub fn export_diff(&self, diff_id: &Digest, mut out: impl Write) -> Result<()> {
        let missing = || StoreError::Missing { what: "layer with diff_id", digest: *diff_id };
        let layer = self.layer_of_diff_id(diff_id)?.ok_or_else(missing)?;
        for path in [self.layout.diff_split(diff_id), self.layout.layer_split(&layer)] {
            if let Some(split) = Split::open(&path)?
                && split.info().diff_id == *diff_id
            {
                return self.export(&layer, &split, &mut out);
            }
        }
        Err(missing())
    }

    /// Writes the root filesystem of a stack (layers, bottom first) as one tar: its merged tree, without whiteouts, always
    /// the same for the same stack. One layer that removes nothing gives its own tar, byte for byte.
    ///
    /// # Errors
    /// [`StoreError::Missing`] without one of the layers or objects; [`StoreError::Entry`] for a name that is too long for
    /// a tar; [`StoreError::Stream`] if `out` fails.
    pub fn export_rootfs(&self, layers: &[Digest], mut out: impl Write) -> Result<()> {
        if let [layer] = layers
            && !Marks::of(&self.layer_tree(layer)?)?.removes
        {
            return self.export_tar(layer, out);
        }
        write_tree(&self.merge(layers)?, &mut out, |digest| self.open_object(digest))?;
        Ok(())
    }

    pub(crate) fn split_of_diff(&self, diff_id: &Digest) -> Result<Option<SplitInfo>> {
        let path = self.layout.diff_split(diff_id);
        Ok(Split::open(&path)?.map(|split| split.info()))
    }

    pub(crate) fn export(&self, layer: &Digest, split: &Split<'_>, out: &mut impl Write) -> Result<()> {
        let open = |digest: &Digest| self.open_object(digest);
        if split.info().from_tree {
            write_tree(&self.layer_tree(layer)?.to_tree()?, out, open)?;
            return Ok(());
        }
        split.write(out, open)
    }
}
