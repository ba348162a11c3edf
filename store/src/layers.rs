//! The layers that there are, and what is in them.

use kiln_contract::Digest;

use crate::gc::{digest_of_name, objects_of};
use crate::tag::files_below;
use crate::{Image, Result, Store};

/// What a layer has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerContents {
    /// Files with bytes of their own in the store: those that are larger than a few words.
    pub objects: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// How many of these files are not here (yet): [`Store::fetch_object`] brings them.
    pub absent_objects: u64,
    /// Bytes of those that are not here.
    pub absent_bytes: u64,
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

    /// The images that have one of these layers, and it is one of which not all files need be here.
    ///
    /// # Errors
    /// Images or records cannot be read.
    pub fn lazy_among(&self, layers: &[Digest]) -> Result<Vec<Image>> {
        let lazy: Vec<_> = layers.iter().filter(|layer| !self.layout.layer_split(layer).exists()).collect();
        if lazy.is_empty() {
            return Ok(Vec::new());
        }
        let mut images = Vec::new();
        for id in self.image_ids()? {
            // Manifests of one image may name other tables of contents, and so have other layers.
            for manifest in self.manifests_of(&id)? {
                if let Ok(Some(image)) = self.image_of_manifest(&manifest)
                    && !image.whole
                    && image.layers.iter().any(|layer| lazy.contains(&layer))
                {
                    images.push(image);
                }
            }
        }
        Ok(images)
    }

    /// What a layer has. Reads its tree.
    ///
    /// # Errors
    /// [`StoreError::Missing`](crate::StoreError::Missing); its tree is damaged.
    pub fn layer_contents(&self, layer: &Digest) -> Result<LayerContents> {
        let objects = objects_of(&self.layer_tree(layer)?)?;
        let mut contents = LayerContents::default();
        for (object, size) in objects {
            contents.objects += 1;
            contents.bytes = contents.bytes.saturating_add(size);
            if !self.layout.object(&object).exists() {
                contents.absent_objects += 1;
                contents.absent_bytes = contents.absent_bytes.saturating_add(size);
            }
        }
        Ok(contents)
    }
}
