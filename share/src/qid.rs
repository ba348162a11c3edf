//! One number for every file, over all filesystems that a share reaches into.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Dev, FileType, Statx, makedev};
use rustix::io::Errno;

use crate::node::kind_of;
use crate::wire::Qid;

/// Which file of the host it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    pub(crate) device: Dev,
    pub(crate) inode: u64,
}

impl Identity {
    pub(crate) fn of(stat: &Statx) -> Self {
        Self { device: makedev(stat.stx_dev_major, stat.stx_dev_minor), inode: stat.stx_ino }
    }
}

/// How many bits of an inode number go into a path as they are.
const LOW_BITS: u32 = 48;

/// Paths of qids. Each pair of a device and the high 16 bits of an inode number gets a number of 16 bits when it is first
/// seen, and the low 48 bits follow: no two files collide. The share's own filesystem gets 0, so that
/// inode numbers there are what they are on the host. A guest can make no devices, so the table grows with
/// the host's mounts only; it ends at 65536 pairs.
#[derive(Debug)]
pub(crate) struct Paths {
    numbers: Mutex<HashMap<(Dev, u16), u16>>,
    root: Dev,
}

impl Paths {
    pub(crate) fn new(root: Dev) -> Self {
        Self { numbers: Mutex::new(HashMap::from([((root, 0), 0)])), root }
    }

    pub(crate) fn path(&self, file: Identity) -> Result<u64, Errno> {
        let high = (file.inode >> LOW_BITS) as u16;
        let low = file.inode & ((1 << LOW_BITS) - 1);
        if (file.device, high) == (self.root, 0) {
            return Ok(low);
        }
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let next = u16::try_from(numbers.len());
        let number = match numbers.get(&(file.device, high)) {
            Some(number) => *number,
            None => *numbers.entry((file.device, high)).or_insert(next.map_err(|_| Errno::OVERFLOW)?),
        };
        Ok(u64::from(number) << LOW_BITS | low)
    }

    pub(crate) fn qid(&self, stat: &Statx) -> Result<Qid, Errno> {
        Ok(Qid {
            kind: qid_kind(kind_of(stat)),
            version: version(stat),
            path: self.path(Identity::of(stat))?,
        })
    }
}

pub(crate) fn qid_kind(kind: FileType) -> u8 {
    match kind {
        FileType::Directory => Qid::DIRECTORY,
        FileType::Symlink => Qid::SYMLINK,
        _ => Qid::FILE,
    }
}

/// Another one after every change that the times of the file show.
fn version(stat: &Statx) -> u32 {
    let mix = |hash: u64, number: u64| (hash ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let hash = [
        stat.stx_mtime.tv_sec as u64,
        u64::from(stat.stx_mtime.tv_nsec),
        stat.stx_ctime.tv_sec as u64,
        u64::from(stat.stx_ctime.tv_nsec),
    ]
    .into_iter()
    .fold(0, mix);
    // 0 would tell the client that this file cannot be cached.
    ((hash >> 32) as u32 ^ hash as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_files_have_one_path() {
        let paths = Paths::new(7);
        let file = |device, inode| paths.path(Identity { device, inode }).unwrap();
        assert_eq!(file(7, 12), 12);
        let all = [
            file(7, 12),
            file(8, 12),
            file(9, 12),
            file(7, 12 | 1 << 48),
            file(7, 12 | 0xffff << 48),
            file(8, 12 | 1 << 48),
            file(8, 13),
        ];
        let distinct: std::collections::HashSet<u64> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len(), "{all:?}");
        assert_eq!(file(8, 12), all[1], "and keeps it");
    }

    #[test]
    fn the_table_of_devices_ends() {
        let paths = Paths::new(0);
        for device in 1..=0xffff {
            paths.path(Identity { device, inode: 1 }).unwrap();
        }
        assert_eq!(paths.path(Identity { device: 0x1_0000, inode: 1 }), Err(Errno::OVERFLOW));
        assert!(paths.path(Identity { device: 0xffff, inode: 2 }).is_ok());
    }
}
