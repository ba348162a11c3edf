//! Stacks become trees.

use std::collections::HashMap;
use std::path::PathBuf;

use kiln_contract::Digest;
use kiln_erofs::{Attributes, Content, Device, FileType, ImageError, Inode, Nid, NodeId, Tree};

use crate::error::Context as _;
use crate::format::stack_key;
use crate::import::write_tree;
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
                write_tree(&self.merge(layers)?, &new)?;
                // A torn tree would be mounted as it is.
                let file = std::fs::File::open(&new).doing("open", &new)?;
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
        let mut tree = Tree::default();
        self.put_on(&mut tree, layers)?;
        let mut hasher = kiln_contract::Hasher::new();
        kiln_erofs::write_metadata(&tree, &mut hasher)?;
        Ok(hasher.finish())
    }

    /// A stack's merged tree in memory. It may take as much as a layer's; but a stack has many layers.
    pub(crate) fn merge(&self, layers: &[Digest]) -> Result<Tree> {
        Ok(self.merge_within(layers, ImportLimits::default())?.0)
    }

    /// A stack's merged tree, and what it left of the limits.
    pub(crate) fn merge_within(&self, layers: &[Digest], limits: ImportLimits) -> Result<(Tree, Budget)> {
        let mut budget = Budget::of_stack(limits);
        for below in (2..layers.len()).rev() {
            if let Some(file) = TreeFile::open(&self.layout.merged_tree(&stack_key(&layers[..below])))?
                && let Ok(mut tree) = file.to_tree()
            {
                charge_all(&mut budget, &tree)?;
                self.put_on_within(&mut tree, &layers[below..], &mut budget)?;
                return Ok((tree, budget));
            }
        }
        let mut tree = Tree::default();
        self.put_on_within(&mut tree, layers, &mut budget)?;
        Ok((tree, budget))
    }

    /// Puts layers on a tree, which may take what is usual.
    pub(crate) fn put_on(&self, tree: &mut Tree, layers: &[Digest]) -> Result<()> {
        self.put_on_within(tree, layers, &mut Budget::of_stack(ImportLimits::default()))
    }

    pub(crate) fn put_on_within(
        &self,
        tree: &mut Tree,
        layers: &[Digest],
        budget: &mut Budget,
    ) -> Result<()> {
        for layer in layers {
            let file = self.layer_tree(layer)?;
            budget.next_layer();
            put_layer_on(tree, &file, budget).map_err(|error| error.of(&file))?;
        }
        Ok(())
    }
}

fn charge_all(budget: &mut Budget, tree: &Tree) -> Result<()> {
    let mut stack = vec![NodeId::ROOT];
    while let Some(directory) = stack.pop() {
        for (name, id) in tree.children(directory) {
            let node = tree.node(id);
            budget.node(name, node.content, node.attributes)?;
            if *node.content == Content::Directory {
                stack.push(id);
            }
        }
    }
    Ok(())
}

/// Why one tree cannot be put on another.
pub(crate) enum MergeError {
    /// It cannot be read.
    Image(ImageError),
    /// Together they are too large.
    Store(StoreError),
}

impl From<ImageError> for MergeError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<StoreError> for MergeError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl MergeError {
    /// Says of which file it is.
    pub(crate) fn of(self, file: &TreeFile) -> StoreError {
        match self {
            Self::Image(source) => file.damaged(source),
            Self::Store(error) => error,
        }
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
                        FileType::CharDevice => marks.removes |= is_whiteout(&image.inode(entry.nid)?),
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

fn is_whiteout(inode: &Inode<'_>) -> bool {
    inode.file_type() == FileType::CharDevice && inode.device() == Some(Device { major: 0, minor: 0 })
}

fn put_layer_on(
    tree: &mut Tree,
    file: &TreeFile,
    budget: &mut Budget,
) -> std::result::Result<(), MergeError> {
    let image = kiln_erofs::Image::open(file.bytes())?;
    let refused = |nid| move |_| ImageError::Inode { nid, what: "it has no place in the merged tree" };
    // Files with several names, by inode: links across layers go by name, those inside one by this.
    let mut linked: HashMap<Nid, NodeId> = HashMap::new();
    let root = image.root()?;
    put_directory(tree, NodeId::ROOT, root.attributes()?);
    let mut stack = vec![(root, NodeId::ROOT)];
    while let Some((directory, here)) = stack.pop() {
        for entry in directory.entries(0) {
            let entry = entry?;
            let inode = image.inode(entry.nid)?;
            let below = tree.child(here, entry.name);
            if is_whiteout(&inode) {
                tree.remove(here, entry.name);
                continue;
            }
            if inode.file_type() == FileType::Directory {
                let attributes = inode.attributes()?;
                let node = match below.filter(|below| *tree.node(*below).content == Content::Directory) {
                    Some(node) => {
                        budget.attributes(&attributes)?;
                        put_directory(tree, node, attributes);
                        node
                    }
                    None => {
                        budget.node(entry.name, &Content::Directory, &attributes)?;
                        tree.remove(here, entry.name);
                        tree.add(here, entry.name, Content::Directory, without_marks(attributes))
                            .map_err(refused(entry.nid))?
                    }
                };
                stack.push((inode, node));
                continue;
            }
            tree.remove(here, entry.name);
            if let Some(node) = linked.get(&entry.nid) {
                budget.link(entry.name)?;
                tree.link(here, entry.name, *node).map_err(refused(entry.nid))?;
                continue;
            }
            let (content, attributes) = (content_of(&inode)?, inode.attributes()?);
            budget.node(entry.name, &content, &attributes)?;
            let node = tree.add(here, entry.name, content, attributes).map_err(refused(entry.nid))?;
            if inode.links() > 1 {
                linked.insert(entry.nid, node);
            }
        }
    }
    Ok(())
}

/// Puts a layer's directory over one that is there, the root among them. An opaque one hides what that holds; one that
/// the layer only implied leaves it its attributes.
fn put_directory(tree: &mut Tree, node: NodeId, attributes: Attributes) {
    if overlay::is_opaque(&attributes.xattrs) {
        let hidden: Vec<Vec<u8>> = tree.children(node).map(|(name, _)| name.to_vec()).collect();
        hidden.iter().for_each(|name| {
            tree.remove(node, name);
        });
    }
    if !overlay::is_implied(&attributes.xattrs) {
        tree.set_attributes(node, without_marks(attributes));
    }
}

/// Attributes without the layer's marks, which a merged tree has not.
fn without_marks(mut attributes: Attributes) -> Attributes {
    attributes.xattrs.remove(overlay::OPAQUE);
    attributes.xattrs.remove(overlay::IMPLIED);
    attributes
}

/// What an inode is, for a tree. The entries of a directory are not looked at.
pub(crate) fn content_of(inode: &Inode<'_>) -> std::result::Result<Content, ImageError> {
    Ok(match inode.file_type() {
        FileType::Directory => Content::Directory,
        FileType::Regular => Content::Regular(inode.data()?),
        FileType::Symlink => Content::Symlink(inode.symlink_target()?.to_vec()),
        FileType::CharDevice => Content::CharDevice(device(inode)?),
        FileType::BlockDevice => Content::BlockDevice(device(inode)?),
        FileType::Fifo => Content::Fifo,
        FileType::Socket => Content::Socket,
    })
}

fn device(inode: &Inode<'_>) -> std::result::Result<Device, ImageError> {
    inode.device().ok_or(ImageError::Inode { nid: inode.nid(), what: "a device without a number" })
}
