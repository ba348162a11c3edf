//! What one stack has that another has not.

use kiln_contract::{Change, ChangeKind, Digest};
use kiln_erofs::{Content, NodeId, Tree};

use crate::merge::Caches;
use crate::{Result, Store};

impl Store {
    /// What changes from the stack `from` to the stack `to`, sorted by path. A directory that was added or deleted comes
    /// with everything below it, as `docker diff` shows it. Times alone are a change of directories only if nothing
    /// else explains them, so they do not count there.
    ///
    /// # Errors
    /// A layer is missing or damaged.
    pub fn diff(&self, from: &[Digest], to: &[Digest]) -> Result<Vec<Change>> {
        let (from, to) = (self.merge(from, Caches::Used)?, self.merge(to, Caches::Used)?);
        let mut changes = compare(&from, &to);
        changes.sort();
        Ok(changes)
    }
}

fn compare(from: &Tree, to: &Tree) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut stack = vec![(Some(NodeId::ROOT), Some(NodeId::ROOT), Vec::new())];
    while let Some((old, new, path)) = stack.pop() {
        let kind = match (old, new) {
            (Some(old), Some(new)) => (!is_same(from, old, to, new)).then_some(ChangeKind::Modified),
            (None, _) => Some(ChangeKind::Added),
            (_, None) => Some(ChangeKind::Deleted),
        };
        if let Some(kind) = kind {
            let path = if path.is_empty() { b"/".to_vec() } else { path.clone() };
            changes.push(Change { path, kind });
        }
        let below = |name: &[u8]| [&path, &b"/"[..], name].concat();
        // A file that became a directory: its entries are new.
        let old = old.filter(|node| is_directory(from, *node));
        let new = new.filter(|node| is_directory(to, *node));
        if let Some(old) = old {
            for (name, node) in from.children(old) {
                let other = new.and_then(|new| to.child(new, name));
                stack.push((Some(node), other, below(name)));
            }
        }
        if let Some(new) = new {
            for (name, node) in to.children(new) {
                if old.and_then(|old| from.child(old, name)).is_none() {
                    stack.push((None, Some(node), below(name)));
                }
            }
        }
    }
    changes
}

fn is_directory(tree: &Tree, node: NodeId) -> bool {
    *tree.node(node).content == Content::Directory
}

fn is_same(from: &Tree, old: NodeId, to: &Tree, new: NodeId) -> bool {
    let (old, new) = (from.node(old), to.node(new));
    let (a, b) = (old.attributes, new.attributes);
    let same_time = a.mtime == b.mtime || *old.content == Content::Directory;
    old.content == new.content
        && (a.mode, a.uid, a.gid) == (b.mode, b.uid, b.gid)
        && a.xattrs == b.xattrs
        && same_time
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_erofs::{Attributes, Data};

    fn tree(files: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (path, content) in files {
            let mut here = NodeId::ROOT;
            let mut parts = path.split('/').peekable();
            while let Some(part) = parts.next() {
                here = match (tree.child(here, part.as_bytes()), parts.peek()) {
                    (Some(child), _) => child,
                    (None, next) => {
                        let data = Content::Regular(Data::Inline(content.as_bytes().to_vec()));
                        let content = if next.is_some() { Content::Directory } else { data };
                        tree.add(here, part.as_bytes(), content, Attributes::default()).unwrap()
                    }
                };
            }
        }
        tree
    }

    #[test]
    fn added_modified_and_deleted_paths_are_told() {
        let from = tree(&[("a/b", "1"), ("a/c", "1"), ("gone/x", "1"), ("was-file", "1")]);
        let to = tree(&[("a/b", "1"), ("a/c", "2"), ("new/y", "1"), ("was-file/z", "1")]);
        let mut changes = compare(&from, &to);
        changes.sort();
        let told: Vec<_> = changes
            .iter()
            .map(|change| format!("{:?} {}", change.kind, change.path.escape_ascii()))
            .collect();
        assert_eq!(
            told,
            [
                "Modified /a/c",
                "Deleted /gone",
                "Deleted /gone/x",
                "Added /new",
                "Added /new/y",
                "Modified /was-file",
                "Added /was-file/z",
            ]
        );
    }
}
