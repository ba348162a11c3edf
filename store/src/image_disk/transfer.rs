//! How objects get into a disk: shared, or copied by the kernel, or read and written.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;

use rustix::fs::SeekFrom;

use crate::error::{Context as _, is_full};
use crate::extents::share_range;
use crate::{Result, StoreError};

/// What is shared is made of whole blocks of this size: EROFS's.
const BLOCK: u64 = 4096;

/// Copies that go through memory do so in pieces of this size.
const PIECE: u64 = 256 << 10;

/// Below this, a system call of its own costs more than bytes that travel with their neighbours.
const WORTH_A_CALL: u64 = 1 << 20;

/// The ways, the best first. What a file system cannot do, it can do for no object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// The disk gets the object's own blocks (`FICLONERANGE`): nothing is read, nothing written.
    Share,
    /// The kernel, or the server of a network file system, copies (`copy_file_range`).
    Copy,
    /// Through memory.
    ReadAndWrite,
}

/// An object that is put into a disk.
pub(super) struct Source {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// Its length, as the tree says.
    pub(super) size: u64,
    /// Bytes that it takes on the disk. Where these are fewer, it has holes (or is compressed).
    pub(super) allocated: u64,
}

impl Source {
    /// The object in `file`, which must have `size` bytes.
    pub(super) fn new(file: File, path: PathBuf, size: u64) -> Result<Self> {
        let metadata = file.metadata().doing("read", &path)?;
        let source = Self { file, path, size, allocated: metadata.blocks() * 512 };
        if metadata.len() == size { Ok(source) } else { Err(source.damaged(metadata.len())) }
    }

    fn damaged(&self, found: u64) -> StoreError {
        StoreError::Damaged {
            path: self.path.clone(),
            what: format!("it has {found} bytes instead of {}", self.size),
        }
    }

    /// Where data are at or after `from`: the first such bytes, up to the next hole.
    fn data_after(&self, from: u64) -> Option<(u64, u64)> {
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return None,
            // A file system that knows of no holes.
            Err(_) => return Some((from, self.size)),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).unwrap_or(self.size);
        (start < self.size).then_some((start, end.min(self.size)))
    }
}

/// A disk that is being written. It has its whole length from the start and is zeros where nothing was put.
pub(super) struct Transfer {
    disk: File,
    path: PathBuf,
    way: Way,
    /// Bytes on their way to `pending_at`.
    pending: Vec<u8>,
    pending_at: u64,
}

impl Transfer {
    pub(super) fn new(disk: File, path: PathBuf, way: Way) -> Self {
        Self { disk, path, way, pending: Vec::with_capacity(PIECE as usize), pending_at: 0 }
    }

    /// Puts an object at `at`, a multiple of the block size. `told` hears how many bytes of it are there, again and again.
    pub(super) fn put(&mut self, source: &Source, at: u64, told: &mut dyn FnMut(u64)) -> Result<()> {
        let mut done = self.share(source, at)?;
        told(done);
        while done < source.size {
            let whole = (done, source.size);
            let data = if source.allocated < source.size { source.data_after(done) } else { Some(whole) };
            let Some((from, to)) = data else { break };
            self.copy(source, from, to, at, told)?;
            done = to;
        }
        told(source.size);
        let end = at + source.size;
        if self.pending_end() == end {
            // Zeros up to where the next object begins, so that its bytes follow without a gap.
            let padding = end.next_multiple_of(BLOCK) - end;
            self.pending.resize(self.pending.len() + padding as usize, 0);
        }
        Ok(())
    }

    fn pending_end(&self) -> u64 {
        self.pending_at + self.pending.len() as u64
    }

    /// Shares the whole blocks of an object. Returns how many bytes that were: none where it cannot be.
    fn share(&mut self, source: &Source, at: u64) -> Result<u64> {
        let length = source.size / BLOCK * BLOCK;
        if self.way > Way::Share || length == 0 {
            return Ok(0);
        }
        match share_range(&source.file, &self.disk, at, length) {
            Ok(()) => Ok(length),
            Err(error) if is_full(&error) => Err(error).doing("write", &self.path),
            Err(_) => {
                self.way = Way::Copy;
                Ok(0)
            }
        }
    }

    /// Copies bytes of an object that is at `at`.
    fn copy(
        &mut self,
        source: &Source,
        mut from: u64,
        to: u64,
        at: u64,
        told: &mut dyn FnMut(u64),
    ) -> Result<()> {
        while from < to {
            let copied =
                if to - from >= WORTH_A_CALL { self.copy_in_kernel(source, from, to, at)? } else { 0 };
            from += match copied {
                0 => self.read_and_write(source, from, to, at)?,
                copied => copied,
            };
            told(from);
        }
        Ok(())
    }

    /// As much as the kernel copies at once: nothing where it cannot.
    #[cfg(target_os = "linux")]
    fn copy_in_kernel(&mut self, source: &Source, from: u64, to: u64, at: u64) -> Result<u64> {
        /// The user is told after each piece.
        const AT_ONCE: u64 = 64 << 20;
        if self.way > Way::Copy {
            return Ok(0);
        }
        let (mut source_at, mut disk_at) = (from, at + from);
        let length = (to - from).min(AT_ONCE) as usize;
        let copied = rustix::fs::copy_file_range(
            &source.file,
            Some(&mut source_at),
            &self.disk,
            Some(&mut disk_at),
            length,
        );
        match copied.map_err(io::Error::from) {
            Ok(copied) if copied > 0 => Ok(copied as u64),
            Err(error) if is_full(&error) => Err(error).doing("write", &self.path),
            // Some file systems copy nothing and call it done.
            _ => {
                self.way = Way::ReadAndWrite;
                Ok(0)
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn copy_in_kernel(&mut self, _: &Source, _: u64, _: u64, _: u64) -> Result<u64> {
        self.way = Way::ReadAndWrite;
        Ok(0)
    }

    /// One piece through memory. Small ones wait for their neighbours.
    fn read_and_write(&mut self, source: &Source, from: u64, to: u64, at: u64) -> Result<u64> {
        let disk_at = at + from;
        if disk_at != self.pending_end() || self.pending.len() as u64 >= PIECE {
            self.flush()?;
            self.pending_at = disk_at;
        }
        let start = self.pending.len();
        let length = (to - from).min(PIECE - start as u64);
        self.pending.resize(start + length as usize, 0);
        source.file.read_exact_at(&mut self.pending[start..], from).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                source.damaged(source.file.metadata().map_or(0, |metadata| metadata.len()))
            }
            _ => StoreError::Io { doing: "read", path: source.path.clone(), source: error },
        })?;
        Ok(length)
    }

    fn flush(&mut self) -> Result<()> {
        self.disk.write_all_at(&self.pending, self.pending_at).doing("write", &self.path)?;
        self.pending.clear();
        Ok(())
    }

    /// Writes what waits, and puts everything on the disk.
    pub(super) fn finish(mut self) -> Result<Way> {
        self.flush()?;
        self.disk.sync_data().doing("write to disk", &self.path)?;
        Ok(self.way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whichever_way_they_are_put_the_bytes_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let noise = |length: usize| (0..length).map(|at| (at * 7919 % 251) as u8 + 1).collect::<Vec<_>>();
        let mut objects = Vec::new();
        for length in [1, 4095, 4096, 4097, 300_000, 262_144, 3_000_000, 5] {
            objects.push(noise(length));
        }
        // With holes: at its start, between data, at its end; one of the pieces is worth a call.
        let mut sparse = vec![0; 6_000_000];
        for (at, length) in [(100_000, 10), (1_000_000, 1_500_000), (4_000_001, 4096)] {
            sparse[at..at + length].copy_from_slice(&noise(length));
        }
        objects.push(sparse);
        objects.push(vec![0; 1 << 20]);
        objects.push(noise(9));
        let mut sources = Vec::new();
        let mut expected = Vec::new();
        for (number, object) in objects.iter().enumerate() {
            let path = dir.path().join(number.to_string());
            let file = File::create(&path).unwrap();
            file.set_len(object.len() as u64).unwrap();
            // Blocks of zeros are left out, as in objects.
            for (at, block) in
                object.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b > 0))
            {
                file.write_all_at(block, at as u64 * 4096).unwrap();
            }
            let source = Source::new(File::open(&path).unwrap(), path, object.len() as u64).unwrap();
            sources.push((source, expected.len() as u64));
            expected.extend_from_slice(object);
            expected.resize(expected.len().next_multiple_of(4096), 0);
        }
        for way in [Way::Share, Way::Copy, Way::ReadAndWrite] {
            let path = dir.path().join("disk");
            let disk = File::create(&path).unwrap();
            disk.set_len(expected.len() as u64).unwrap();
            let mut transfer = Transfer::new(disk, path.clone(), way);
            for (source, at) in &sources {
                let mut told = 0;
                transfer
                    .put(source, *at, &mut |bytes| {
                        assert!(bytes >= told && bytes <= source.size);
                        told = bytes;
                    })
                    .unwrap();
                assert_eq!(told, source.size);
            }
            assert!(transfer.finish().unwrap() >= way);
            assert!(std::fs::read(&path).unwrap() == expected, "{way:?}");
            let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
            assert!(allocated < expected.len() as u64 - 4_000_000, "{way:?}: {allocated} bytes");
            std::fs::remove_file(path).unwrap();
        }
    }
}
