//! A layer's tar told in parts, for who packs files apart from what is between them.

use std::io::{self, BufReader, BufWriter, Read, Write as _};
use std::thread;

use kiln_contract::Digest;

use crate::import::join;
use crate::tar::entry::{self, EntryKind, LayerEntry, TarSource, padding};
use crate::tar::header::BLOCK;
use crate::{Result, Store, StoreError};

/// Takes the parts of a tar in their order: all bytes of [`between`](TarParts::between) and [`file`](TarParts::file)
/// together are the tar.
pub trait TarParts {
    /// Bytes that belong to no file: headers, padding, the end; and what a sparse file has.
    ///
    /// # Errors
    /// They cannot be taken; so with the others.
    fn between(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// An entry. The bytes of a file that is not empty come next.
    ///
    /// # Errors
    /// It cannot be taken.
    fn entry(&mut self, entry: LayerEntry) -> io::Result<()>;

    /// The next bytes of the file.
    ///
    /// # Errors
    /// They cannot be taken.
    fn file(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// The file's end.
    ///
    /// # Errors
    /// It cannot be taken.
    fn file_end(&mut self) -> io::Result<()>;
}

impl Store {
    /// Tells the tar with this digest in parts; see [`Store::export_diff`].
    ///
    /// # Errors
    /// As [`Store::export_diff`]; [`StoreError::Stream`] if `parts` fails.
    pub fn export_parts(&self, diff_id: &Digest, parts: &mut dyn TarParts) -> Result<()> {
        let (reader, writer) = io::pipe().map_err(failed)?;
        thread::scope(|scope| {
            let written = scope.spawn(move || {
                let mut out = BufWriter::with_capacity(256 << 10, writer);
                self.export_diff(diff_id, &mut out)?;
                out.flush().map_err(failed)
            });
            let told = tell(reader, parts);
            match (told, join(written)) {
                // Nobody read on: why is the better message.
                (Err(told), Err(StoreError::Stream { .. })) => Err(told),
                (_, Err(written)) => Err(written),
                (told, Ok(())) => told,
            }
        })
    }
}

fn failed(source: io::Error) -> StoreError {
    StoreError::Stream { doing: "pack a layer", source }
}

fn tell(tar: impl Read, parts: &mut dyn TarParts) -> Result<()> {
    let input = BufReader::with_capacity(256 << 10, tar);
    let mut source = Source { input, offset: 0, parts };
    while let Some(entry) = entry::next(&mut source)? {
        let (size, is_file) = match &entry.kind {
            EntryKind::Regular { size, sparse } => (*size, sparse.is_none()),
            _ => (0, false),
        };
        source.parts.entry(entry).map_err(failed)?;
        if is_file && size > 0 {
            source.copy(size, |parts, bytes| parts.file(bytes))?;
            source.parts.file_end().map_err(failed)?;
        } else {
            source.skip(size)?;
        }
        // An archive that was never closed ends without it.
        source.pass(padding(size), |parts, bytes| parts.between(bytes))?;
    }
    source.pass(u64::MAX, |parts, bytes| parts.between(bytes)).map(drop)
}

struct Source<'a, R> {
    input: BufReader<R>,
    offset: u64,
    parts: &'a mut dyn TarParts,
}

impl<R: Read> Source<'_, R> {
    /// Hands on up to `length` bytes. How many there were.
    fn pass(
        &mut self,
        length: u64,
        mut to: impl FnMut(&mut dyn TarParts, &[u8]) -> io::Result<()>,
    ) -> Result<u64> {
        use std::io::BufRead as _;
        let mut passed = 0;
        while passed < length {
            let bytes = match self.input.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                filled => filled.map_err(failed)?,
            };
            let count = bytes.len().min(usize::try_from(length - passed).unwrap_or(usize::MAX));
            if count == 0 {
                break;
            }
            to(self.parts, &bytes[..count]).map_err(failed)?;
            self.input.consume(count);
            passed += count as u64;
        }
        self.offset += passed;
        Ok(passed)
    }

    fn copy(
        &mut self,
        length: u64,
        to: impl FnMut(&mut dyn TarParts, &[u8]) -> io::Result<()>,
    ) -> Result<()> {
        if self.pass(length, to)? == length {
            return Ok(());
        }
        Err(StoreError::Tar { offset: self.offset, what: "it is truncated".to_owned() })
    }
}

impl<R: Read> TarSource for Source<'_, R> {
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut have = 0;
        let got = self.pass(BLOCK as u64, |parts, bytes| {
            block[have..have + bytes.len()].copy_from_slice(bytes);
            have += bytes.len();
            parts.between(bytes)
        })?;
        match got {
            0 => Ok(false),
            got if got == BLOCK as u64 => Ok(true),
            _ => Err(StoreError::Tar { offset: self.offset, what: "it is truncated".to_owned() }),
        }
    }

    fn bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        self.copy(length as u64, |parts, bytes| {
            all.extend_from_slice(bytes);
            parts.between(bytes)
        })?;
        Ok(all)
    }

    fn skip(&mut self, length: u64) -> Result<()> {
        self.copy(length, |parts, bytes| parts.between(bytes))
    }

    fn offset(&self) -> u64 {
        self.offset
    }
}
