//! What of a change becomes part of a layer, and what the layer hides besides.

use std::path::Path;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use kiln_erofs::{Content, NodeId, Tree};

use crate::layer_tree::implied;
use crate::overlay;

/// A pattern or a path that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` cannot be used: {why}")]
pub struct SelectionError {
    /// As it was given.
    pub text: String,
    /// What is wrong with it.
    pub why: String,
}

/// Which paths of a change a layer has.
///
/// Patterns are of paths in the root, with or without a slash before them: `*` and `?` stand for what is in one name, `**`
/// for any number of them, `[a-z]` and `{a,b}` for one of several. A pattern that fits a directory fits all that is in it.
/// What is both included and excluded is excluded.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    include: Option<GlobSet>,
    exclude: Option<GlobSet>,
    masks: Vec<Vec<u8>>,
}

impl Selection {
    /// Reads patterns. Without any `include`, all is included that is not excluded. `masks` are paths that the layer hides:
    /// what lies there in the layers below is not seen, and what the change has there is left out.
    ///
    /// # Errors
    /// A pattern is none, or a mask names the root or leads upwards.
    pub fn new(include: &[String], exclude: &[String], masks: &[String]) -> Result<Self, SelectionError> {
        let masks = masks.iter().map(|mask| path_of(mask)).collect::<Result<_, _>>()?;
        Ok(Self { include: globs(include)?, exclude: globs(exclude)?, masks })
    }

    /// Whether a layer is what the change is.
    pub fn is_all(&self) -> bool {
        self.include.is_none() && self.exclude.is_none() && self.masks.is_empty()
    }

    /// Whether nothing at or below a path can be part of the layer.
    pub(crate) fn leaves_out(&self, path: &Path) -> bool {
        self.exclude.as_ref().is_some_and(|exclude| exclude.is_match(path))
    }

    /// Whether a path, which is no directory, is part of the layer.
    pub(crate) fn takes(&self, path: &Path) -> bool {
        self.include.as_ref().is_none_or(|include| include.is_match(path)) && !self.leaves_out(path)
    }

    /// Takes from a layer's tree what is not selected, and adds the masks. A directory on the way to something that is
    /// selected stays, but hides nothing.
    pub(crate) fn apply(&self, tree: &mut Tree) -> Result<(), SelectionError> {
        if self.include.is_some() || self.exclude.is_some() {
            self.prune(tree);
        }
        self.masks.iter().try_for_each(|mask| hide(tree, mask))
    }

    fn prune(&self, tree: &mut Tree) {
        let mut ways = vec![];
        if !self.takes(Path::new("")) {
            reveal(tree, NodeId::ROOT);
        }
        let mut pending = vec![(NodeId::ROOT, Vec::new())];
        while let Some((directory, path)) = pending.pop() {
            let children: Vec<_> =
                tree.children(directory).map(|(name, node)| (name.to_vec(), node)).collect();
            for (name, node) in children {
                let below = if path.is_empty() { name.clone() } else { [&path, &b"/"[..], &name].concat() };
                let takes = self.takes(as_path(&below));
                let is_directory = *tree.node(node).content == Content::Directory;
                if self.leaves_out(as_path(&below)) || (!takes && !is_directory) {
                    tree.remove(directory, &name);
                    continue;
                }
                if is_directory {
                    if !takes {
                        reveal(tree, node);
                        ways.push((directory, name, node));
                    }
                    pending.push((node, below));
                }
            }
        }
        // A directory comes after the one that it is in.
        for (parent, name, node) in ways.into_iter().rev() {
            if tree.children(node).next().is_none() {
                tree.remove(parent, &name);
            }
        }
    }
}

/// Lets what lies below in the stack be seen in a directory.
fn reveal(tree: &mut Tree, directory: NodeId) {
    let attributes = tree.node(directory).attributes;
    if overlay::is_opaque(&attributes.xattrs) {
        let mut attributes = attributes.clone();
        attributes.xattrs.remove(overlay::OPAQUE);
        tree.set_attributes(directory, attributes);
    }
}

/// Puts a whiteout at a path.
fn hide(tree: &mut Tree, path: &[u8]) -> Result<(), SelectionError> {
    let wrong = |why: String| SelectionError { text: path.escape_ascii().to_string(), why };
    let mut here = NodeId::ROOT;
    let mut names = path.split(|byte| *byte == b'/').peekable();
    while let Some(name) = names.next() {
        if names.peek().is_none() {
            tree.remove(here, name);
            tree.add(here, name, overlay::whiteout(), kiln_erofs::Attributes::default())
                .map_err(|error| wrong(error.to_string()))?;
            break;
        }
        here = match tree.child(here, name) {
            Some(node) if overlay::is_whiteout(tree.node(node).content) => break,
            Some(node) if *tree.node(node).content == Content::Directory => node,
            Some(_) => {
                return Err(wrong(format!("`{}` on its way is no directory", name.escape_ascii())));
            }
            None => tree
                .add(here, name, Content::Directory, implied())
                .map_err(|error| wrong(error.to_string()))?,
        };
    }
    Ok(())
}

fn as_path(bytes: &[u8]) -> &Path {
    use std::os::unix::ffi::OsStrExt as _;
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

/// A path in the root, without slashes at its ends.
fn path_of(text: &str) -> Result<Vec<u8>, SelectionError> {
    let names: Vec<&str> = text.split('/').filter(|name| !name.is_empty() && *name != ".").collect();
    let wrong = |why: &str| Err(SelectionError { text: text.to_owned(), why: why.to_owned() });
    if names.is_empty() {
        return wrong("it names no path below the root");
    }
    if names.iter().any(|name| *name == ".." || name.as_bytes().starts_with(overlay::WHITEOUT_PREFIX)) {
        return wrong("names in it must not be `..` or begin with `.wh.`");
    }
    Ok(names.join("/").into_bytes())
}

/// `None` without any pattern.
fn globs(patterns: &[String]) -> Result<Option<GlobSet>, SelectionError> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let mut set = GlobSetBuilder::new();
    for text in patterns {
        let wrong = |why: String| SelectionError { text: text.clone(), why };
        let pattern = text.trim_start_matches('/').trim_end_matches('/');
        if pattern.is_empty() {
            return Err(wrong("it fits no path below the root".to_owned()));
        }
        for pattern in [pattern.to_owned(), format!("{pattern}/**")] {
            let glob = GlobBuilder::new(&pattern).literal_separator(true).build();
            set.add(glob.map_err(|error| wrong(error.kind().to_string()))?);
        }
    }
    set.build()
        .map(Some)
        .map_err(|error| SelectionError { text: patterns.join(" "), why: error.kind().to_string() })
}

#[cfg(test)]
mod tests {
    use kiln_erofs::{Attributes, Data};

    use super::*;

    fn tree(paths: &[&str]) -> Tree {
        let mut tree = Tree::default();
        for path in paths {
            let mut here = NodeId::ROOT;
            let mut names = path.split('/').peekable();
            while let Some(name) = names.next() {
                let content = if names.peek().is_some() || name.is_empty() {
                    Content::Directory
                } else {
                    Content::Regular(Data::Inline(Vec::new()))
                };
                if name.is_empty() {
                    break;
                }
                here = tree.child(here, name.as_bytes()).unwrap_or_else(|| {
                    tree.add(here, name.as_bytes(), content, Attributes::default()).unwrap()
                });
            }
        }
        tree
    }

    fn paths(tree: &Tree) -> Vec<String> {
        let mut found = Vec::new();
        let mut pending = vec![(NodeId::ROOT, String::new())];
        while let Some((directory, path)) = pending.pop() {
            for (name, node) in tree.children(directory) {
                let path = format!("{path}{}", String::from_utf8_lossy(name));
                match tree.node(node).content {
                    Content::Directory => pending.push((node, format!("{path}/"))),
                    content if overlay::is_whiteout(content) => found.push(format!("-{path}")),
                    _ => found.push(path),
                }
            }
            if tree.children(directory).next().is_none() {
                found.push(path);
            }
        }
        found.sort();
        found
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn patterns_select_paths_and_all_that_is_in_directories() {
        let all = ["bin/a", "bin/b.pyc", "lib/x/a.pyc", "lib/x/a.py", "lib/y", "tmp/z", "top"];
        for (include, exclude, expected) in [
            (&["/bin/"][..], &[][..], &["bin/a", "bin/b.pyc"][..]),
            (&[], &["**/*.pyc", "tmp"], &["bin/a", "lib/x/a.py", "lib/y", "top"]),
            (&["lib/*"], &["lib/x"], &["lib/y"]),
            (&["*"], &["bin", "lib", "tmp"], &["top"]),
            (&["lib/**/*.{py,pyc}"], &[], &["lib/x/a.py", "lib/x/a.pyc"]),
        ] {
            let mut tree = tree(&all);
            Selection::new(&owned(include), &owned(exclude), &[]).unwrap().apply(&mut tree).unwrap();
            assert_eq!(paths(&tree), expected, "{include:?} {exclude:?}");
        }
    }

    #[test]
    fn a_directory_on_the_way_hides_nothing() {
        let mut tree = tree(&["a/b/c", "a/d"]);
        let a = tree.child(NodeId::ROOT, b"a").unwrap();
        let b = tree.child(a, b"b").unwrap();
        let opaque =
            Attributes { xattrs: [(overlay::OPAQUE.to_vec(), b"y".to_vec())].into(), ..Default::default() };
        tree.set_attributes(a, opaque.clone());
        tree.set_attributes(b, opaque);
        Selection::new(&owned(&["a/b"]), &[], &[]).unwrap().apply(&mut tree).unwrap();
        assert!(!overlay::is_opaque(&tree.node(a).attributes.xattrs));
        assert!(overlay::is_opaque(&tree.node(b).attributes.xattrs));
    }

    #[test]
    fn masks_hide_what_is_there_and_what_is_below() {
        let mut tree = tree(&["a/b/c", "a/d", "e"]);
        let masks = owned(&["/a/b", "/new/deep/x/", "a/b/c"]);
        Selection::new(&[], &[], &masks).unwrap().apply(&mut tree).unwrap();
        assert_eq!(paths(&tree), ["-a/b", "-new/deep/x", "a/d", "e"]);
        let through_a_file = Selection::new(&[], &[], &owned(&["e/x"])).unwrap().apply(&mut tree);
        assert!(through_a_file.unwrap_err().to_string().contains("no directory"));
    }

    #[test]
    fn what_is_no_pattern_or_path_is_refused() {
        for (pattern, mask) in
            [("[", "a"), ("/", "a"), ("a", ""), ("a", "/"), ("a", "a/../b"), ("a", ".wh.x")]
        {
            assert!(Selection::new(&owned(&[pattern]), &[], &owned(&[mask])).is_err(), "{pattern} {mask}");
        }
    }
}
