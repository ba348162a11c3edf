//! The layers that there are, and what is in them.

use kiln_contract::Digest;

use crate::gc::{digest_of_name, objects_of};
use crate::tag::files_below;
use crate::{Result, Store};

/// What a layer has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerContents {
    /// Files with bytes of their own in the store: those that are larger than a few words.
    pub objects: u64,
    /// Bytes of these.
    pub bytes: u64,
}

impl Store {
    /// All layers, sorted by digest.
    ///
    /// # Errors
    /// Their directory cannot be read.
    pub fn layers(&self) -> Result<Vec<Digest>> {
        let files = files_below(&self.layout.layers())?;
        let trees =
            files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "erofs"));
        let mut layers: Vec<Digest> = trees.filter_map(|path| digest_of_name(path)).collect();
        layers.sort();
        Ok(layers)
    }

    /// What a layer has. Reads its tree.
    ///
    /// # Errors
    /// [`StoreError::Missing`](crate::StoreError::Missing); its tree is damaged.
    pub fn layer_contents(&self, layer: &Digest) -> Result<LayerContents> {
        let objects = objects_of(&self.layer_tree(layer)?)?;
        Ok(LayerContents {
            objects: objects.len() as u64,
            bytes: objects.iter().map(|(_, size)| *size).fold(0, u64::saturating_add),
        })
    }
}
