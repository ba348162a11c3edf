//! Copies of what a file holds, and of its holes only that they are there.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// What is asked of the kernel at once: so that a signal that ends the process is not kept waiting.
#[cfg(target_os = "linux")]
const STEP: u64 = 256 << 20;

/// What is read at once where the kernel does not copy by itself.
const BUFFER: usize = 256 << 10;

/// The ranges of the first `size` bytes of a file that are not holes, ascending, as lseek(2) tells them with `SEEK_DATA` and
/// `SEEK_HOLE`. Moves the file's position.
pub(crate) fn data(file: &File, size: u64) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let found = next_data(file, at, size).transpose()?;
        at = found.as_ref().map_or(size, |range| range.end);
        Some(found)
    })
}

fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    if at >= size {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        found => found?,
    };
    if start >= size {
        return Ok(None);
    }
    let end = match seek(file, SeekFrom::Hole(start)) {
        // The file became shorter meanwhile.
        Err(Errno::NXIO) => return Ok(None),
        found => found?.min(size),
    };
    // A file system that says otherwise would be asked for ever.
    if start < at || end <= start {
        return Err(io::Error::other(format!("the file system says that data at {start} ends at {end}")));
    }
    Ok(Some(start..end))
}

/// How many bytes of a file are not holes.
pub(crate) fn data_bytes(file: &File) -> io::Result<u64> {
    let size = file.metadata()?.len();
    data(file, size).try_fold(0, |sum, range| range.map(|range| sum + (range.end - range.start)))
}

/// Copies all that `from` holds to the empty file `to`, which then has the same size and holes.
pub(crate) fn copy(from: &File, to: &File) -> io::Result<()> {
    let size = from.metadata()?.len();
    to.set_len(size)?;
    for range in data(from, size) {
        copy_range(from, to, range?)?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn copy_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let (mut read, mut written) = (range.start, range.start);
    while read < range.end {
        let step = usize::try_from((range.end - read).min(STEP)).map_err(io::Error::other)?;
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), step) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::INTR) => {}
            // Two file systems, or one that cannot do it.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return copy_through_memory(from, to, read..range.end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn copy_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    copy_through_memory(from, to, range)
}

fn copy_through_memory(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut at = range.start;
    while at < range.end {
        let step = buffer.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
        let length = match from.read_at(&mut buffer[..step], at) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read?,
        };
        let read = &buffer[..length];
        // What is not written stays a hole.
        if read.iter().any(|byte| *byte != 0) {
            to.write_all_at(read, at)?;
        }
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 40 MiB with data at the beginning, in the middle and at the very end, which is no multiple of a block.
    fn sample() -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let size = (40 << 20) + 123;
        file.set_len(size).unwrap();
        for (at, length) in [(0, 5000), (8 << 20, 3 << 20), (size - 7, 7)] {
            let bytes: Vec<u8> = (0..length).map(|index| (index % 251 + 1) as u8).collect();
            file.write_all_at(&bytes, at).unwrap();
        }
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        (file, bytes)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        let (from, bytes) = sample();
        let held = data_bytes(&from).unwrap();
        assert!((3 << 20..4 << 20).contains(&held), "{held}");
        for through_memory in [false, true] {
            let to = tempfile::tempfile().unwrap();
            if through_memory {
                to.set_len(bytes.len() as u64).unwrap();
                for range in data(&from, bytes.len() as u64) {
                    copy_through_memory(&from, &to, range.unwrap()).unwrap();
                }
            } else {
                copy(&from, &to).unwrap();
            }
            assert!(content(&to) == bytes);
            assert_eq!(data_bytes(&to).unwrap(), held);
        }
    }

    #[test]
    fn what_is_all_hole_or_empty_has_no_data() {
        for size in [0, 1, 4096, 1 << 40] {
            let from = tempfile::tempfile().unwrap();
            from.set_len(size).unwrap();
            let to = tempfile::tempfile().unwrap();
            copy(&from, &to).unwrap();
            assert_eq!((to.metadata().unwrap().len(), data_bytes(&to).unwrap()), (size, 0));
        }
    }
}
