//! The entries of a tar archive that is read once, front to back.
//!
//! On `tar-core`, since its attributes are bytes: a capability may well have a newline in it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

pub(super) use tar_core::EntryType;
use tar_core::SparseEntry;
use tar_core::parse::{Limits, ParseEvent, ParsedEntry, Parser};

/// How much is read at once.
const BLOCK: usize = 64 * 1024;

/// An entry's header, with all extensions taken in.
pub(super) struct Entry {
    pub(super) path: PathBuf,
    pub(super) kind: EntryType,
    pub(super) link: Option<OsString>,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: u64,
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(OsString, Vec<u8>)>,
    /// Bytes in the archive.
    stored: u64,
    /// Where they belong in the file, and the file's size, where it has holes.
    sparse: Option<(Vec<SparseEntry>, u64)>,
}

pub(super) struct Entries<'r> {
    reader: &'r mut dyn Read,
    parser: Parser,
    /// What was read and not used: `buffer[used..]`.
    buffer: Vec<u8>,
    used: usize,
    /// Bytes of the current entry, and its padding, that are still to come.
    data: u64,
    padding: u64,
}

impl<'r> Entries<'r> {
    pub(super) fn new(reader: &'r mut dyn Read) -> Self {
        let mut parser = Parser::new(Limits { max_path_len: Some(4096), ..Limits::default() });
        parser.set_allow_empty_path(true);
        Self { reader, parser, buffer: Vec::new(), used: 0, data: 0, padding: 0 }
    }

    /// The next entry; what is left of the one before is passed over.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut left = self.data + self.padding;
        (self.data, self.padding) = (0, 0);
        while left > 0 {
            left -= self.chunk(left)?.1;
        }
        loop {
            let parsed = match self.parser.parse(&self.buffer[self.used..]).map_err(io::Error::other)? {
                ParseEvent::NeedData { min_bytes } => Err(min_bytes),
                ParseEvent::Entry { consumed, entry } => Ok((consumed, Some(own(entry, None)))),
                ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size } => {
                    Ok((consumed, Some(own(entry, Some((sparse_map, real_size))))))
                }
                ParseEvent::GlobalExtensions { consumed, .. } => Ok((consumed, None)),
                ParseEvent::End { .. } => return Ok(None),
            };
            match parsed {
                Err(wanted) => {
                    if !self.fill(wanted)? {
                        return if self.used == self.buffer.len() { Ok(None) } else { Err(cut()) };
                    }
                }
                Ok((consumed, entry)) => {
                    self.used += consumed;
                    if let Some(entry) = entry {
                        self.data = entry.stored;
                        self.padding = entry.stored.next_multiple_of(512) - entry.stored;
                        return Ok(Some(entry));
                    }
                }
            }
        }
    }

    /// Writes the current entry's data, holes as holes.
    pub(super) fn copy_to(&mut self, entry: &Entry, file: &mut File) -> io::Result<()> {
        match &entry.sparse {
            None => self.copy(entry.stored, file),
            Some((map, size)) => {
                file.set_len(*size)?;
                for part in map {
                    if part.offset.checked_add(part.length).is_none_or(|end| end > *size) {
                        return Err(io::Error::other("its map of holes reaches beyond its size"));
                    }
                    file.seek(SeekFrom::Start(part.offset))?;
                    self.copy(part.length.min(self.data), file)?;
                }
                Ok(())
            }
        }
    }

    fn copy(&mut self, mut length: u64, file: &mut File) -> io::Result<()> {
        while length > 0 {
            let (start, taken) = self.chunk(length)?;
            file.write_all(&self.buffer[start..self.used])?;
            length -= taken;
            self.data -= taken;
        }
        Ok(())
    }

    /// Takes up to `wanted` bytes: where they begin in the buffer, and how many there are, at least one.
    fn chunk(&mut self, wanted: u64) -> io::Result<(usize, u64)> {
        if self.used == self.buffer.len() && !self.fill(1)? {
            return Err(cut());
        }
        let taken = wanted.min((self.buffer.len() - self.used) as u64);
        let start = self.used;
        self.used += taken as usize;
        Ok((start, taken))
    }

    /// Reads until `wanted` bytes are unused in the buffer; false at the end.
    fn fill(&mut self, wanted: usize) -> io::Result<bool> {
        self.buffer.drain(..self.used);
        self.used = 0;
        while self.buffer.len() < wanted {
            let before = self.buffer.len();
            self.buffer.resize(before + BLOCK, 0);
            let read = self.reader.read(&mut self.buffer[before..]);
            self.buffer.truncate(before + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

fn own(entry: ParsedEntry<'_>, sparse: Option<(Vec<SparseEntry>, u64)>) -> Entry {
    let text = |bytes: std::borrow::Cow<'_, [u8]>| OsString::from_vec(bytes.into_owned());
    Entry {
        path: text(entry.path).into(),
        kind: entry.entry_type,
        link: entry.link_target.map(text),
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        device: (entry.dev_major.unwrap_or(0), entry.dev_minor.unwrap_or(0)),
        xattrs: entry.xattrs.into_iter().map(|(name, value)| (text(name), value.into_owned())).collect(),
        stored: entry.size,
        sparse,
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends in the middle of an entry")
}
