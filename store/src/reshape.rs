//! A layer that came as a tar, with less in it, or with earlier times.

use kiln_erofs::{Content, NodeId, Tree};

use crate::import::{ImportedLayer, Replaced, StagedLayer};
use crate::source_date::SourceDate;
use crate::{Result, Selection, Store};

impl Store {
    /// Makes a layer of what `selection` takes of another, with no time that `date` does not allow. The other is not
    /// changed; where nothing has to be, it is the layer.
    pub(crate) fn reshape(
        &self,
        layer: ImportedLayer,
        selection: &Selection,
        date: SourceDate,
    ) -> Result<ImportedLayer> {
        // What most commits want: nobody need look at the tree.
        if selection.is_all() && date == SourceDate::default() {
            return Ok(layer);
        }
        let mut tree = self.layer_tree(&layer.layer)?.to_tree()?;
        if !clamp(&mut tree, date) && selection.is_all() {
            return Ok(layer);
        }
        selection.apply(&mut tree)?;
        let replaced = Replaced::default();
        let staged = StagedLayer::new(self, &replaced)?;
        Ok(ImportedLayer { new_object_bytes: layer.new_object_bytes, ..staged.publish_tree(tree)? })
    }
}

/// Tells whether a time was too late.
fn clamp(tree: &mut Tree, date: SourceDate) -> bool {
    let mut clamped = false;
    let mut pending = vec![NodeId::ROOT];
    while let Some(id) = pending.pop() {
        let node = tree.node(id);
        let mtime = date.clamp(node.attributes.mtime);
        let is_directory = *node.content == Content::Directory;
        if mtime != node.attributes.mtime {
            let mut attributes = node.attributes.clone();
            attributes.mtime = mtime;
            tree.set_attributes(id, attributes);
            clamped = true;
        }
        if is_directory {
            pending.extend(tree.children(id).map(|(_, child)| child));
        }
    }
    clamped
}
