//! What a server of an editable view remembers.
//!
//! What lies in the tree needs no memory: its number is that of its inode. Only what is in the scratch has a [`Node`]: what
//! was copied up keeps the number that it had, everything else is numbered by its inode in the scratch.
//!
//! The kernel tells how often it was given a number when it forgets it. For what the scratch alone has, that is
//! counted, and its node goes with the last one. What was copied up stays, since the kernel may have been given
//! its number before; that is bounded by what was changed.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use kiln_erofs::Nid;

use super::super::space::ROOT;
use super::super::space::SCRATCH;

/// A number by which the kernel knows something.
pub(super) type Id = u64;

/// Something that is in the scratch.
#[derive(Debug)]
pub(super) struct Node {
    /// Its inode there.
    pub(super) inode: u64,
    pub(super) is_directory: bool,
    /// Of a directory: what of the tree is seen in it.
    pub(super) lower: Option<Nid>,
    /// Where it is, as far as is known: the directories' numbers, and names. None of the root and of what was removed.
    pub(super) names: Vec<(Id, Vec<u8>)>,
    /// Keeps what was removed while it is in use.
    pub(super) held: Option<OwnedFd>,
    /// How often the kernel was given its number.
    lookups: u64,
}

impl Node {
    pub(super) fn new(inode: u64, is_directory: bool, lower: Option<Nid>, name: Option<(Id, &[u8])>) -> Self {
        let names = name.into_iter().map(|(parent, name)| (parent, name.to_owned())).collect();
        Self { inode, is_directory, lower, names, held: None, lookups: 0 }
    }
}

/// All nodes.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    nodes: HashMap<Id, Node>,
    /// From inodes in the scratch to the numbers of what was copied up.
    renumbered: HashMap<u64, Id>,
}

impl Nodes {
    pub(super) fn get(&self, id: Id) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// The number of an inode of the scratch.
    pub(super) fn id_of(&self, inode: u64) -> Id {
        self.renumbered.get(&inode).copied().unwrap_or(SCRATCH | inode)
    }

    /// Whether a number stands for an inode of the tree, changed or not.
    pub(super) fn is_of_tree(id: Id) -> bool {
        id & SCRATCH == 0
    }

    /// Remembers a node under the number of an inode of the tree, or under one of its own.
    pub(super) fn insert(&mut self, id: Option<Id>, node: Node) -> Id {
        let own = SCRATCH | node.inode;
        let id = id.unwrap_or(own);
        if id != own {
            self.renumbered.insert(node.inode, id);
        }
        self.nodes.insert(id, node);
        id
    }

    /// Adds a name to a node that has it.
    pub(super) fn add_name(&mut self, id: Id, parent: Id, name: &[u8]) {
        if let Some(node) = self.nodes.get_mut(&id)
            && !node.names.iter().any(|(at, own)| *at == parent && own == name)
        {
            node.names.push((parent, name.to_owned()));
        }
    }

    /// Takes a name from a node. `held` keeps it for those who use it, if that was its last name.
    pub(super) fn remove_name(&mut self, id: Id, parent: Id, name: &[u8], held: Option<OwnedFd>) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.names.retain(|(at, own)| *at != parent || own != name);
        if node.names.is_empty() {
            node.held = held;
            if node.lookups == 0 && !Self::is_of_tree(id) {
                self.drop_node(id);
            }
        }
    }

    /// The kernel was given a number.
    pub(super) fn count(&mut self, id: Id) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups += 1;
        }
    }

    /// The kernel forgets a number that it was given `times` times. Whether it does not know it any more.
    pub(super) fn forget(&mut self, id: Id, times: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return true };
        node.lookups = node.lookups.saturating_sub(times);
        let forgotten = node.lookups == 0;
        let removed = node.names.is_empty() && id != ROOT;
        let unknown = node.lookups == 0 && !Self::is_of_tree(id);
        // The kernel forgets all at once. A directory stays as long as it has a name: others have their names in it.
        if removed && (unknown || Self::is_of_tree(id)) || unknown && !node.is_directory {
            self.drop_node(id);
        }
        forgotten
    }

    fn drop_node(&mut self, id: Id) {
        if let Some(node) = self.nodes.remove(&id)
            && self.renumbered.get(&node.inode) == Some(&id)
        {
            self.renumbered.remove(&node.inode);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_has_forgotten_is_forgotten_unless_it_was_copied_up() {
        let mut nodes = Nodes::default();
        let new = nodes.insert(None, Node::new(7, false, None, Some((ROOT, b"new"))));
        let copied = nodes.insert(Some(40), Node::new(8, false, None, Some((ROOT, b"copied"))));
        assert_eq!((nodes.id_of(7), nodes.id_of(8), copied), (new, 40, 40));
        nodes.count(new);
        nodes.count(new);
        nodes.forget(new, 1);
        assert!(nodes.get(new).is_some());
        nodes.forget(new, 1);
        nodes.forget(copied, 5);
        assert!(nodes.get(new).is_none() && nodes.get(copied).is_some());
        nodes.remove_name(copied, ROOT, b"copied", None);
        nodes.forget(copied, 1);
        assert!(nodes.get(copied).is_none());
        assert_ne!(nodes.id_of(8), 40);
    }

    #[test]
    fn a_removed_node_stays_as_long_as_the_kernel_knows_it() {
        let mut nodes = Nodes::default();
        let id = nodes.insert(None, Node::new(7, false, None, Some((ROOT, b"a"))));
        nodes.count(id);
        nodes.add_name(id, ROOT, b"b");
        nodes.add_name(id, ROOT, b"b");
        nodes.remove_name(id, ROOT, b"a", None);
        assert_eq!(nodes.get(id).unwrap().names, [(ROOT, b"b".to_vec())]);
        nodes.remove_name(id, ROOT, b"b", None);
        assert!(nodes.get(id).is_some());
        nodes.forget(id, 1);
        assert!(nodes.get(id).is_none());
    }
}
