//! What the kernel is told of an inode of a tree.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, INodeNo, ReplyXattr};
use kiln_erofs::{FileType, Inode, Time, escape_xattr_name};

use super::Owners;

/// Which xattrs an overlay over this file system takes for its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OverlayNames {
    /// `trusted.overlay.`
    Trusted,
    /// `user.overlay.`, with the option `userxattr`.
    User,
    /// There is no overlay.
    None,
}

impl OverlayNames {
    /// The name under which a tree's xattr is shown, so that an overlay above does not take an image's for its own.
    pub(super) fn shown(self, name: &[u8]) -> Vec<u8> {
        match (self, name.strip_prefix(b"user.overlay.")) {
            (Self::Trusted, _) => escape_xattr_name(name).into_owned(),
            (Self::User, Some(rest)) => [b"user.overlay.overlay.", rest].concat(),
            (Self::User | Self::None, _) => name.to_owned(),
        }
    }
}

/// The attributes of an inode of a tree.
pub(super) fn lower_attributes(inode: &Inode<'_>, ino: INodeNo, owners: Owners) -> FileAttr {
    let time = system_time(inode.mtime());
    let rdev = inode.device().map_or(0, |device| libc::makedev(device.major, device.minor) as u32);
    let (uid, gid) = match owners {
        Owners::Kept => (inode.uid(), inode.gid()),
        Owners::One { uid, gid } => (uid, gid),
    };
    FileAttr {
        ino,
        size: inode.size(),
        blocks: inode.size().div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: kind(inode.file_type()),
        perm: inode.mode() as u16,
        nlink: inode.links(),
        uid,
        gid,
        rdev,
        blksize: 4096,
        flags: 0,
    }
}

/// A size of zero asks for the length.
pub(super) fn send_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    if size == 0 {
        reply.size(value.len() as u32);
    } else if value.len() > size as usize {
        reply.error(Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

pub(super) fn kind(file_type: FileType) -> fuser::FileType {
    match file_type {
        FileType::Directory => fuser::FileType::Directory,
        FileType::Regular => fuser::FileType::RegularFile,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
    }
}

/// The attributes of what is not there.
pub(super) const NOTHING: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: UNIX_EPOCH,
    mtime: UNIX_EPOCH,
    ctime: UNIX_EPOCH,
    crtime: UNIX_EPOCH,
    kind: fuser::FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 0,
    flags: 0,
};

/// A time that this system cannot tell is 1970.
fn system_time(time: Time) -> SystemTime {
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let seconds =
        if time.seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    let part = Duration::from_nanos(time.nanoseconds.into());
    seconds.and_then(|seconds| seconds.checked_add(part)).unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_own_overlay_xattrs_are_never_taken_for_the_overlays() {
        for (names, name, shown) in [
            (OverlayNames::User, "user.overlay.opaque", "user.overlay.overlay.opaque"),
            (OverlayNames::User, "user.overlay.overlay.x", "user.overlay.overlay.overlay.x"),
            (OverlayNames::User, "trusted.overlay.redirect", "trusted.overlay.redirect"),
            (OverlayNames::User, "user.mime", "user.mime"),
            (OverlayNames::Trusted, "trusted.overlay.redirect", "trusted.overlay.overlay.redirect"),
            (OverlayNames::None, "trusted.overlay.redirect", "trusted.overlay.redirect"),
            (OverlayNames::None, "user.overlay.opaque", "user.overlay.opaque"),
            (OverlayNames::Trusted, "user.overlay.opaque", "user.overlay.opaque"),
        ] {
            assert_eq!(names.shown(name.as_bytes()), shown.as_bytes(), "{name}");
        }
    }

    #[test]
    fn every_time_of_a_tree_can_be_told() {
        let before = Time { seconds: -2, nanoseconds: 500_000_000 };
        assert_eq!(system_time(before), UNIX_EPOCH - Duration::from_millis(1500));
        let last = system_time(Time { seconds: i64::MAX, nanoseconds: 999_999_999 });
        assert_eq!(last.duration_since(UNIX_EPOCH).unwrap(), Duration::new(i64::MAX as u64, 999_999_999));
        let first = system_time(Time { seconds: i64::MIN, nanoseconds: 0 });
        assert_eq!(UNIX_EPOCH.duration_since(first).unwrap(), Duration::from_secs(1 << 63));
    }
}
