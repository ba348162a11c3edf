//! Directories, and a line for each of their entries.

use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, open, statat};
use rustix::io::Errno;

use super::attributes::{self, Attributes};

/// Entries in one reply.
const AT_ONCE: usize = 100;

/// An entry.
#[derive(Debug)]
pub(super) struct Name {
    pub(super) name: Vec<u8>,
    /// As `ls -l` shows it.
    pub(super) line: Vec<u8>,
    pub(super) attributes: Attributes,
}

impl Name {
    /// A name of which nothing more is said.
    pub(super) fn bare(name: Vec<u8>) -> Self {
        Self { line: name.clone(), name, attributes: Attributes::default() }
    }
}

/// A directory that is being listed.
#[derive(Debug)]
pub(super) struct Listing(Dir);

impl Listing {
    pub(super) fn open(path: &Path) -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Dir::new(open(path, flags, Mode::empty())?).map(Self)
    }

    pub(super) fn descriptor(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.0.fd()
    }

    /// Some more entries; none at the end.
    pub(super) fn next_names(&mut self) -> Result<Vec<Name>, Errno> {
        let mut names = Vec::new();
        while names.len() < AT_ONCE {
            let Some(entry) = self.0.next() else { break };
            let entry = entry?;
            let name = entry.file_name();
            // It may have gone since.
            let Ok(stat) = statat(self.0.fd()?, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let name = name.to_bytes().to_vec();
            names.push(Name { line: line(&stat, &name), name, attributes: Attributes::of(&stat) });
        }
        Ok(names)
    }
}

/// `ls -l` with numbers for names and times in UTC.
fn line(stat: &Stat, name: &[u8]) -> Vec<u8> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Socket => 's',
        FileType::Fifo => 'p',
        FileType::CharacterDevice => 'c',
        FileType::BlockDevice => 'b',
        _ => '-',
    };
    let mode = attributes::mode(stat);
    let bit = |bit: u32, letter: char| if mode & bit != 0 { letter } else { '-' };
    let execute = |bit: u32, special: u32, letter: char| match (mode & special != 0, mode & bit != 0) {
        (true, true) => letter,
        (true, false) => letter.to_ascii_uppercase(),
        (false, true) => 'x',
        (false, false) => '-',
    };
    let mode: String = [
        kind,
        bit(0o400, 'r'),
        bit(0o200, 'w'),
        execute(0o100, 0o4000, 's'),
        bit(0o040, 'r'),
        bit(0o020, 'w'),
        execute(0o010, 0o2000, 's'),
        bit(0o004, 'r'),
        bit(0o002, 'w'),
        execute(0o001, 0o1000, 't'),
    ]
    .iter()
    .collect();
    let (year, month, day) = date(stat.st_mtime.div_euclid(86400));
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = months[month - 1];
    let (links, user, group, size) = (stat.st_nlink, stat.st_uid, stat.st_gid, stat.st_size);
    let mut line =
        format!("{mode} {links:>4} {user:<8} {group:<8} {size:>8} {month} {day:>2}  {year} ").into_bytes();
    line.extend_from_slice(name);
    line
}

/// Year, month and day of a day since 1970, in the Gregorian calendar: years begin in March, so that the day that comes and
/// goes is their last, and 400 of them are one cycle.
fn date(days: i64) -> (i64, usize, i64) {
    const CYCLE: i64 = 146_097;
    // From 0000-03-01.
    let days = days + 719_468;
    let (cycle, day) = (days.div_euclid(CYCLE), days.rem_euclid(CYCLE));
    let year = (day - day / 1460 + day / 36_524 - day / (CYCLE - 1)) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = cycle * 400 + year + i64::from(month <= 2);
    (year, usize::try_from(month).unwrap_or(1), day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_dates() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (19_782, (2024, 2, 29)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
            (-1, (1969, 12, 31)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
    }
}
