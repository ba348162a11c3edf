//! A merged tree, looked at without mounting it.

use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use kiln_contract::{BackendError, ErrorKind};
use kiln_erofs::{Attributes, FileType, Image, ImageError, Inode};
use memmap2::Mmap;

use crate::objects::{Fetcher, Objects};

/// As many links as Linux follows on the way to one file (path_resolution(7)).
const LINKS_MOST: usize = 40;

/// A merged tree and where its data are.
#[derive(Debug)]
pub struct TreeContents {
    bytes: Mmap,
    tree: PathBuf,
    objects: Objects,
}

/// Something in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentsEntry {
    /// Its name in its directory.
    pub name: Vec<u8>,
    /// What it is.
    pub file_type: FileType,
    /// Owner, mode, time.
    pub attributes: Attributes,
    /// In bytes, of a file; 0 of all else.
    pub size: u64,
    /// Where a symbolic link points to.
    pub target: Option<Vec<u8>>,
}

impl ContentsEntry {
    /// What it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self.file_type {
            FileType::Directory => "directory",
            FileType::Regular => "file",
            FileType::Symlink => "link",
            FileType::CharDevice => "char_device",
            FileType::BlockDevice => "block_device",
            FileType::Fifo => "pipe",
            FileType::Socket => "socket",
        }
    }
}

impl TreeContents {
    /// Opens a tree. `fetcher` brings objects that are missing.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn open(tree: &Path, objects: &Path, fetcher: Option<Fetcher>) -> Result<Self, BackendError> {
        let bytes = crate::tree::map(tree)?;
        Ok(Self { bytes, tree: tree.to_owned(), objects: Objects::of(objects, fetcher)? })
    }

    /// What is in a directory, sorted by name; of anything else, itself. Links on the way are followed, within the tree.
    ///
    /// # Errors
    /// There is no such path, or the tree is damaged.
    pub fn list(&self, path: &[u8]) -> Result<Vec<ContentsEntry>, BackendError> {
        let inode = self.find(path, false)?;
        if inode.file_type() != FileType::Directory {
            let name = path.rsplit(|byte| *byte == b'/').find(|name| !name.is_empty()).unwrap_or(b"/");
            return Ok(vec![self.describe(name, &inode)?]);
        }
        let mut listed = Vec::new();
        for entry in inode.entries(0) {
            let entry = entry.map_err(|error| self.damaged(error))?;
            let inode = self.image()?.inode(entry.nid).map_err(|error| self.damaged(error))?;
            listed.push(self.describe(entry.name, &inode)?);
        }
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listed)
    }

    /// Opens a file for reading. Links are followed, within the tree.
    ///
    /// # Errors
    /// There is no such file, its object is missing, or the tree is damaged.
    pub fn read(&self, path: &[u8]) -> Result<Box<dyn Read + '_>, BackendError> {
        let inode = self.find(path, true)?;
        if inode.file_type() != FileType::Regular {
            let what = format!("`{}` is not a file", path.escape_ascii());
            return Err(BackendError::new(ErrorKind::Invalid, what));
        }
        match inode.object().map_err(|error| self.damaged(error))? {
            None => {
                let bytes = inode.embedded().map_err(|error| self.damaged(error))?;
                Ok(Box::new(Cursor::new(bytes)))
            }
            Some(digest) => {
                let what = || format!("cannot read the object {digest}");
                let file = self.objects.open(&digest, inode.size()).map_err(|error| {
                    BackendError::caused(what(), error)
                        .hint("`kiln system check --repair` fetches what is missing")
                })?;
                Ok(Box::new(file))
            }
        }
    }

    /// The path of the file, if there is one and beside the directories that lead to it nothing else.
    ///
    /// # Errors
    /// The tree is damaged.
    pub fn only_file(&self) -> Result<Option<Vec<u8>>, BackendError> {
        let mut path = Vec::new();
        loop {
            let listed = self.list(&path)?;
            let [entry] = listed.as_slice() else { return Ok(None) };
            path.push(b'/');
            path.extend(&entry.name);
            match entry.file_type {
                FileType::Directory => {}
                FileType::Regular => return Ok(Some(path)),
                _ => return Ok(None),
            }
        }
    }

    fn image(&self) -> Result<Image<'_>, BackendError> {
        Image::open(&self.bytes).map_err(|error| self.damaged(error))
    }

    fn damaged(&self, error: ImageError) -> BackendError {
        BackendError::caused(format!("the tree {} is damaged", self.tree.display()), error)
    }

    fn describe(&self, name: &[u8], inode: &Inode<'_>) -> Result<ContentsEntry, BackendError> {
        let file_type = inode.file_type();
        let target = match file_type {
            FileType::Symlink => Some(inode.symlink_target().map_err(|error| self.damaged(error))?.to_vec()),
            _ => None,
        };
        Ok(ContentsEntry {
            name: name.to_vec(),
            file_type,
            attributes: inode.attributes().map_err(|error| self.damaged(error))?,
            size: if file_type == FileType::Regular { inode.size() } else { 0 },
            target,
        })
    }

    fn find(&self, path: &[u8], follow_last: bool) -> Result<Inode<'_>, BackendError> {
        let missing =
            || BackendError::new(ErrorKind::NotFound, format!("there is no `{}` in it", path.escape_ascii()));
        let image = self.image()?;
        let root = image.root().map_err(|error| self.damaged(error))?;
        let parts = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|byte| *byte == b'/')
                .rev()
                .filter(|part| !part.is_empty())
                .map(<[u8]>::to_vec)
                .collect()
        };
        // What is still to be walked, the next part last; and the directories that lead to where we are.
        let mut rest = parts(path);
        let mut above = vec![root];
        let mut links = 0;
        while let Some(part) = rest.pop() {
            let Some(here) = above.last().copied() else { return Err(missing()) };
            if here.file_type() != FileType::Directory {
                return Err(missing());
            }
            match part.as_slice() {
                b"." => continue,
                b".." => {
                    above.truncate(above.len().saturating_sub(1).max(1));
                    continue;
                }
                _ => {}
            }
            let entry = here.lookup(&part).map_err(|error| self.damaged(error))?.ok_or_else(missing)?;
            let inode = image.inode(entry.nid).map_err(|error| self.damaged(error))?;
            if inode.file_type() == FileType::Symlink && (follow_last || !rest.is_empty()) {
                links += 1;
                if links > LINKS_MOST {
                    return Err(missing());
                }
                let target = inode.symlink_target().map_err(|error| self.damaged(error))?;
                if target.starts_with(b"/") {
                    above.truncate(1);
                }
                rest.extend(parts(target));
                continue;
            }
            above.push(inode);
        }
        above.pop().ok_or_else(missing)
    }
}

#[cfg(test)]
mod tests {
    use kiln_erofs::{Content, Data, NodeId, Tree, write_metadata};

    use super::*;

    #[test]
    fn links_are_followed_within_the_tree_and_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = Tree::default();
        let mut add =
            |parent, name: &[u8], content| tree.add(parent, name, content, Attributes::default()).unwrap();
        let link = |target: &[u8]| Content::Symlink(target.to_vec());
        let etc = add(NodeId::ROOT, b"etc", Content::Directory);
        add(etc, b"name", Content::Regular(Data::Inline(b"kiln".to_vec())));
        add(etc, b"other", link(b"../../../etc/name"));
        add(NodeId::ROOT, b"config", link(b"/etc"));
        add(NodeId::ROOT, b"round", link(b"round"));
        let path = directory.path().join("tree");
        write_metadata(&tree, std::fs::File::create(&path).unwrap()).unwrap();
        let contents = TreeContents::open(&path, directory.path(), None).unwrap();
        let read = |path: &str| {
            let mut text = String::new();
            contents.read(path.as_bytes()).map(|mut file| {
                file.read_to_string(&mut text).unwrap();
                text.clone()
            })
        };
        for path in ["etc/name", "/etc/./other", "config/name", "config/../config/other"] {
            assert_eq!(read(path).unwrap(), "kiln", "{path}");
        }
        for path in ["round", "round/x", "etc", "etc/none", "etc/name/x", ""] {
            assert!(read(path).is_err(), "{path}");
        }
        let names = |path: &str| -> Vec<String> {
            let listed = contents.list(path.as_bytes()).unwrap();
            listed.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect()
        };
        assert_eq!(names("/"), ["config", "etc", "round"]);
        assert_eq!(names("config/"), ["config"]);
        assert_eq!(names("config/."), ["name", "other"]);
        assert_eq!(names("etc/name"), ["name"]);
    }
}
