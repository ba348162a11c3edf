//! Appending to a log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_contract::LogStream;

use super::{FILES, MAX_FILE, MAX_LINE, encode, rotated};

/// Appends what a workload writes to its log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
    /// What came after the last newline of each stream.
    partial: [Vec<u8>; 2],
    buffer: Vec<u8>,
}

impl LogWriter {
    /// Goes on with the log at `path`, or begins it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, MAX_FILE)
    }

    /// The same, with another size at which files are rotated.
    pub(super) fn with_limit(path: &Path, limit: u64) -> io::Result<Self> {
        let mut file = append_to(path)?;
        let mut size = file.metadata()?.len();
        if size > 0 {
            // A writer that was killed may have left half a line, which must not swallow the next one.
            let mut last = [0];
            let mut reader = File::open(path)?;
            reader.seek(SeekFrom::End(-1))?;
            reader.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
                size += 1;
            }
        }
        Ok(Self { path: path.to_owned(), file, size, limit, partial: Default::default(), buffer: Vec::new() })
    }

    /// Takes in what a stream gave: whole lines are written, the rest waits for its end.
    pub(crate) fn write(&mut self, stream: LogStream, bytes: &[u8]) -> io::Result<()> {
        let now = Timestamp::now();
        let partial = &mut self.partial[stream as usize];
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let mut part = part;
            while !part.is_empty() {
                let (taken, rest) = part.split_at(part.len().min(MAX_LINE - partial.len()));
                part = rest;
                let ends = taken.ends_with(b"\n");
                if partial.is_empty() && ends {
                    encode(&mut self.buffer, now, stream, taken);
                    continue;
                }
                partial.extend_from_slice(taken);
                if ends || partial.len() == MAX_LINE {
                    encode(&mut self.buffer, now, stream, partial);
                    partial.clear();
                }
            }
        }
        self.flush()
    }

    /// Writes what has no newline and will get none: the streams have ended.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        for stream in [LogStream::Stdout, LogStream::Stderr] {
            let partial = std::mem::take(&mut self.partial[stream as usize]);
            if !partial.is_empty() {
                encode(&mut self.buffer, Timestamp::now(), stream, &partial);
            }
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        if self.size > 0 && self.size + self.buffer.len() as u64 > self.limit {
            self.rotate()?;
        }
        self.file.write_all(&self.buffer)?;
        self.size += self.buffer.len() as u64;
        self.buffer.clear();
        // One burst must not keep its memory for the life of a supervisor.
        self.buffer.shrink_to(64 << 10);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for n in (0..FILES - 1).rev() {
            match fs::rename(rotated(&self.path, n), rotated(&self.path, n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.file = append_to(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}
