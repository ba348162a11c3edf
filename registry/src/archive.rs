//! Files by name in a directory or in a tar that can be read at any place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use tar_core::parse::{ParseEvent, Parser};

use crate::{RegistryError, Result};

/// Links in an archive that lead to links are followed so often.
const LINKS: usize = 8;
/// Archives of images have some hundred entries; whole root filesystems have many more, but need no index.
const ENTRIES: usize = 100_000;

/// A directory, or an uncompressed tar.
pub(crate) enum Archive {
    Directory(PathBuf),
    Tar { path: PathBuf, file: Arc<File>, entries: HashMap<String, Entry> },
}

pub(crate) enum Entry {
    File { offset: u64, size: u64 },
    Link(String),
}

impl Archive {
    /// Makes an index of a tar's entries. One that cannot be read as a tar is an error.
    pub(crate) fn of_tar(path: &Path, file: File) -> Result<Self> {
        let file = Arc::new(file);
        let bad = |reason: String| RegistryError::Invalid {
            what: "archive",
            name: path.display().to_string(),
            reason,
        };
        let failed = |source| RegistryError::Io { doing: "read", path: path.to_owned(), source };
        let mut entries = HashMap::new();
        let mut parser = Parser::with_defaults();
        let (mut offset, mut buffer, mut wanted) = (0_u64, Vec::new(), 1024);
        loop {
            buffer.resize(wanted, 0);
            let mut part = Part { file: file.clone(), offset, left: wanted as u64 };
            let got = crate::compression::read_full(&mut part, &mut buffer).map_err(failed)?;
            if got == 0 {
                break;
            }
            // The end may lack its second block of zeros.
            if got < wanted && buffer[..got].iter().all(|byte| *byte == 0) {
                break;
            }
            match parser.parse(&buffer[..got]).map_err(|error| bad(error.to_string()))? {
                ParseEvent::NeedData { .. } if got < wanted => return Err(bad("it ends in a header".into())),
                ParseEvent::NeedData { min_bytes } => {
                    wanted = min_bytes.max(wanted + 512);
                    continue;
                }
                ParseEvent::Entry { consumed, entry } => {
                    offset += consumed as u64;
                    if let Some(name) = clean(&entry.path_lossy()) {
                        if entry.entry_type.is_file() {
                            entries.insert(name, Entry::File { offset, size: entry.size });
                        } else if let Some(target) = entry.link_target_lossy() {
                            let target = if entry.entry_type.is_hard_link() {
                                clean(&target)
                            } else {
                                beside(&name, &target)
                            };
                            if let Some(target) = target {
                                entries.insert(name, Entry::Link(target));
                            }
                        }
                    }
                    offset = offset.saturating_add(entry.size.div_ceil(512).saturating_mul(512));
                }
                ParseEvent::SparseEntry { consumed, entry, .. } => {
                    offset = offset
                        .saturating_add(consumed as u64)
                        .saturating_add(entry.size.div_ceil(512).saturating_mul(512));
                }
                ParseEvent::GlobalExtensions { consumed, .. } => offset += consumed as u64,
                ParseEvent::End { .. } => break,
            }
            wanted = 1024;
            if entries.len() > ENTRIES {
                break;
            }
        }
        Ok(Self::Tar { path: path.to_owned(), file, entries })
    }

    /// Opens a file of the archive.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Box<dyn Read + Send>>> {
        let Some(mut name) = clean(name) else { return Ok(None) };
        match self {
            Self::Directory(dir) => {
                let path = dir.join(&name);
                match File::open(&path) {
                    Ok(file) => Ok(Some(Box::new(file))),
                    Err(error)
                        if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                    {
                        Ok(None)
                    }
                    Err(source) => Err(RegistryError::Io { doing: "read", path, source }),
                }
            }
            Self::Tar { file, entries, .. } => {
                for _ in 0..LINKS {
                    match entries.get(&name) {
                        Some(Entry::File { offset, size }) => {
                            let part = Part { file: file.clone(), offset: *offset, left: *size };
                            return Ok(Some(Box::new(io::BufReader::with_capacity(128 << 10, part))));
                        }
                        Some(Entry::Link(target)) => name.clone_from(target),
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }

    /// Reads a small file of the archive.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(|source| RegistryError::Io {
            doing: "read",
            path: self.path().join(name),
            source,
        })?;
        if bytes.len() as u64 > limit {
            let name = self.path().join(name).display().to_string();
            return Err(RegistryError::TooLarge { what: "file", name, size: None, limit });
        }
        Ok(Some(bytes))
    }

    /// The directory or the tar.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Tar { path, .. } => path,
        }
    }
}

/// A name relative to the archive's root in one form; `None` for one that leads out of it.
fn clean(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in Path::new(name).components() {
        match part {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::ParentDir => {
                parts.pop()?;
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Where a symlink at `name` leads.
fn beside(name: &str, target: &str) -> Option<String> {
    let parent = name.rfind('/').map_or("", |slash| &name[..=slash]);
    if target.starts_with('/') { None } else { clean(&format!("{parent}{target}")) }
}

/// A part of a file, read without moving the file's own position.
struct Part {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for Part {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut into[..wanted], self.offset)?;
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_archive() {
        for (name, expected) in [
            ("./blobs//sha256/x", Some("blobs/sha256/x")),
            ("a/../b", Some("b")),
            ("../b", None),
            ("a/../../b", None),
            ("/etc/shadow", None),
            ("", None),
            (".", None),
        ] {
            assert_eq!(clean(name).as_deref(), expected, "{name}");
        }
        assert_eq!(beside("a/layer.tar", "../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(beside("layer.tar", "../b"), None);
        assert_eq!(beside("a/layer.tar", "/b"), None);
    }
}
