//! Trees in memory.

use std::collections::BTreeMap;

use kiln_contract::Digest;

use crate::TreeError;
use crate::directory::{Directory, Slot};
use crate::format::NAME_MAX;

/// Seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time {
    /// Negative before 1970.
    pub seconds: i64,
    /// Below 1,000,000,000; added to `seconds`.
    pub nanoseconds: u32,
}

/// Extended attributes by full name (`user.x`, `trusted.overlay.opaque`, `security.capability`).
///
/// Names are as an overlay over the image shows them; how those that begin with `trusted.overlay.` are written
/// is said at [`crate::escape_xattr_name`].
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// What every node has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// A device's number. Images have room for 12 bits of major and 20 of minor, as Linux has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

/// Files of up to this many bytes are kept in the tree itself, larger ones are objects. An object costs an
/// inode of its own in the store's file system and a redirect of 66 bytes here: below that it makes no sense.
pub const INLINE_LIMIT: usize = 64;

/// A regular file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// At most [`INLINE_LIMIT`] bytes.
    Inline(Vec<u8>),
    /// In the store.
    Object {
        /// Its name.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Its entries are the tree's business.
    Directory,
    /// A file.
    Regular(Data),
    /// A symbolic link to a path of 1 to 4095 bytes without NUL.
    Symlink(Vec<u8>),
    /// A character device; 0:0 is an overlay's whiteout.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
    /// A Unix socket's name.
    Socket,
}

/// A node of a [`Tree`]. It stays that node's even when the node is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

const NOT_A_DIRECTORY: u32 = u32::MAX;

#[derive(Debug)]
struct Stored {
    content: Content,
    attributes: Attributes,
    /// Names; zero for what was removed. For a directory just whether it is there: 1 or 0.
    names: u32,
    /// Index in `directories`.
    directory: u32,
}

/// A tree in memory, to be written.
///
/// An arena: about 140 bytes an entry, 10^6 entries in some 150 MB. Removing gives no memory back before the tree
/// goes. A [`NodeId`] that comes from another tree is a mistake that panics or names some other node.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Stored>,
    directories: Vec<Directory>,
    names: Vec<u8>,
    reachable: usize,
}

impl Default for Tree {
    /// An empty root, owned by root, mode 0755, of 1970.
    fn default() -> Self {
        Self::new(Attributes { mode: 0o755, ..Attributes::default() })
    }
}

/// A node as one sees it.
#[derive(Debug, Clone, Copy)]
pub struct Node<'t> {
    /// What it is.
    pub content: &'t Content,
    /// Its attributes.
    pub attributes: &'t Attributes,
    /// Number of links as `stat` tells it: names of a file; 2 and the number of subdirectories for a directory.
    /// 0 once removed.
    pub links: u32,
}

impl Tree {
    /// A tree with nothing but its root.
    pub fn new(root: Attributes) -> Self {
        let node = Stored { content: Content::Directory, attributes: root, names: 1, directory: 0 };
        Self { nodes: vec![node], directories: vec![Directory::default()], names: Vec::new(), reachable: 1 }
    }

    /// Adds a node.
    ///
    /// # Errors
    /// The name is bad or taken, `parent` is no directory or was removed, or there are 2^32 nodes.
    pub fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        content: Content,
        attributes: Attributes,
    ) -> Result<NodeId, TreeError> {
        self.check_free(parent, name)?;
        let id = u32::try_from(self.nodes.len()).map_err(|_| TreeError::Full(name.to_owned()))?;
        self.insert(parent, name, id)?;
        let directory = match content {
            Content::Directory => self.new_directory(parent),
            _ => NOT_A_DIRECTORY,
        };
        self.nodes.push(Stored { content, attributes, names: 1, directory });
        self.reachable += 1;
        Ok(NodeId(id))
    }

    /// A further name for a node that is not a directory.
    ///
    /// # Errors
    /// As [`Tree::add`]; and `node` is a directory or was removed.
    pub fn link(&mut self, parent: NodeId, name: &[u8], node: NodeId) -> Result<(), TreeError> {
        let target = &self.nodes[node.index()];
        if target.directory != NOT_A_DIRECTORY {
            return Err(TreeError::DirectoryLink(name.to_owned()));
        }
        if target.names == 0 {
            return Err(TreeError::Removed(name.to_owned()));
        }
        self.check_free(parent, name)?;
        self.insert(parent, name, node.0)?;
        self.nodes[node.index()].names += 1;
        Ok(())
    }

    /// Takes a name away; a directory with everything below it. Tells whether there was one.
    pub fn remove(&mut self, parent: NodeId, name: &[u8]) -> bool {
        let Some(directory) = self.directory_index(parent) else { return false };
        let Some(node) = self.directories[directory].remove(&self.names, name) else { return false };
        if self.nodes[node as usize].directory != NOT_A_DIRECTORY {
            self.directories[directory].subdirectories -= 1;
        }
        self.drop_name(node);
        true
    }

    /// The entry `name` of a directory.
    pub fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.directories[self.directory_index(parent)?].get(&self.names, name).map(NodeId)
    }

    /// Entries sorted by name (bytewise); none for what is not a directory.
    pub fn children(&self, dir: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let directory = self.directory_index(dir).map(|index| &self.directories[index]);
        directory
            .into_iter()
            .flat_map(Directory::iter)
            .map(|slot| (slot.name(&self.names), NodeId(slot.node)))
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> Node<'_> {
        let Stored { content, attributes, names, .. } = &self.nodes[id.index()];
        let links = match self.directory_index(id) {
            Some(index) if *names > 0 => 2 + self.directories[index].subdirectories,
            _ => *names,
        };
        Node { content, attributes, links }
    }

    /// Gives a node other attributes.
    pub fn set_attributes(&mut self, id: NodeId, attributes: Attributes) {
        self.nodes[id.index()].attributes = attributes;
    }

    /// Makes a node something else. A directory that becomes something else loses its entries; what has several
    /// names, or is the root, must not become a directory.
    ///
    /// # Panics
    /// If a node with several names is made a directory, or the root anything else.
    pub fn set_content(&mut self, id: NodeId, content: Content) {
        let was = self.nodes[id.index()].directory != NOT_A_DIRECTORY;
        let becomes = content == Content::Directory;
        if was && !becomes {
            assert!(id != NodeId::ROOT, "the root of a tree is a directory");
            let parent = self.parent_of(id);
            self.empty(id);
            if let Some(parent) = parent {
                self.directories[parent].subdirectories -= 1;
            }
            self.nodes[id.index()].directory = NOT_A_DIRECTORY;
        } else if !was && becomes {
            assert!(self.nodes[id.index()].names < 2, "a directory has one name");
            let index =
                u32::try_from(self.directories.len()).expect("there are fewer directories than nodes");
            if let Some(parent) = self.parent_of(id) {
                self.directories[parent].subdirectories += 1;
            }
            self.directories.push(Directory::default());
            self.nodes[id.index()].directory = index;
        }
        self.nodes[id.index()].content = content;
    }

    /// Number of nodes that can be reached, the root included. (Never zero: the root is always there.)
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.reachable
    }

    /// Whether there is nothing but the root.
    pub fn is_empty(&self) -> bool {
        self.reachable == 1
    }

    /// How many node ids were ever given: the length of a table by node.
    pub(crate) fn capacity(&self) -> usize {
        self.nodes.len()
    }

    /// The first path of a node, found by search: for messages.
    pub(crate) fn path_of(&self, wanted: NodeId) -> Vec<u8> {
        let mut stack = vec![(NodeId::ROOT, Vec::new())];
        while let Some((dir, path)) = stack.pop() {
            if dir == wanted {
                return if path.is_empty() { b"/".to_vec() } else { path };
            }
            for (name, id) in self.children(dir) {
                if id == wanted || self.nodes[id.index()].directory != NOT_A_DIRECTORY {
                    let path = [&path, &b"/"[..], name].concat();
                    if id == wanted {
                        return path;
                    }
                    stack.push((id, path));
                }
            }
        }
        b"?".to_vec()
    }

    fn directory_index(&self, id: NodeId) -> Option<usize> {
        let index = self.nodes[id.index()].directory;
        (index != NOT_A_DIRECTORY).then_some(index as usize)
    }

    /// The index of the directory that a node is in. A search, for changes of kind only.
    fn parent_of(&self, id: NodeId) -> Option<usize> {
        self.directories.iter().position(|directory| directory.iter().any(|slot| slot.node == id.0))
    }

    fn check_free(&self, parent: NodeId, name: &[u8]) -> Result<(), TreeError> {
        let bad = name.is_empty()
            || name.len() > NAME_MAX
            || name == b"."
            || name == b".."
            || name.iter().any(|byte| matches!(byte, b'/' | 0));
        if bad {
            return Err(TreeError::BadName(name.to_owned()));
        }
        let directory =
            self.directory_index(parent).ok_or_else(|| TreeError::NotADirectory(name.to_owned()))?;
        if self.nodes[parent.index()].names == 0 {
            return Err(TreeError::Removed(name.to_owned()));
        }
        match self.directories[directory].get(&self.names, name) {
            Some(_) => Err(TreeError::NameTaken(name.to_owned())),
            None => Ok(()),
        }
    }

    fn insert(&mut self, parent: NodeId, name: &[u8], node: u32) -> Result<(), TreeError> {
        let full = || TreeError::Full(name.to_owned());
        let name_at = u32::try_from(self.names.len()).map_err(|_| full())?;
        let name_len = u8::try_from(name.len()).map_err(|_| full())?;
        self.names.extend_from_slice(name);
        let directory = self.nodes[parent.index()].directory as usize;
        self.directories[directory].insert(&self.names, Slot { name_at, node, name_len });
        Ok(())
    }

    fn new_directory(&mut self, parent: NodeId) -> u32 {
        let index = self.directories.len() as u32;
        self.directories.push(Directory::default());
        let parent = self.nodes[parent.index()].directory as usize;
        self.directories[parent].subdirectories += 1;
        index
    }

    fn drop_name(&mut self, node: u32) {
        let stored = &mut self.nodes[node as usize];
        stored.names -= 1;
        if stored.names == 0 {
            self.reachable -= 1;
            if stored.directory != NOT_A_DIRECTORY {
                self.empty(NodeId(node));
            }
        }
    }

    fn empty(&mut self, id: NodeId) {
        let mut stack = vec![id.0];
        while let Some(node) = stack.pop() {
            let directory = self.nodes[node as usize].directory as usize;
            let gone = std::mem::take(&mut self.directories[directory]);
            for slot in gone.iter() {
                let stored = &mut self.nodes[slot.node as usize];
                stored.names -= 1;
                if stored.names == 0 {
                    self.reachable -= 1;
                    if stored.directory != NOT_A_DIRECTORY {
                        stack.push(slot.node);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(tree: &mut Tree, parent: NodeId, name: &[u8], content: Content) -> Result<NodeId, TreeError> {
        tree.add(parent, name, content, Attributes::default())
    }

    #[test]
    fn names_that_no_file_can_have_are_refused() {
        let mut tree = Tree::default();
        let file = add(&mut tree, NodeId::ROOT, b"file", Content::Fifo).unwrap();
        for name in [b"".as_slice(), b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            let expected = TreeError::BadName(name.to_owned());
            assert_eq!(add(&mut tree, NodeId::ROOT, name, Content::Fifo), Err(expected.clone()));
            assert_eq!(tree.link(NodeId::ROOT, name, file), Err(expected));
        }
        let taken = Err(TreeError::NameTaken(b"file".to_vec()));
        assert_eq!(add(&mut tree, NodeId::ROOT, b"file", Content::Directory), taken);
        assert_eq!(add(&mut tree, file, b"x", Content::Fifo), Err(TreeError::NotADirectory(b"x".to_vec())));
        assert_eq!(tree.link(NodeId::ROOT, b"x", NodeId::ROOT), Err(TreeError::DirectoryLink(b"x".to_vec())));
        assert_eq!(tree.len(), 2);
    }

    #[test]
    fn links_are_counted_as_names_come_and_go() {
        let mut tree = Tree::default();
        let dir = add(&mut tree, NodeId::ROOT, b"dir", Content::Directory).unwrap();
        let file = add(&mut tree, dir, b"file", Content::Fifo).unwrap();
        tree.link(NodeId::ROOT, b"again", file).unwrap();
        assert_eq!((tree.node(file).links, tree.node(NodeId::ROOT).links), (2, 3));
        assert!(tree.remove(NodeId::ROOT, b"dir"));
        assert!(!tree.remove(NodeId::ROOT, b"dir"));
        assert!(!tree.remove(file, b"x"));
        assert_eq!((tree.node(file).links, tree.node(NodeId::ROOT).links, tree.len()), (1, 2, 2));
        assert_eq!(tree.child(NodeId::ROOT, b"again"), Some(file));
        assert_eq!(add(&mut tree, dir, b"x", Content::Fifo), Err(TreeError::Removed(b"x".to_vec())));
        assert!(tree.remove(NodeId::ROOT, b"again"));
        assert_eq!(tree.link(NodeId::ROOT, b"x", file), Err(TreeError::Removed(b"x".to_vec())));
        assert!(tree.is_empty());
    }

    #[test]
    fn a_node_can_become_something_else() {
        let mut tree = Tree::default();
        let dir = add(&mut tree, NodeId::ROOT, b"x", Content::Directory).unwrap();
        add(&mut tree, dir, b"below", Content::Fifo).unwrap();
        tree.set_content(dir, Content::Socket);
        assert_eq!((tree.len(), tree.node(NodeId::ROOT).links, tree.node(dir).links), (2, 2, 1));
        assert_eq!(tree.children(dir).count(), 0);
        tree.set_content(dir, Content::Directory);
        assert_eq!((tree.node(NodeId::ROOT).links, tree.node(dir).links), (3, 2));
        add(&mut tree, dir, b"below", Content::Fifo).unwrap();
        assert_eq!(tree.path_of(tree.child(dir, b"below").unwrap()), b"/x/below");
    }

    #[test]
    fn entries_are_sorted_whatever_the_order_they_come_in() {
        let orders: [fn(u32) -> u32; 3] = [|n| n, |n| 5000 - n, |n| n * 2503 % 5003];
        for order in orders {
            let mut tree = Tree::default();
            for number in 1..5000 {
                let name = format!("{:05}", order(number));
                add(&mut tree, NodeId::ROOT, name.as_bytes(), Content::Fifo).unwrap();
            }
            let names: Vec<_> = tree.children(NodeId::ROOT).map(|(name, _)| name.to_owned()).collect();
            assert!(names.is_sorted() && names.len() == 4999);
            for name in names.iter().step_by(3) {
                assert!(tree.remove(NodeId::ROOT, name));
            }
            for (index, name) in names.iter().enumerate() {
                assert_eq!(tree.child(NodeId::ROOT, name).is_some(), index % 3 != 0);
            }
        }
    }
}
