//! What a machine has written to memory that it maps copy-on-write.
//!
//! All machines of a template map its memory file privately, so that what none of them has changed is in the host's memory
//! once. What one of them has changed is found in its process's page table, and is all that has to be kept for a fork or a
//! snapshot of it: the *delta*.
//!
//! ```text
//! 0    "KILNMEM1"
//! 8    memory in bytes, u64 LE
//! 16   runs: offset u64 LE, length u64 LE, that many bytes; offsets ascend, both are multiples of the page
//! …    a run of length 0 at offset 0 ends it
//! ```

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::VmmError;

const MAGIC: &[u8; 8] = b"KILNMEM1";
/// Bytes of a page of the host. Larger ones would only make deltas larger.
const PAGE: u64 = 4096;
/// Bytes copied at once.
const CHUNK: usize = 1 << 20;
/// Entries of the page table read at once: of 128 MiB.
const ENTRIES: usize = 32 << 10;

/// In `/proc/<pid>/pagemap` (`Documentation/admin-guide/mm/pagemap.rst`): the page is there, is swapped, is the file's own.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// A process's mapping of a memory file.
#[derive(Debug)]
pub(crate) struct Mapping {
    memory: File,
    pages: File,
    address: u64,
    length: u64,
}

impl Mapping {
    /// Finds where the process `pid` maps `length` bytes of `file`. It must be a child of this one, or this one must be root.
    pub(crate) fn find(pid: u32, file: &Path, length: u64) -> Result<Self, VmmError> {
        let fail = || VmmError::io(format!("look at the memory of process {pid}"));
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(fail())?;
        let path = fs::canonicalize(file).map_err(VmmError::io(format!("find {}", file.display())))?;
        let address = find_in(&maps, &path.to_string_lossy(), length).ok_or_else(|| VmmError::Io {
            doing: format!("find the machine's memory in process {pid}"),
            source: io::Error::other(format!("{} is not mapped as one piece", path.display())),
        })?;
        Ok(Self {
            memory: File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).map_err(fail())?,
            pages: File::open(format!("/proc/{pid}/pagemap")).map_err(fail())?,
            address,
            length,
        })
    }

    /// Where it is, and the process's memory and page table.
    pub(crate) fn into_parts(self) -> (u64, File, File) {
        (self.address, self.memory, self.pages)
    }

    /// The other way: of who could open them.
    pub(crate) fn of_parts(address: u64, length: u64, memory: File, pages: File) -> Self {
        Self { memory, pages, address, length }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { memory: self.memory.try_clone()?, pages: self.pages.try_clone()?, ..*self })
    }

    /// Writes what the process has changed. It must not run meanwhile.
    pub(crate) fn write_delta(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(64 << 10, to);
        out.write_all(MAGIC)?;
        out.write_all(&self.length.to_le_bytes())?;
        let mut buffer = vec![0; CHUNK];
        for (first, count) in self.changed()? {
            let (mut at, end) = (first * PAGE, (first + count) * PAGE);
            out.write_all(&at.to_le_bytes())?;
            out.write_all(&(end - at).to_le_bytes())?;
            while at < end {
                let part = &mut buffer[..usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK)];
                self.memory.read_exact_at(part, self.address + at)?;
                out.write_all(part)?;
                at += part.len() as u64;
            }
        }
        out.write_all(&[0; 16])?;
        out.flush()
    }

    /// Puts into the process what another had changed. It must not run meanwhile.
    pub(crate) fn read_delta(&self, from: &mut dyn Read) -> io::Result<()> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let mut input = BufReader::with_capacity(64 << 10, from);
        let mut word = [0; 8];
        input.read_exact(&mut word)?;
        if word != *MAGIC {
            return Err(bad("it does not begin as a delta"));
        }
        input.read_exact(&mut word)?;
        if u64::from_le_bytes(word) != self.length {
            return Err(bad("it is of a machine with another amount of memory"));
        }
        let mut buffer = vec![0; CHUNK];
        let mut after = 0;
        loop {
            input.read_exact(&mut word)?;
            let mut at = u64::from_le_bytes(word);
            input.read_exact(&mut word)?;
            let length = u64::from_le_bytes(word);
            if length == 0 && at == 0 {
                return Ok(());
            }
            let end = at.checked_add(length).filter(|end| *end <= self.length);
            let aligned = at.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0;
            let Some(end) = end.filter(|_| aligned && at >= after) else {
                return Err(bad("it has a run that cannot be"));
            };
            after = end;
            while at < end {
                let part = &mut buffer[..usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK)];
                input.read_exact(part)?;
                self.memory.write_all_at(part, self.address + at)?;
                at += part.len() as u64;
            }
        }
    }

    /// Runs of changed pages: first, count.
    fn changed(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let pages = self.length / PAGE;
        let mut buffer = vec![0; ENTRIES * 8];
        let mut page = 0;
        while page < pages {
            let count = usize::try_from(pages - page).unwrap_or(ENTRIES).min(ENTRIES);
            let part = &mut buffer[..count * 8];
            self.pages.read_exact_at(part, (self.address / PAGE + page) * 8)?;
            for (index, entry) in part.as_chunks::<8>().0.iter().enumerate() {
                if is_changed(u64::from_ne_bytes(*entry)) {
                    let page = page + index as u64;
                    match runs.last_mut() {
                        Some((first, count)) if *first + *count == page => *count += 1,
                        _ => runs.push((page, 1)),
                    }
                }
            }
            page += count as u64;
        }
        Ok(runs)
    }
}

/// A private mapping's page that is not the file's is the process's own.
fn is_changed(entry: u64) -> bool {
    entry & SWAPPED != 0 || (entry & PRESENT != 0 && entry & OF_FILE == 0)
}

/// The address of the mapping of `length` bytes of the file at `path` in what `/proc/<pid>/maps` says.
fn find_in(maps: &str, path: &str, length: u64) -> Option<u64> {
    let mut found: Option<(u64, u64)> = None;
    for line in maps.lines() {
        // `start-end perms offset device inode   path`; a path may have spaces.
        let Some((fields, name)) = line.find('/').map(|at| line.split_at(at)) else { continue };
        if name != path {
            continue;
        }
        let mut fields = fields.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        found = match found {
            // The kernel may show one mapping in pieces.
            Some((first, last)) if last == start => Some((first, end)),
            _ => Some((start, end)),
        };
    }
    found.filter(|(start, end)| end - start == length).map(|(start, _)| start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    #[test]
    fn a_mapping_is_found_in_one_piece_or_several() {
        let maps = "\
            55e0-55e1 r-xp 00000000 08:01 99 /usr/bin/qemu\n\
            7f0000000000-7f0000200000 rw-p 00000000 08:01 12 /t/a memory\n\
            7f0000200000-7f0000400000 rw-p 00200000 08:01 12 /t/a memory\n\
            7fff00000000-7fff00001000 rw-p 00000000 00:00 0 [stack]\n";
        assert_eq!(find_in(maps, "/t/a memory", 0x40_0000), Some(0x7f00_0000_0000));
        assert_eq!(find_in(maps, "/t/a memory", 0x20_0000), None);
        assert_eq!(find_in(maps, "/t/other", 0x40_0000), None);
    }

    /// A private mapping in this very process.
    struct Private {
        at: *mut std::ffi::c_void,
        length: usize,
    }

    impl Private {
        fn of(file: &File, length: usize) -> Self {
            let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe { mmap(std::ptr::null_mut(), length, prot, flags, file, 0) }.unwrap();
            Self { at, length }
        }

        fn bytes(&mut self) -> &mut [u8] {
            // SAFETY: mapped for as long as this lives, and borrowed from it.
            unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.length) }
        }
    }

    impl Drop for Private {
        fn drop(&mut self) {
            // SAFETY: nothing borrows it any more.
            unsafe { munmap(self.at, self.length) }.unwrap();
        }
    }

    #[test]
    fn what_one_has_changed_is_all_that_another_needs() {
        let dir = tempfile::tempdir().unwrap();
        let length = 4 << 20;
        let base: Vec<u8> = (0..length).map(|n| (n / 4096 % 255) as u8).collect();
        let paths = [dir.path().join("one"), dir.path().join("two")];
        let [mut one, mut two] = paths.each_ref().map(|path| {
            fs::write(path, &base).unwrap();
            Private::of(&File::open(path).unwrap(), length)
        });
        let find = |path: &Path| Mapping::find(std::process::id(), path, length as u64).unwrap();
        // Read pages are not changed ones; a page that is zero now is.
        let sum: u64 = one.bytes().iter().map(|byte| u64::from(*byte)).sum();
        assert!(sum > 0);
        one.bytes()[5 * 4096..7 * 4096].fill(0);
        one.bytes()[length - 1] = 77;
        let mut delta = Vec::new();
        find(&paths[0]).write_delta(&mut delta).unwrap();
        assert_eq!(delta.len(), 16 + (16 + 2 * 4096) + (16 + 4096) + 16);
        find(&paths[1]).read_delta(&mut delta.as_slice()).unwrap();
        assert!(one.bytes() == two.bytes());
        assert!(fs::read(&paths[1]).unwrap() == base, "the file itself stays as it was");
    }

    #[test]
    fn a_delta_that_lies_changes_nothing_outside_of_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        fs::write(&path, vec![1; 8192]).unwrap();
        let _mapped = Private::of(&File::open(&path).unwrap(), 8192);
        let mapping = Mapping::find(std::process::id(), &path, 8192).unwrap();
        let delta = |memory: u64, runs: &[(u64, u64)]| {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(memory.to_le_bytes());
            for (at, length) in runs {
                bytes.extend(at.to_le_bytes());
                bytes.extend(length.to_le_bytes());
                bytes.extend(vec![9; usize::try_from(*length).unwrap_or(0).min(1 << 16)]);
            }
            bytes
        };
        let table = [
            (b"KILNMEM0".to_vec(), "does not begin"),
            (delta(4096, &[]), "another amount"),
            (delta(8192, &[(4096, 8192)]), "cannot be"),
            (delta(8192, &[(u64::MAX - 4095, 4096)]), "cannot be"),
            (delta(8192, &[(0, !4095)]), "cannot be"),
            (delta(8192, &[(1, 4096)]), "cannot be"),
            (delta(8192, &[(4096, 0)]), "cannot be"),
            (delta(8192, &[(4096, 4096), (0, 4096)]), "cannot be"),
            (delta(8192, &[(0, 4096)]), "fill whole buffer"),
        ];
        for (bytes, words) in table {
            let error = mapping.read_delta(&mut bytes.as_slice()).unwrap_err().to_string();
            assert!(error.contains(words), "{error} ({words})");
        }
    }
}
