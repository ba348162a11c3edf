//! Tags, each with its history.
//!
//! A tag is a file `tags/<repository>/:<tag>` (the colon keeps it apart from repositories with that name). Bytes other
//! than lower-case letters, digits, `.`, `_`, `-` and `:` are written `%XX`, so that file systems which do not tell case
//! apart do so for tags; a part that would be longer than 200 bytes is `%` and the SHA-256 of what it stands for.
//! The file begins with a line that has the name, and has a line for each time that the tag was moved, newest last:
//!
//! ```text
//! kiln-tag 1 docker.io/library/alpine:3.20
//! 2026-01-01T12:00:00.5Z sha256:… pulled from docker.io
//! ```
//! The time is RFC 3339 in UTC, then comes the manifest's digest, the rest is a note without line breaks.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_contract::Digest;

use crate::error::Context as _;
use crate::{ImageName, Result, Store, StoreError, lines, staging};

const HEADER: &str = "kiln-tag 1 ";

/// One line of a tag's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagEntry {
    /// When the tag was moved.
    pub time: Timestamp,
    /// Where to: the digest of a manifest.
    pub target: Digest,
    /// Why, in words; one line.
    pub note: String,
}

impl TagEntry {
    /// As it stands in the file.
    fn line(&self) -> String {
        format!("{} {} {}", self.time, self.target, self.note)
    }
}

impl Store {
    /// Points a tag to a manifest. That is remembered even if it pointed there before, unless nothing would change
    /// but the time.
    ///
    /// # Errors
    /// The name has no tag, the manifest is not in the store, or the history cannot be written.
    pub fn tag(&self, name: &ImageName, target: &Digest, note: &str) -> Result<()> {
        if !self.layout.blob(target).exists() {
            return Err(StoreError::Missing { what: "manifest", digest: *target });
        }
        let path = self.tag_path(name)?;
        let note: String = note.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let history = self.tag_history(name)?;
        if history.last().is_some_and(|last| last.target == *target && last.note == note) {
            return Ok(());
        }
        let entry = TagEntry { time: Timestamp::now(), target: *target, note };
        if history.is_empty() {
            let parent = path.parent().expect("a tag is in a directory");
            std::fs::create_dir_all(parent).doing("create", parent)?;
            return self.write_history(name, &[entry]);
        }
        lines::append(&path, &entry.line())
    }

    /// Takes a tag and its history away. Tells whether there was one.
    ///
    /// # Errors
    /// The name has no tag, or the file cannot be removed.
    pub fn untag(&self, name: &ImageName) -> Result<bool> {
        let path = self.tag_path(name)?;
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).doing("remove", &path),
        }
        // Directories of repositories that are empty now go, too; others refuse.
        let tags = self.layout.tags();
        for parent in path.ancestors().skip(1).take_while(|parent| **parent != *tags) {
            if std::fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(true)
    }

    /// The history of a tag, newest last; empty if there is no such tag.
    ///
    /// # Errors
    /// The name has no tag, or the file cannot be read.
    pub fn tag_history(&self, name: &ImageName) -> Result<Vec<TagEntry>> {
        Ok(history(&lines::read(&self.tag_path(name)?)?))
    }

    /// All tags with their latest entries, sorted by name.
    ///
    /// # Errors
    /// A directory or file cannot be read.
    pub fn tags(&self) -> Result<Vec<(ImageName, TagEntry)>> {
        let mut tags = Vec::new();
        for path in files_below(&self.layout.tags())? {
            let lines = lines::read(&path)?;
            let Some(name) = lines.first().and_then(|line| line.strip_prefix(HEADER)) else { continue };
            let (Ok(name), Some(last)) = (ImageName::parse(name), history(&lines).pop()) else { continue };
            tags.push((name, last));
        }
        tags.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(tags)
    }

    /// Writes a tag's history, newest last. Whoever replaces one must have the store's lock alone.
    pub(crate) fn write_history(&self, name: &ImageName, entries: &[TagEntry]) -> Result<()> {
        let mut text = format!("{HEADER}{}:{}\n", name.repository, name.tag.as_deref().unwrap_or_default());
        for entry in entries {
            text.push_str(&entry.line());
            text.push('\n');
        }
        staging::publish_file(&self.layout, text.as_bytes(), &self.tag_path(name)?)
    }

    fn tag_path(&self, name: &ImageName) -> Result<PathBuf> {
        let tag = name
            .tag
            .as_deref()
            .ok_or_else(|| StoreError::BadName { text: name.to_string(), why: "it has no tag" })?;
        let mut path = self.layout.tags();
        path.extend(name.repository.split('/').map(|part| encode(part, "")));
        path.push(encode(tag, ":"));
        Ok(path)
    }
}

fn encode(part: &str, prefix: &str) -> String {
    let mut encoded = prefix.to_owned();
    for byte in part.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b':' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    if encoded.len() > 200 { format!("{prefix}%{}", Digest::of(part.as_bytes()).hex()) } else { encoded }
}

fn history(lines: &[String]) -> Vec<TagEntry> {
    let entry = |line: &String| {
        let mut words = line.splitn(3, ' ');
        let time = words.next()?.parse().ok()?;
        let target = words.next()?.parse().ok()?;
        Some(TagEntry { time, target, note: words.next().unwrap_or_default().to_owned() })
    };
    if lines.first().is_some_and(|line| line.starts_with(HEADER)) {
        lines[1..].iter().filter_map(entry).collect()
    } else {
        Vec::new()
    }
}

/// All files below a directory.
pub(crate) fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut stack = vec![directory.to_owned()];
    while let Some(directory) = stack.pop() {
        for entry in std::fs::read_dir(&directory).doing("read", &directory)? {
            let entry = entry.doing("read", &directory)?;
            if entry.file_type().doing("read", &directory)?.is_dir() {
                stack.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_contract::Home;

    fn name(text: &str) -> ImageName {
        ImageName::parse(text).unwrap()
    }

    #[test]
    fn a_tag_remembers_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path())).unwrap();
        let (one, two) = (store.put_blob(b"{}").unwrap(), store.put_blob(b"{ }").unwrap());
        let alpine = name("alpine:3.20");
        store.tag(&alpine, &one, "pulled").unwrap();
        store.tag(&alpine, &one, "pulled").unwrap();
        store.tag(&alpine, &two, "commit\nwith a line break").unwrap();
        let path = dir.path().join("store/tags/docker.io/library/alpine/:3.20");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "kiln-tag 1 docker.io/library/alpine:3.20");
        assert!(lines[1].ends_with(&format!("Z {one} pulled")), "{text}");
        assert!(lines[2].ends_with(&format!("Z {two} commit with a line break")), "{text}");
        assert_eq!(lines.len(), 3);
        // Torn by a power cut: the tag is where it was before.
        std::fs::write(&path, format!("{text}2026-01-01T00:00:00Z sha2")).unwrap();
        assert_eq!(store.tags().unwrap()[0].1.target, two);
        assert_eq!(store.tag_history(&alpine).unwrap().len(), 2);
        assert!(store.untag(&alpine).unwrap());
        assert!(!store.untag(&alpine).unwrap());
        assert!(!dir.path().join("store/tags/docker.io").exists());
    }

    #[test]
    fn names_that_look_alike_are_different_tags() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path())).unwrap();
        let target = store.put_blob(b"{}").unwrap();
        let long = format!("a:{}", "V".repeat(128));
        let names = ["a:b", "a:B", "a/b:c", "a/b/c:latest", "localhost:5000/a:b", "[::1]:5000/a:b", &long];
        for text in names {
            store.tag(&name(text), &target, "").unwrap();
        }
        let mut expected = names.map(name).to_vec();
        expected.sort();
        let found: Vec<_> = store.tags().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_tag_needs_a_manifest_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path())).unwrap();
        let error = store.tag(&name("a:b"), &Digest::of(b"x"), "").unwrap_err();
        assert!(error.to_string().contains("is not in the store"), "{error}");
    }
}
