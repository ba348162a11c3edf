//! What overlayfs leaves in an upper directory (`Documentation/filesystems/overlayfs.rst`).

use std::cell::OnceCell;
use std::path::Path;

use kiln_contract::Digest;
use kiln_erofs::{Content, Data, FileType as NodeType, ImageError, Inode, NodeId, Tree, Xattrs};
use rustix::fs::FileType;

use crate::directory::HostEntry;
use crate::limits::Budget;
use crate::tree_file::TreeFile;
use crate::{Result, Store, StoreError, overlay};

/// Whose id is to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdKind {
    /// A user's.
    User,
    /// A group's.
    Group,
}

/// How an upper directory is read.
pub(crate) struct Upper<'u> {
    pub(crate) lower: Lower<'u>,
    pub(crate) map: &'u dyn Fn(u32, IdKind) -> u32,
    /// What overlayfs's xattrs begin with: in a mount with `userxattr` it uses those of users. Only one of the two is
    /// believed: a container's processes can set `user.overlay.redirect` themselves.
    prefix: &'static [u8],
}

impl<'u> Upper<'u> {
    pub(crate) fn new(lower: Lower<'u>, map: &'u dyn Fn(u32, IdKind) -> u32) -> Self {
        let prefix: &[u8] = if has_trusted_xattrs() { b"trusted.overlay." } else { b"user.overlay." };
        Self { lower, map, prefix }
    }

    fn xattr<'x>(&self, xattrs: &'x Xattrs, name: &[u8]) -> Option<&'x [u8]> {
        xattrs.get([self.prefix, name].concat().as_slice()).map(Vec::as_slice)
    }

    /// `y` for an opaque directory, `x` for one in which whiteouts are xattrs, else empty.
    pub(crate) fn opaque<'x>(&self, xattrs: &'x Xattrs) -> &'x [u8] {
        self.xattr(xattrs, b"opaque").unwrap_or_default()
    }

    pub(crate) fn is_whiteout(&self, entry: &HostEntry<'_>, parent_opaque: &[u8]) -> bool {
        match FileType::from_raw_mode(entry.stat.st_mode) {
            FileType::CharacterDevice => entry.stat.st_rdev == 0,
            FileType::RegularFile => {
                parent_opaque == b"x"
                    && entry.stat.st_size == 0
                    && self.xattr(&entry.xattrs, b"whiteout").is_some()
            }
            _ => false,
        }
    }

    /// Where in the lower tree something really lies that was renamed: an absolute path, or another name in `parent`.
    pub(crate) fn redirect(&self, xattrs: &Xattrs, name: &[u8], parent: Option<&[u8]>) -> Option<Vec<u8>> {
        let redirect = self.xattr(xattrs, b"redirect")?;
        if redirect.starts_with(b"/") {
            return Some(redirect.to_owned());
        }
        let path = [parent?, b"/", redirect].concat();
        (redirect != name).then_some(path)
    }

    /// The data of a file of which the upper directory has only the attributes.
    pub(crate) fn lower_data(
        &self,
        entry: &HostEntry<'_>,
        parent: Option<&[u8]>,
        path: &Path,
    ) -> Result<Option<Data>> {
        if self.xattr(&entry.xattrs, b"metacopy").is_none() {
            return Ok(None);
        }
        let from = self
            .redirect(&entry.xattrs, entry.name, parent)
            .or_else(|| Some([parent?, b"/", entry.name].concat()));
        match from.map(|from| self.lower.file(&from)).transpose()?.flatten() {
            Some(data) => Ok(Some(data)),
            None => Err(StoreError::Damaged {
                path: path.to_owned(),
                what: "its data are in a lower layer that does not have it".to_owned(),
            }),
        }
    }

    /// The xattrs that a file really has: without overlayfs's own, and with what the kernel escaped as it was.
    pub(crate) fn own_xattrs(&self, xattrs: Xattrs) -> Xattrs {
        let mut own = Xattrs::new();
        for (name, mut value) in xattrs {
            let name = match name.strip_prefix(self.prefix) {
                Some(rest) => match rest.strip_prefix(b"overlay.") {
                    Some(rest) => [self.prefix, rest].concat(),
                    None => continue,
                },
                None => name,
            };
            if name == b"security.capability" {
                self.unbind_capability(&mut value);
            }
            own.insert(overlay::own_xattr(&name), value);
        }
        own
    }

    /// File capabilities that are bound to a user namespace (version 3: its root's id comes last) become unbound ones
    /// (version 2) if that root is the image's root: `capabilities(7)`, «File capability extended attribute versioning».
    fn unbind_capability(&self, value: &mut Vec<u8>) {
        const V2: u8 = 2;
        const V3: u8 = 3;
        if value.len() != 24 || value[3] != V3 {
            return;
        }
        let root = u32::from_le_bytes([value[20], value[21], value[22], value[23]]);
        if (self.map)(root, IdKind::User) == 0 {
            value.truncate(20);
            value[3] = V2;
        }
    }
}

/// Whether this process sees `trusted.` xattrs: it is root, and not only in a user namespace.
fn has_trusted_xattrs() -> bool {
    let whole = |map: String| map.split_whitespace().eq(["0", "0", "4294967295"]);
    rustix::process::geteuid().is_root() && std::fs::read_to_string("/proc/self/uid_map").map_or(true, whole)
}

/// The layers below an upper directory. Their merged tree is opened only when it is needed.
pub(crate) struct Lower<'l> {
    store: &'l Store,
    layers: &'l [Digest],
    tree: OnceCell<TreeFile>,
}

impl<'l> Lower<'l> {
    pub(crate) fn new(store: &'l Store, layers: &'l [Digest]) -> Self {
        Self { store, layers, tree: OnceCell::new() }
    }

    fn tree(&self) -> Result<&TreeFile> {
        if let Some(tree) = self.tree.get() {
            return Ok(tree);
        }
        let path = self.store.merged_tree(self.layers)?;
        let tree = TreeFile::open(&path)?
            .ok_or_else(|| StoreError::Damaged { path: path.clone(), what: "it went away".to_owned() })?;
        Ok(self.tree.get_or_init(|| tree))
    }

    fn find<'t>(&self, tree: &'t TreeFile, path: &[u8]) -> Result<Option<Inode<'t>>> {
        let find = || {
            let image = kiln_erofs::Image::open(tree.bytes())?;
            let mut here = image.root()?;
            for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
                if here.file_type() != NodeType::Directory {
                    return Ok(None);
                }
                let Some(entry) = here.lookup(name)? else { return Ok(None) };
                here = image.inode(entry.nid)?;
            }
            Ok(Some(here))
        };
        find().map_err(|source| tree.damaged(source))
    }

    fn file(&self, path: &[u8]) -> Result<Option<Data>> {
        let tree = self.tree()?;
        let Some(inode) = self.find(tree, path)? else { return Ok(None) };
        if inode.file_type() != NodeType::Regular {
            return Ok(None);
        }
        inode.data().map(Some).map_err(|source| tree.damaged(source))
    }

    /// Copies what is in the lower directory `path` into a directory of a layer. Files stay what they are by name.
    pub(crate) fn copy_directory(
        &self,
        path: &[u8],
        to: &mut Tree,
        directory: NodeId,
        budget: &mut Budget,
    ) -> Result<()> {
        let file = self.tree()?;
        let missing = || StoreError::Damaged {
            path: path.escape_ascii().to_string().into(),
            what: "a renamed directory is not in the lower layers".to_owned(),
        };
        let from = self.find(file, path)?.filter(|from| from.file_type() == NodeType::Directory);
        let from = from.ok_or_else(missing)?;
        let mut copy = || -> std::result::Result<(), CopyError> {
            let image = kiln_erofs::Image::open(file.bytes())?;
            let mut linked = std::collections::HashMap::new();
            let mut stack = vec![(from, directory)];
            while let Some((from, here)) = stack.pop() {
                for entry in from.entries(0) {
                    let entry = entry?;
                    let inode = image.inode(entry.nid)?;
                    let refused =
                        |_| ImageError::Inode { nid: entry.nid, what: "it has no place in a layer" };
                    if let Some(node) = linked.get(&entry.nid) {
                        budget.link(entry.name)?;
                        to.link(here, entry.name, *node).map_err(refused)?;
                        continue;
                    }
                    let (content, attributes) = inode.described()?;
                    let is_directory = content == Content::Directory;
                    budget.node(entry.name, &content, &attributes)?;
                    let node = to.add(here, entry.name, content, attributes).map_err(refused)?;
                    if is_directory {
                        stack.push((inode, node));
                    } else if inode.links() > 1 {
                        linked.insert(entry.nid, node);
                    }
                }
            }
            Ok(())
        };
        copy().map_err(|error| error.of(file))
    }
}

/// Why a directory cannot be copied from a merged tree.
enum CopyError {
    /// It cannot be read.
    Image(ImageError),
    /// It would be too much.
    Store(StoreError),
}

impl From<ImageError> for CopyError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<StoreError> for CopyError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl CopyError {
    /// Says of which file it is.
    fn of(self, file: &TreeFile) -> StoreError {
        match self {
            Self::Image(source) => file.damaged(source),
            Self::Store(error) => error,
        }
    }
}
