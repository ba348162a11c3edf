//! A layer's tree as it grows from the entries of a tar.
//!
//! Nothing here touches the host's file system: a path leads through the tree and nowhere else, so that an entry
//! cannot get out of it, whatever it says.
//!
//! - Absolute names begin at the root of the tree; `.` and empty components mean nothing; `..` is applied
//!   to the text first, as Docker does, and must not lead above the root.
//! - A symbolic link on the way to an entry is followed *inside the tree*, as containerd does (`fs.RootPath`):
//!   absolute targets begin at the tree's root, `..` stops there, at most 40 links.
//! - Missing directories on the way are made, mode 0755, owned by root, and marked ([`overlay::IMPLIED`]). So is the root
//!   until an entry states it.
//! - The last of several entries with one name wins; a directory over a directory only changes attributes.

use kiln_erofs::{Attributes, Content, NodeId, Tree};

use crate::limits::Budget;
use crate::overlay;
use crate::{Result, StoreError};

/// As many links as Linux follows on one path.
const LINKS: usize = 40;

/// The longest name of an entry. Linux takes paths of 4096 bytes at once; deeper trees can be walked.
pub(crate) const PATH: usize = 64 << 10;

#[derive(Debug)]
pub(crate) struct LayerTree {
    tree: Tree,
    budget: Budget,
    /// The directory of the entry before, which is mostly that of the next, too.
    last: Option<(Vec<u8>, NodeId)>,
}

/// What an entry's name asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// The root itself.
    Root,
    /// A file or directory.
    Entry,
    /// The removal of one.
    Whiteout,
    /// That its directory be opaque.
    Opaque,
    /// Something that aufs left there.
    Aufs,
}

impl LayerTree {
    pub(crate) fn new(budget: Budget) -> Self {
        Self { tree: Tree::new(implied()), budget, last: None }
    }

    /// What the tree may still take.
    pub(crate) fn budget(&mut self) -> &mut Budget {
        &mut self.budget
    }

    pub(crate) fn into_tree(self) -> Tree {
        self.tree
    }

    /// What the entry `path` is by its name.
    pub(crate) fn classify(path: &[u8]) -> Result<Name> {
        let components = clean(path, path)?;
        Ok(match components.last() {
            None => Name::Root,
            Some(&name) if name == overlay::OPAQUE_NAME => Name::Opaque,
            Some(name) if name.starts_with(overlay::AUFS_PREFIX) => Name::Aufs,
            Some(name) if name.starts_with(overlay::WHITEOUT_PREFIX) => Name::Whiteout,
            Some(_) => Name::Entry,
        })
    }

    /// What leads to the entry `path`, without what means nothing.
    pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
        clean(path, path)
    }

    /// Adds an entry, or a whiteout or opaque mark if its name says so. Returns the node that now has the name.
    pub(crate) fn add(&mut self, path: &[u8], content: Content, attributes: Attributes) -> Result<NodeId> {
        let components = clean(path, path)?;
        let Some((&name, parents)) = components.split_last() else {
            if content != Content::Directory {
                return Err(refuse(path, "it would replace the root directory"));
            }
            self.state(NodeId::ROOT, attributes)?;
            return Ok(NodeId::ROOT);
        };
        let parent = self.directory(path, parents)?;
        if name == overlay::OPAQUE_NAME {
            self.mark_opaque(parent)?;
            return Ok(parent);
        }
        if name.starts_with(overlay::AUFS_PREFIX) {
            return Ok(parent);
        }
        if let Some(name) = name.strip_prefix(overlay::WHITEOUT_PREFIX) {
            return self.whiteout(path, parent, name);
        }
        match self.tree.child(parent, name) {
            Some(node) if is_directory(&self.tree, node) && content == Content::Directory => {
                self.state(node, attributes)?;
                Ok(node)
            }
            Some(node) => {
                let was_removed = overlay::is_whiteout(self.tree.node(node).content);
                let is_directory = content == Content::Directory;
                self.tree.remove(parent, name);
                self.last = None;
                let node = self.insert(path, parent, name, content, attributes)?;
                // Removed and made again: what lower layers have in it does not show.
                if was_removed && is_directory {
                    self.mark_opaque(node)?;
                }
                Ok(node)
            }
            None => self.insert(path, parent, name, content, attributes),
        }
    }

    /// Adds a further name for the node at `target`.
    pub(crate) fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let describe =
            |what: &str| refuse(path, &format!("its link target `{}` {what}", target.escape_ascii()));
        let to = clean(path, target).map_err(|_| describe("leads out of the layer"))?;
        let node = self.find(path, &to)?.ok_or_else(|| describe("is not in the layer"))?;
        if is_directory(&self.tree, node) {
            return Err(describe("is a directory"));
        }
        let components = clean(path, path)?;
        let (&name, parents) =
            components.split_last().ok_or_else(|| refuse(path, "it would replace the root directory"))?;
        let parent = self.directory(path, parents)?;
        match self.tree.child(parent, name) {
            Some(same) if same == node => return Ok(()),
            Some(_) => {
                self.tree.remove(parent, name);
                self.last = None;
                if self.tree.node(node).links == 0 {
                    return Err(describe("was in what it replaces"));
                }
            }
            None => {}
        }
        self.budget.link(name)?;
        self.tree.link(parent, name, node).map_err(|error| refuse(path, &error.to_string()))
    }

    /// Gives a node another content, once it is known.
    pub(crate) fn set_content(&mut self, node: NodeId, content: Content) {
        self.tree.set_content(node, content);
    }

    fn insert(
        &mut self,
        path: &[u8],
        parent: NodeId,
        name: &[u8],
        content: Content,
        attributes: Attributes,
    ) -> Result<NodeId> {
        self.budget.node(name, &content, &attributes)?;
        self.tree.add(parent, name, content, attributes).map_err(|error| refuse(path, &error.to_string()))
    }

    /// Gives a directory that is there the attributes of its entry.
    fn state(&mut self, directory: NodeId, attributes: Attributes) -> Result<()> {
        let opaque = overlay::is_opaque(&self.tree.node(directory).attributes.xattrs);
        self.budget.attributes(&attributes)?;
        self.tree.set_attributes(directory, attributes);
        if opaque { self.mark_opaque(directory) } else { Ok(()) }
    }

    /// `.wh.name`: removes the name from lower layers, but nothing that this layer has (image-spec, layer.md).
    fn whiteout(&mut self, path: &[u8], parent: NodeId, name: &[u8]) -> Result<NodeId> {
        match self.tree.child(parent, name) {
            Some(node) => {
                if is_directory(&self.tree, node) {
                    self.mark_opaque(node)?;
                }
                Ok(node)
            }
            None => self.insert(path, parent, name, overlay::whiteout(), Attributes::default()),
        }
    }

    fn mark_opaque(&mut self, directory: NodeId) -> Result<()> {
        let attributes = self.tree.node(directory).attributes;
        if overlay::is_opaque(&attributes.xattrs) {
            return Ok(());
        }
        let mut attributes = attributes.clone();
        attributes.xattrs.insert(overlay::OPAQUE.to_vec(), b"y".to_vec());
        self.budget.attributes(&attributes)?;
        self.tree.set_attributes(directory, attributes);
        Ok(())
    }

    /// The directory at `components`, made where it is missing.
    fn directory(&mut self, path: &[u8], components: &[&[u8]]) -> Result<NodeId> {
        let key = components.join(&b'/');
        if let Some((last, node)) = &self.last
            && *last == key
        {
            return Ok(*node);
        }
        let node = self.walk(path, components, true)?.expect("a walk that makes directories ends in one");
        if !is_directory(&self.tree, node) {
            return Err(refuse(path, "something on its way is not a directory"));
        }
        self.last = Some((key, node));
        Ok(node)
    }

    /// The node at `components`, links on the way (but not the last) followed.
    fn find(&mut self, path: &[u8], components: &[&[u8]]) -> Result<Option<NodeId>> {
        let Some((&name, parents)) = components.split_last() else { return Ok(Some(NodeId::ROOT)) };
        let Some(parent) = self.walk(path, parents, false)? else { return Ok(None) };
        let found = self.tree.child(parent, name);
        Ok(found.filter(|node| !overlay::is_whiteout(self.tree.node(*node).content)))
    }

    fn walk(&mut self, path: &[u8], components: &[&[u8]], make: bool) -> Result<Option<NodeId>> {
        // The way from the root to here, for `..` in links.
        let mut way = vec![NodeId::ROOT];
        let mut ahead: Vec<Vec<u8>> = Vec::new();
        let mut given = components.iter();
        let mut links = 0;
        loop {
            let owned;
            let component: &[u8] = match ahead.pop() {
                Some(component) => {
                    owned = component;
                    &owned
                }
                None => match given.next() {
                    Some(component) => component,
                    None => return Ok(way.last().copied()),
                },
            };
            let here = *way.last().expect("the root is never left");
            match component {
                b"" | b"." => continue,
                b".." => {
                    if way.len() > 1 {
                        way.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let child = self.tree.child(here, component);
            let removed = child.is_some_and(|child| overlay::is_whiteout(self.tree.node(child).content));
            let next = match child {
                Some(child) if !removed => child,
                _ if make => {
                    if removed {
                        self.tree.remove(here, component);
                    }
                    let mut attributes = implied();
                    if removed {
                        // Removed and made again: nothing of lower layers shows, their directory's attributes neither.
                        attributes.xattrs = [(overlay::OPAQUE.to_vec(), b"y".to_vec())].into();
                    }
                    self.insert(path, here, component, Content::Directory, attributes)?
                }
                _ => return Ok(None),
            };
            match self.tree.node(next).content {
                Content::Directory => way.push(next),
                Content::Symlink(target) => {
                    links += 1;
                    if links > LINKS {
                        return Err(refuse(path, "there are too many symbolic links on its way"));
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    let target: Vec<Vec<u8>> =
                        target.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
                    ahead.extend(target.into_iter().rev());
                }
                _ if make => {
                    let what = format!("`{}` on its way is not a directory", component.escape_ascii());
                    return Err(refuse(path, &what));
                }
                _ => return Ok(None),
            }
        }
    }
}

/// What a directory gets that the tar has no entry for.
pub(crate) fn implied() -> Attributes {
    let xattrs = [(overlay::IMPLIED.to_vec(), Vec::new())].into();
    Attributes { mode: 0o755, xattrs, ..Attributes::default() }
}

fn is_directory(tree: &Tree, node: NodeId) -> bool {
    *tree.node(node).content == Content::Directory
}

fn refuse(path: &[u8], what: &str) -> StoreError {
    let path = path[..path.len().min(1024)].to_vec();
    StoreError::Entry { path, what: what.to_owned() }
}

/// The components of `path`, an entry's name or link target, without `.`, `..` and empty ones.
fn clean<'p>(entry: &[u8], path: &'p [u8]) -> Result<Vec<&'p [u8]>> {
    if path.len() > PATH {
        return Err(refuse(entry, &format!("a name of {} bytes (at most {PATH})", path.len())));
    }
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop().ok_or_else(|| refuse(entry, "it leads out of the layer"))?;
            }
            name => components.push(name),
        }
    }
    Ok(components)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ImportLimits;

    fn attributes(mode: u32) -> Attributes {
        Attributes { mode, ..Attributes::default() }
    }

    fn paths(tree: &Tree) -> Vec<String> {
        let mut found = Vec::new();
        let mut stack = vec![(NodeId::ROOT, String::new())];
        while let Some((dir, path)) = stack.pop() {
            for (name, node) in tree.children(dir) {
                let path = format!("{path}/{}", name.escape_ascii());
                let here = tree.node(node);
                found.push(match here.content {
                    Content::Directory if overlay::is_opaque(&here.attributes.xattrs) => {
                        format!("{path} opaque")
                    }
                    Content::Directory if overlay::is_implied(&here.attributes.xattrs) => {
                        format!("{path} implied")
                    }
                    content if overlay::is_whiteout(content) => format!("{path} removed"),
                    Content::Symlink(to) => format!("{path} -> {}", to.escape_ascii()),
                    Content::Directory => format!("{path}/"),
                    _ => format!("{path} {:o}x{}", here.attributes.mode, here.links),
                });
                if *here.content == Content::Directory {
                    stack.push((node, path));
                }
            }
        }
        found.sort();
        found
    }

    /// `f` file, `d` directory, `l` symlink, `h` hard link: name, and target or mode.
    fn build(entries: &[(char, &str, &str)]) -> Result<Vec<String>> {
        let mut layer = LayerTree::new(Budget::of_layer(ImportLimits::default()));
        for (kind, path, extra) in entries {
            let mode = u32::from_str_radix(extra, 8).unwrap_or(0o644);
            let content = match kind {
                'f' => Content::Fifo,
                'd' => Content::Directory,
                'l' => Content::Symlink(extra.as_bytes().to_vec()),
                _ => {
                    layer.hard_link(path.as_bytes(), extra.as_bytes())?;
                    continue;
                }
            };
            layer.add(path.as_bytes(), content, attributes(mode))?;
        }
        Ok(paths(&layer.into_tree()))
    }

    #[test]
    fn entries_land_where_docker_and_containerd_put_them() {
        type Case<'a> = (&'a [(char, &'a str, &'a str)], &'a [&'a str]);
        let cases: &[Case<'_>] = &[
            (&[('f', "/etc/../x", "600")], &["/x 600x1"]),
            (&[('f', "./a/./b//c", "600")], &["/a implied", "/a/b implied", "/a/b/c 600x1"]),
            (&[('d', "a", "755"), ('f', "a/b", "600"), ('d', "a/", "700")], &["/a/", "/a/b 600x1"]),
            (&[('f', "a", "600"), ('f', "a", "644")], &["/a 644x1"]),
            (&[('d', "a", "755"), ('f', "a/b", "600"), ('f', "a", "644")], &["/a 644x1"]),
            (&[('f', "a", "600"), ('d', "a", "755")], &["/a/"]),
            (&[('f', "a", "600"), ('h', "b", "a"), ('h', "c", "/b")], &["/a 600x3", "/b 600x3", "/c 600x3"]),
            (&[('f', "a", "600"), ('h', "a", "a")], &["/a 600x1"]),
            (&[('f', ".wh.a", "")], &["/a removed"]),
            (&[('f', ".wh.a", ""), ('f', "a", "600")], &["/a 600x1"]),
            (&[('f', "a", "600"), ('f', ".wh.a", "")], &["/a 600x1"]),
            (&[('f', ".wh.a", ""), ('d', "a", "755")], &["/a opaque"]),
            (&[('d', "a", "755"), ('f', ".wh.a", "")], &["/a opaque"]),
            (&[('f', ".wh.a", ""), ('f', "a/b", "600")], &["/a opaque", "/a/b 600x1"]),
            (&[('f', "a/.wh..wh..opq", "")], &["/a opaque"]),
            (&[('f', "a/.wh..wh..opq", ""), ('d', "a", "700")], &["/a opaque"]),
            (&[('d', "a", "755"), ('f', "a/.wh..wh.plnk", "")], &["/a/"]),
            // A symlink, then a file through it: it stays inside.
            (
                &[('l', "a", "/etc"), ('f', "a/passwd", "600")],
                &["/a -> /etc", "/etc implied", "/etc/passwd 600x1"],
            ),
            (&[('l', "a", "../../.."), ('f', "a/x", "600")], &["/a -> ../../..", "/x 600x1"]),
            (
                &[('d', "d", "755"), ('l', "d/up", ".."), ('f', "d/up/x", "600")],
                &["/d/", "/d/up -> ..", "/x 600x1"],
            ),
        ];
        for (entries, expected) in cases {
            assert_eq!(build(entries).unwrap(), *expected, "{entries:?}");
        }
    }

    #[test]
    fn what_leads_out_or_nowhere_is_refused_by_name() {
        type Case<'a> = (&'a [(char, &'a str, &'a str)], &'a str);
        let long = "n".repeat(256);
        let deep = "d/".repeat(40_000);
        let cases: &[Case<'_>] = &[
            (&[('f', "../x", "600")], "`../x`: it leads out of the layer"),
            (&[('f', "a/../../x", "600")], "it leads out of the layer"),
            (&[('f', "/", "600")], "it would replace the root directory"),
            (
                &[('h', "a", "../../etc/shadow")],
                "`a`: its link target `../../etc/shadow` leads out of the layer",
            ),
            (&[('h', "a", "b")], "`a`: its link target `b` is not in the layer"),
            (&[('f', ".wh.b", ""), ('h', "a", "b")], "its link target `b` is not in the layer"),
            (&[('d', "b", "755"), ('h', "a", "b")], "is a directory"),
            (&[('f', "b/c", "600"), ('h', "b", "b/c")], "was in what it replaces"),
            (&[('f', "a", "600"), ('f', "a/b", "600")], "`a` on its way is not a directory"),
            (&[('l', "a", "b"), ('l', "b", "a"), ('f', "a/c", "600")], "too many symbolic links"),
            (&[('f', &long, "600")], "cannot be the name of a file"),
            (&[('f', &deep, "600")], "a name of 80000 bytes"),
            (&[('f', ".wh.", "")], "cannot be the name of a file"),
            (&[('f', ".wh...", "")], "cannot be the name of a file"),
        ];
        for (entries, expected) in cases {
            let error = build(entries).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} / {expected}");
        }
    }
}
