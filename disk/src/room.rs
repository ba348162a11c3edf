//! How much room there is, and on what file system.

use std::path::Path;

use crate::Result;
use crate::error::Context as _;

/// Bytes that an ordinary user can still write to the file system of `path`.
pub(crate) fn available(path: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(path).doing("ask for the free space of", path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(target_os = "linux")]
const BTRFS: u32 = 0x9123_683e;

/// File systems by the numbers that statfs(2) gives, and whether copied data may take less room there than it has bytes:
/// because they can compress, or because they share blocks where they can.
#[cfg(target_os = "linux")]
const KNOWN: &[(u32, &str, bool)] = &[
    (0xef53, "ext4", false),
    (0x5846_5342, "XFS", true),
    (BTRFS, "btrfs", true),
    (0xca45_1a4e, "bcachefs", true),
    (0x2fc1_2fc1, "ZFS", true),
    (0xf2f5_2010, "F2FS", true),
    (0x0102_1994, "tmpfs", false),
    (0x794c_7630, "overlayfs", true),
    (0x6969, "NFS", true),
    (0x6573_5546, "FUSE", true),
];

#[cfg(target_os = "linux")]
fn known(path: &Path) -> Option<(&'static str, bool)> {
    // The type of the number differs between architectures; its values have 32 bits.
    let magic = rustix::fs::statfs(path).ok()?.f_type as u32;
    KNOWN.iter().find(|(number, ..)| *number == magic).map(|(_, name, may_take_less)| (*name, *may_take_less))
}

#[cfg(not(target_os = "linux"))]
fn known(_: &Path) -> Option<(&'static str, bool)> {
    None
}

/// The name of the file system of `path`.
pub(crate) fn file_system(path: &Path) -> String {
    known(path).map_or("the file system", |(name, _)| name).to_owned()
}

/// Whether files usually can share blocks on the file system of `path`.
pub(crate) fn usually_shares(path: &Path) -> bool {
    cfg!(target_os = "macos") || ["btrfs", "XFS", "bcachefs"].contains(&file_system(path).as_str())
}

/// Whether a copy may fit for which there seems to be no room.
pub(crate) fn may_take_less(path: &Path) -> bool {
    known(path).is_none_or(|(_, may_take_less)| may_take_less)
}

/// Whether the file system of a file says only of whole extents that they are shared, though of some only a part is.
#[cfg(target_os = "linux")]
pub(crate) fn shares_by_extent(file: &std::fs::File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type as u32 == BTRFS)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn shares_by_extent(_: &std::fs::File) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_name() {
        let shm = Path::new("/dev/shm");
        assert_eq!((file_system(shm).as_str(), may_take_less(shm)), ("tmpfs", false));
        assert_eq!(file_system(Path::new("/proc")), "the file system");
        assert!(available(shm).unwrap() > 0);
    }
}
