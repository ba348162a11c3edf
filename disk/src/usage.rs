//! What files take, counted from their extents.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use kiln_contract::DiskUsage;

use crate::error::Context as _;
use crate::{Result, room, sparse};

/// Where the bytes of a file are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Mapping {
    /// Bytes that only this place in this file refers to.
    own: u64,
    /// Ranges of the device that something else refers to too: start and length in bytes.
    shared: Vec<(u64, u64)>,
}

impl Mapping {
    /// Adds an extent; `physical` is where it is, if it is shared. Neighbours on the device become one.
    #[cfg(any(target_os = "linux", test))]
    pub(crate) fn add(&mut self, length: u64, physical: Option<u64>) {
        let Some(start) = physical else {
            self.own = self.own.saturating_add(length);
            return;
        };
        match self.shared.last_mut() {
            Some((before, so_far)) if before.checked_add(*so_far) == Some(start) => {
                *so_far = so_far.saturating_add(length);
            }
            _ => self.shared.push((start, length)),
        }
    }
}

/// What files take, together and each for itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SetUsage {
    /// Each file, in the order in which they were given. `logical` is its size, `exclusive` what would be freed if it were
    /// removed, and `shared` what another file, in the set or not, refers to as well.
    pub files: Vec<DiskUsage>,
    /// What they take together, in bytes: what several of them share is counted once.
    pub taken: u64,
}

/// What a set of different files takes. What the kernel has not allocated yet counts as if it had. Where the file
/// system tells no extents (tmpfs; APFS), everything that is not a hole counts as exclusive.
///
/// Two things no file system tells: how small compressed data is (it counts uncompressed), and how much of an extent
/// nobody refers to any more (btrfs frees an extent only as a whole).
///
/// # Errors
/// A file cannot be read.
pub fn usage_of(files: &[impl AsRef<Path>]) -> Result<SetUsage> {
    let mut sum = Sum::default();
    let mut sizes = Vec::new();
    for (owner, path) in files.iter().enumerate() {
        let path = path.as_ref();
        let file = File::open(path).doing("open", path)?;
        sizes.push(sum.add(owner, &file).doing("read the extents of", path)?);
    }
    let (each, taken) = sum.finish(files.len());
    let files = sizes.into_iter().zip(each);
    let files = files.map(|(logical, (exclusive, shared))| DiskUsage { logical, exclusive, shared });
    Ok(SetUsage { files: files.collect(), taken })
}

/// As [`usage_of`], for owners of several files each: what only the files of one owner share is that owner's own. Each
/// `logical` is the size of the owner's first file; an owner whose first file is gone has nothing.
pub(crate) fn of_owners<'f>(
    owners: impl Iterator<Item = &'f [PathBuf]>,
) -> Result<(Vec<Option<DiskUsage>>, u64)> {
    let mut sum = Sum::default();
    let mut sizes = Vec::new();
    for (owner, files) in owners.enumerate() {
        let mut logical = None;
        for (index, path) in files.iter().enumerate() {
            let file = match File::open(path) {
                // Removed meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound && index == 0 => break,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                opened => opened.doing("open", path)?,
            };
            let size = sum.add(owner, &file).doing("read the extents of", path)?;
            logical.get_or_insert(size);
        }
        sizes.push(logical);
    }
    let (each, taken) = sum.finish(sizes.len());
    let owners = sizes.into_iter().zip(each);
    let usage = |(logical, (exclusive, shared))| {
        Option::map(logical, |logical| DiskUsage { logical, exclusive, shared })
    };
    Ok((owners.map(usage).collect(), taken))
}

/// Where a shared range begins on its device, where it ends, and whose reference to it this is.
type Reference = (u64, u64, usize);

/// Collects where the files of several owners are.
#[derive(Debug, Default)]
struct Sum {
    own: BTreeMap<usize, u64>,
    /// What is shared, by device, and by whether its file system says only of whole extents that they are.
    shared: BTreeMap<(u64, bool), Vec<Reference>>,
}

impl Sum {
    /// Adds a file. Returns its size.
    fn add(&mut self, owner: usize, file: &File) -> io::Result<u64> {
        let metadata = file.metadata()?;
        let mapping = map(file)?;
        let own = self.own.entry(owner).or_default();
        *own = own.saturating_add(mapping.own);
        if !mapping.shared.is_empty() {
            let ranges = mapping.shared.iter();
            let ranges = ranges.map(|(start, length)| (*start, start.saturating_add(*length), owner));
            self.shared.entry((metadata.dev(), room::shares_by_extent(file))).or_default().extend(ranges);
        }
        Ok(metadata.len())
    }

    /// For each of `owners` owners what is its own and what is shared, and what all take together.
    fn finish(self, owners: usize) -> (Vec<(u64, u64)>, u64) {
        let mut each = vec![(0, 0); owners];
        let mut taken = 0_u64;
        for (owner, own) in self.own {
            each[owner].0 = own;
            taken = taken.saturating_add(own);
        }
        for ((_, by_extent), ranges) in self.shared {
            taken = taken.saturating_add(divide(&ranges, by_extent, &mut each));
        }
        (each, taken)
    }
}

/// A stretch of a device of which only one owner has references.
#[derive(Debug, Default)]
struct Run {
    owner: usize,
    end: u64,
    /// Bytes with one reference.
    once: u64,
    /// Whether some of it has several.
    several: bool,
}

/// Divides shared ranges of one device, given as start, end and owner, among their owners: adds to what is each one's own
/// and to what each one shares. Returns how many bytes they cover.
///
/// Walks over the starts and ends in order. Between two of them, the same references are in force; if all of them are
/// of one owner, and there are several, they explain why the file system calls the range shared, and it is the owner's own. A
/// single reference means that the other one is outside of what was asked for, unless the file system says `by_extent`
/// that something is shared: then it may be about another part of the same extent. Where that part touches and is
/// the owner's own, so is this.
fn divide(ranges: &[Reference], by_extent: bool, each: &mut [(u64, u64)]) -> u64 {
    let ranges = || ranges.iter().filter(|(start, end, _)| start < end);
    let mut starts: Vec<(u64, usize)> = ranges().map(|(start, _, owner)| (*start, *owner)).collect();
    let mut ends: Vec<(u64, usize)> = ranges().map(|(_, end, owner)| (*end, *owner)).collect();
    starts.sort_unstable();
    ends.sort_unstable();
    let mut starts = starts.into_iter().peekable();
    let mut ends = ends.into_iter().peekable();

    // References in force by owner; their number, and the sum of the owners' indices: that of the only owner, if there is
    // only one.
    let mut references = vec![0_u64; each.len()];
    let (mut all, mut present, mut index_sum) = (0_u64, 0_u64, 0_usize);
    // Bytes of several owners so far, and what that was when an owner came: so that no step needs to visit all owners.
    let mut shared = 0_u64;
    let mut when_came = vec![0_u64; each.len()];
    let mut run = Run::default();
    let (mut at, mut covered) = (0_u64, 0_u64);

    while let Some(end) = ends.peek().copied() {
        // Ends come before starts at the same place: neighbours do not overlap.
        let start = starts.peek().copied().filter(|start| start.0 < end.0);
        let next = start.unwrap_or(end).0;
        let length = next - at;
        if all > 0 && length > 0 {
            covered += length;
            if present > 1 {
                shared += length;
            } else {
                let touches = by_extent && run.owner == index_sum && run.end == at;
                if !touches {
                    close(&run, each);
                    run = Run { owner: index_sum, ..Run::default() };
                }
                run.end = next;
                match all {
                    1 => run.once += length,
                    _ => {
                        run.several = true;
                        each[index_sum].0 += length;
                    }
                }
            }
        }
        at = next;
        if let Some((_, owner)) = start {
            starts.next();
            all += 1;
            references[owner] += 1;
            if references[owner] == 1 {
                present += 1;
                index_sum += owner;
                when_came[owner] = shared;
            }
        } else {
            ends.next();
            let owner = end.1;
            all -= 1;
            references[owner] -= 1;
            if references[owner] == 0 {
                present -= 1;
                index_sum -= owner;
                each[owner].1 += shared - when_came[owner];
            }
        }
    }
    close(&run, each);
    covered
}

fn close(run: &Run, each: &mut [(u64, u64)]) {
    if let Some((own, shared)) = each.get_mut(run.owner) {
        *if run.several { own } else { shared } += run.once;
    }
}

#[cfg(target_os = "linux")]
fn map(file: &File) -> io::Result<Mapping> {
    use rustix::io::Errno;
    match crate::fiemap::mapping(file) {
        Err(error)
            if matches!(
                Errno::from_io_error(&error),
                Some(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS)
            ) =>
        {
            map_data(file)
        }
        mapped => mapped,
    }
}

#[cfg(not(target_os = "linux"))]
fn map(file: &File) -> io::Result<Mapping> {
    map_data(file)
}

fn map_data(file: &File) -> io::Result<Mapping> {
    Ok(Mapping { own: sparse::data_bytes(file)?, shared: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_ranges_are_divided_among_their_owners() {
        type Case = (&'static str, &'static [(u64, u64, usize)], [(u64, u64); 3], u64);
        let cases: &[Case] = &[
            ("nothing", &[], [(0, 0); 3], 0),
            ("two share all", &[(10, 30, 0), (10, 30, 1)], [(0, 20), (0, 20), (0, 0)], 20),
            (
                "three, one of them a part",
                &[(0, 100, 0), (0, 100, 1), (40, 60, 2)],
                [(0, 100), (0, 100), (0, 20)],
                100,
            ),
            ("the other is not asked about", &[(0, 10, 2)], [(0, 0), (0, 0), (0, 10)], 10),
            ("an owner with itself", &[(0, 10, 1), (0, 10, 1)], [(0, 0), (10, 0), (0, 0)], 10),
            ("with itself and another", &[(0, 10, 1), (0, 10, 1), (5, 10, 0)], [(0, 5), (5, 5), (0, 0)], 10),
            ("neighbours are not overlaps", &[(0, 10, 0), (10, 20, 0)], [(0, 20), (0, 0), (0, 0)], 20),
            ("what begins where another ends", &[(0, 10, 0), (10, 20, 1)], [(0, 10), (0, 10), (0, 0)], 20),
            ("gaps", &[(90, 100, 2), (0, 10, 0), (0, 10, 2)], [(0, 10), (0, 0), (0, 20)], 20),
            ("staggered", &[(0, 30, 0), (10, 40, 1), (20, 50, 2)], [(0, 30), (0, 30), (0, 30)], 50),
            ("empty", &[(5, 5, 0)], [(0, 0); 3], 0),
            ("the last byte there is", &[(u64::MAX - 1, u64::MAX, 0)], [(0, 1), (0, 0), (0, 0)], 1),
        ];
        for (what, ranges, expected, covered) in cases {
            let mut each = [(0, 0); 3];
            assert_eq!(divide(ranges, false, &mut each), *covered, "{what}");
            assert_eq!(each, *expected, "{what}");
        }
        let cases: &[Case] = &[
            ("half of an own extent", &[(0, 10, 1), (0, 6, 1)], [(0, 0), (10, 0), (0, 0)], 10),
            ("its middle", &[(0, 10, 1), (4, 6, 1)], [(0, 0), (10, 0), (0, 0)], 10),
            ("in pieces", &[(0, 3, 1), (3, 6, 1), (5, 6, 1), (6, 9, 1)], [(0, 0), (9, 0), (0, 0)], 9),
            ("half of another's", &[(0, 10, 1), (0, 6, 2)], [(0, 0), (0, 10), (0, 6)], 10),
            ("beside an own extent", &[(0, 10, 1), (0, 10, 1), (11, 15, 1)], [(0, 0), (10, 4), (0, 0)], 14),
            ("after another's", &[(0, 5, 1), (0, 5, 1), (5, 7, 0), (7, 9, 1)], [(0, 2), (5, 2), (0, 0)], 9),
        ];
        for (what, ranges, expected, covered) in cases {
            let mut each = [(0, 0); 3];
            assert_eq!(divide(ranges, true, &mut each), *covered, "{what}");
            assert_eq!(each, *expected, "{what}");
        }
    }

    #[test]
    fn the_division_is_what_counting_byte_by_byte_gives() {
        // A small generator of numbers that look random, so that a failure can be repeated.
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..500 {
            let number = random(12);
            let ranges: Vec<(u64, u64, usize)> = (0..number)
                .map(|_| (random(60), random(20), random(4) as usize))
                .map(|(start, length, owner)| (start, start + length, owner))
                .collect();
            let mut expected = [(0, 0); 4];
            let mut covered = 0;
            for byte in 0..80 {
                let owners: Vec<usize> = ranges
                    .iter()
                    .filter(|(start, end, _)| (*start..*end).contains(&byte))
                    .map(|r| r.2)
                    .collect();
                covered += u64::from(!owners.is_empty());
                let single = owners.len() > 1 && owners.iter().all(|owner| *owner == owners[0]);
                for (owner, (own, shared)) in expected.iter_mut().enumerate() {
                    if owners.contains(&owner) {
                        *if single { own } else { shared } += 1;
                    }
                }
            }
            let mut each = [(0, 0); 4];
            assert_eq!((divide(&ranges, false, &mut each), each), (covered, expected), "{ranges:?}");
        }
    }

    #[test]
    fn neighbouring_extents_become_one_range() {
        let mut mapping = Mapping::default();
        for (length, physical) in [(10, Some(100)), (5, Some(110)), (7, None), (1, Some(115)), (1, Some(3))] {
            mapping.add(length, physical);
        }
        assert_eq!(mapping, Mapping { own: 7, shared: vec![(100, 16), (3, 1)] });
    }
}
