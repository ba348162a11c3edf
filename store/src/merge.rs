//! Stacks become trees.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use kiln_contract::Digest;
use kiln_erofs::{FileType, Layers, MergeError, Met, Tree};

use crate::error::Context as _;
use crate::format::stack_key;
use crate::limits::{Budget, ImportLimits};
use crate::staging::Staging;
use crate::tree_file::TreeFile;
use crate::{Result, Store, StoreError, overlay};

impl Store {
    /// The merged tree of a stack (layers, bottom first): what a container's root is mounted from. It is kept, and made
    /// only if it is not there; then it begins from that of the longest part of the stack that is.
    ///
    /// # Errors
    /// A layer is missing or damaged, or the tree cannot be written; [`StoreError::TooLarge`] for layers that each were
    /// within the limits, and together are not.
    pub fn merged_tree(&self, layers: &[Digest]) -> Result<PathBuf> {
        let path = self.layout.merged_tree(&stack_key(layers));
        if path.exists() {
            return Ok(path);
        }
        let staging = Staging::new(&self.layout)?;
        let new = staging.path("tree");
        match layers {
            // One layer without marks is its own merged tree.
            [layer] if Marks::of(&self.layer_tree(layer)?)?.none() => {
                let layer = self.layout.layer(layer);
                std::fs::hard_link(&layer, &new).doing("link", &layer)?;
            }
            _ => {
                let file = File::create_new(&new).doing("create", &new)?;
                self.merge_into(layers, Caches::Used, ImportLimits::default(), &file)?;
                // A torn tree would be mounted as it is.
                file.sync_data().doing("write to disk", &new)?;
            }
        }
        std::fs::rename(&new, &path).doing("rename to", &path)?;
        Ok(path)
    }

    /// The digest that a stack's merged tree must have. Caches are not believed.
    pub(crate) fn merged_digest(&self, layers: &[Digest]) -> Result<Digest> {
        if let [layer] = layers
            && Marks::of(&self.layer_tree(layer)?)?.none()
        {
            return Ok(*layer);
        }
        let mut hasher = kiln_contract::Hasher::new();
        self.merge_into(layers, Caches::Ignored, ImportLimits::default(), &mut hasher)?;
        Ok(hasher.finish())
    }

    /// A stack's merged tree in memory, where it may take as much as a layer's.
    pub(crate) fn merge(&self, layers: &[Digest], caches: Caches) -> Result<Tree> {
        Ok(self.merge_within(layers, caches, ImportLimits::default())?.0)
    }

    /// A stack's merged tree, and what it left of the limits.
    pub(crate) fn merge_within(
        &self,
        layers: &[Digest],
        caches: Caches,
        limits: ImportLimits,
    ) -> Result<(Tree, Budget)> {
        let staging = Staging::new(&self.layout)?;
        let path = staging.path("tree");
        let file = File::create_new(&path).doing("create", &path)?;
        let budget = self.merge_into(layers, caches, limits, &file)?;
        let missing = StoreError::Missing { what: "merged tree", digest: stack_key(layers) };
        Ok((TreeFile::open(&path)?.ok_or(missing)?.to_tree()?, budget))
    }

    /// Merges a stack without bringing it into memory. Returns what it left of the limits.
    fn merge_into(
        &self,
        layers: &[Digest],
        caches: Caches,
        limits: ImportLimits,
        out: impl Write,
    ) -> Result<Budget> {
        let mut files = Vec::with_capacity(layers.len());
        let mut rest = layers;
        if caches == Caches::Used {
            for below in (2..layers.len()).rev() {
                let path = self.layout.merged_tree(&stack_key(&layers[..below]));
                if let Some(file) = TreeFile::open(&path)?
                    && file.image().is_ok()
                {
                    files.push(file);
                    rest = &layers[below..];
                    break;
                }
            }
        }
        for layer in rest {
            files.push(self.layer_tree(layer)?);
        }
        let images: Vec<_> = files.iter().map(TreeFile::image).collect::<Result<_>>()?;
        let mut budget = Budget::of_stack(limits, images.len());
        let scratch = || tempfile::tempfile_in(self.layout.tmp());
        let stack = Layers { images: &images, implied: overlay::IMPLIED };
        let mut charge = |layer: usize, name: &[u8], met: Met<'_>| {
            budget.in_layer(layer);
            let charged = match met {
                Met::Link => budget.link(name),
                Met::Node(inode) => {
                    let (content, attributes) =
                        inode.described().map_err(|error| files[layer].damaged(error))?;
                    budget.node(name, &content, &attributes)
                }
            };
            charged.map_err(Stopped::Store)
        };
        kiln_erofs::merge(stack, &scratch, &mut charge, out).map_err(|error| match error {
            Stopped::Store(error) => error,
            Stopped::Merge(MergeError::Image { layer, source }) => files[layer].damaged(source),
            Stopped::Merge(MergeError::Write(error)) => error.into(),
            Stopped::Merge(MergeError::Scratch(source)) => {
                StoreError::Io { doing: "use a temporary file in", path: self.layout.tmp(), source }
            }
        })?;
        Ok(budget)
    }
}

/// Whether a merge may begin from the merged tree of a part of its stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caches {
    /// It may.
    Used,
    /// It may not: it is made to see whether they are right.
    Ignored,
}

/// What ends a merge before its end.
enum Stopped {
    Store(StoreError),
    Merge(MergeError),
}

impl From<MergeError> for Stopped {
    fn from(error: MergeError) -> Self {
        Self::Merge(error)
    }
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// What a layer's tree has that a merged tree has not.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Marks {
    /// Whiteouts and opaque directories.
    pub(crate) removes: bool,
    /// Directories that the tar had no entry for.
    pub(crate) implies: bool,
}

impl Marks {
    /// Looks through a layer's tree.
    pub(crate) fn of(file: &TreeFile) -> Result<Self> {
        let image = file.image()?;
        let look = || {
            let mut marks = Self::default();
            let mut stack = vec![image.root()?];
            while let Some(directory) = stack.pop() {
                marks.removes |= directory.xattr(overlay::OPAQUE)?.is_some();
                marks.implies |= directory.xattr(overlay::IMPLIED)?.is_some();
                for entry in directory.entries(0) {
                    let entry = entry?;
                    match entry.file_type {
                        FileType::Directory => stack.push(image.inode(entry.nid)?),
                        FileType::CharDevice => marks.removes |= image.inode(entry.nid)?.is_whiteout(),
                        _ => {}
                    }
                }
            }
            Ok(marks)
        };
        look().map_err(|source| file.damaged(source))
    }

    fn none(self) -> bool {
        !self.removes && !self.implies
    }
}
