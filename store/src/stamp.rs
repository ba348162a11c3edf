//! Whether a file of the host is still what it was.
//!
//! Programs cannot ask for a file's version: Linux keeps it to itself (`STATX_CHANGE_COOKIE`). What they see is the time of
//! its last change, and that is only as fine as the clock's tick: two changes in one tick look like one. [`Stamp::settle`]
//! waits for the tick to end, so that whatever changes the file after that is seen. And a call that writes sets the time when it
//! begins, but may take long: [`await_writes`] waits until those have ended that were under way.
//!
//! Two things leave no trace: writing to a page that is mapped shared and dirty already (`mmap(2)`, «`MAP_SHARED`»: the times
//! are updated at some moment until the next `msync`), and the rest of a direct write (`O_DIRECT`) that is under way.

use std::fs::File;
use std::time::Duration;

use rustix::fs::{FileType, Stat};

/// What changes when a file does (`inode(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    kind: FileType,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// No kernel's tick is longer (`HZ=100`), with as much again for the file system to be late.
#[cfg(target_os = "linux")]
const TICK: Duration = Duration::from_millis(20);

impl Stamp {
    // The fields' types differ between platforms.
    #[allow(clippy::unnecessary_cast)]
    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino,
            kind: FileType::from_raw_mode(stat.st_mode),
            size: stat.st_size,
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }

    /// Whether both are of one file, whatever happened to it.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode, self.kind) == (other.device, other.inode, other.kind)
    }

    /// In bytes.
    pub(crate) fn size(&self) -> u64 {
        u64::try_from(self.size).unwrap_or(0)
    }

    /// Waits until a further change must give another stamp: not at all for a file that was not changed this moment.
    #[cfg(target_os = "linux")]
    pub(crate) fn settle(&self) {
        let clock = || {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
            i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
        };
        let changed = i128::from(self.changed.0) * 1_000_000_000 + i128::from(self.changed.1);
        // Far in the future it is the time of another clock: of a server, or from before this one was set.
        let waits = |now: i128| now <= changed && changed - now < TICK.as_nanos() as i128;
        let begin = clock();
        while waits(clock()) && clock() - begin < TICK.as_nanos() as i128 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Times are in nanoseconds where there is no coarse clock.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn settle(&self) {}
}

/// Waits until every `write` to a file has ended that was under way. Where the file is read next does not stay as it was.
///
/// Whoever looks for data (`lseek(2)`, `SEEK_DATA`) takes the lock that writers have on ext4, Btrfs and tmpfs; on XFS whoever
/// reads does so anyway.
pub(crate) fn await_writes(file: &File) {
    // What it finds does not matter, nor whether the file system can look.
    let _ = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0));
}

/// Before something is looked at again that was being changed: 2 ms, then twice as long each time.
pub(crate) fn pause(attempt: u32) {
    std::thread::sleep(Duration::from_millis(1 << attempt.min(7)));
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_change_after_settling_gives_another_stamp_although_the_size_is_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for round in 0..20_u8 {
            fs::write(&path, [round; 100]).unwrap();
            let stamp = || Stamp::of(&rustix::fs::fstat(File::open(&path).unwrap()).unwrap());
            let before = stamp();
            before.settle();
            assert_eq!(stamp(), before);
            std::os::unix::fs::FileExt::write_all_at(
                &File::options().write(true).open(&path).unwrap(),
                &[round + 1; 100],
                0,
            )
            .unwrap();
            assert_ne!(stamp(), before, "{round}");
        }
    }
}
