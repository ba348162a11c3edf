//! Layers and stacks as tars.

use std::io::Write;

use kiln_contract::Digest;
use kiln_erofs::{Content, NodeId, Tree};

use crate::merge::{Caches, Marks};
use crate::split::{Split, SplitInfo};
use crate::tar::write::{write_below, write_tree};
use crate::tree_file::TreeFile;
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
        write_tree(&self.merge(layers, Caches::Used)?, &mut out, |digest| self.open_object(digest))?;
        Ok(())
    }

    /// Writes one directory of a stack's root filesystem as a tar in which it is `./`: what Docker fills a new volume with.
    /// `path` is absolute; links on the way to it are followed as in that root. Tells whether there is such a directory:
    /// without one, nothing is written.
    ///
    /// # Errors
    /// As [`Store::export_rootfs`].
    pub fn export_directory(&self, layers: &[Digest], path: &str, mut out: impl Write) -> Result<bool> {
        let merged = self.merged_tree(layers)?;
        let missing =
            || StoreError::Missing { what: "merged tree", digest: crate::format::stack_key(layers) };
        let tree = TreeFile::open(&merged)?.ok_or_else(missing)?.to_tree()?;
        let Some(top) = directory_at(&tree, path.as_bytes()) else { return Ok(false) };
        write_below(&tree, top, &mut out, |digest| self.open_object(digest))?;
        Ok(true)
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

/// The directory that a path leads to, links followed as a process whose root the tree is would follow them.
fn directory_at(tree: &Tree, path: &[u8]) -> Option<NodeId> {
    /// As path_resolution(7) has it.
    const MOST_LINKS: usize = 40;
    let parts =
        |path: &[u8]| path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect::<Vec<Vec<u8>>>();
    // What is still to be walked, the next part last; and where it is, from the root down.
    let (mut ahead, mut trail, mut links) = (parts(path), vec![NodeId::ROOT], 0);
    while let Some(part) = ahead.pop() {
        let here = *trail.last()?;
        match &*part {
            b"" | b"." => {}
            b".." => trail.truncate(trail.len().max(2) - 1),
            name => {
                let child = tree.child(here, name)?;
                match tree.node(child).content {
                    Content::Directory => trail.push(child),
                    Content::Symlink(target) => {
                        links += 1;
                        if links > MOST_LINKS {
                            return None;
                        }
                        if target.starts_with(b"/") {
                            trail.truncate(1);
                        }
                        ahead.extend(parts(target));
                    }
                    _ => return None,
                }
            }
        }
    }
    trail.last().copied()
}

#[cfg(test)]
mod tests {
    use kiln_erofs::Attributes;

    use super::*;

    #[test]
    fn directories_are_found_through_links_but_not_out_of_the_tree() {
        let mut tree = Tree::default();
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        let mut add = |parent, name: &str, content| {
            tree.add(parent, name.as_bytes(), content, attributes.clone()).unwrap()
        };
        let link = |target: &str| Content::Symlink(target.as_bytes().to_vec());
        let srv = add(NodeId::ROOT, "srv", Content::Directory);
        let data = add(srv, "data", Content::Directory);
        for (name, target) in
            [("absolute", "/srv"), ("relative", "srv/data"), ("loop", "loop"), ("out", "../../../srv")]
        {
            add(NodeId::ROOT, name, link(target));
        }
        add(srv, "up", link("../srv/./data"));
        add(srv, "pipe", Content::Fifo);
        for (path, found) in [
            ("/", Some(NodeId::ROOT)),
            ("/srv/data", Some(data)),
            ("/srv//data/", Some(data)),
            ("/absolute/data", Some(data)),
            ("/relative", Some(data)),
            ("/out/up", Some(data)),
            ("/../srv", Some(srv)),
            ("/loop", None),
            ("/srv/pipe", None),
            ("/none", None),
            ("/srv/data/none", None),
        ] {
            assert_eq!(directory_at(&tree, path.as_bytes()), found, "{path}");
        }
    }
}
