//! What `stat` shows, and what of it can be changed.

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Statx, StatxFlags, Timespec, Timestamps, Uid};
use rustix::fs::{UTIME_NOW, UTIME_OMIT, chmodat, chownat, utimensat};
use rustix::io::Errno;

use crate::Ownership;
use crate::fid::Fid;
use crate::message::{NONE, Request, have, set};
use crate::names::PERMISSIONS;
use crate::node::{HostNode, Node};
use crate::session::Session;
use crate::wire::{Qid, Reply};

/// What the guest is told of a file.
struct Shown<'a> {
    qid: Qid,
    mode: u32,
    links: u32,
    size: u64,
    blocks: u64,
    stat: &'a Statx,
}

impl Session {
    pub(crate) fn getattr(&self, fid: u32, mask: u64, reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        match &*fid.node {
            Node::Host(node) => {
                let stat = node.stat()?;
                let shown = Shown {
                    qid: self.tree.paths.qid(&stat)?,
                    mode: stat.stx_mode.into(),
                    links: stat.stx_nlink,
                    size: stat.stx_size,
                    blocks: stat.stx_blocks,
                    stat: &stat,
                };
                self.show(&shown, mask, reply);
            }
            Node::Around => {
                let (_, stat) = self.tree.single()?;
                let shown = Shown {
                    qid: self.around_qid()?,
                    mode: FileType::Directory.as_raw_mode() | 0o555,
                    links: 2,
                    size: 0,
                    blocks: 0,
                    stat: &stat,
                };
                self.show(&shown, mask, reply);
            }
        }
        Ok(())
    }

    fn show(&self, shown: &Shown<'_>, mask: u64, reply: &mut Reply) {
        let Shown { qid, stat, .. } = shown;
        let (uid, gid) = match self.tree.options.ownership {
            Ownership::Host => (stat.stx_uid, stat.stx_gid),
            Ownership::Squash { uid, gid } => (uid, gid),
        };
        let born = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
        let birth = if born { (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec) } else { (0, 0) };
        let valid = have::BASIC | have::GENERATION | if born { have::BIRTH } else { 0 };
        // Programs copy in pieces of this size.
        let block = self.io_unit().max(stat.stx_blksize);
        reply
            .u64(valid & (mask | have::BASIC))
            .qid(*qid)
            .u32(shown.mode)
            .u32(uid)
            .u32(gid)
            .u64(shown.links.into())
            .u64(device_number(stat.stx_rdev_major, stat.stx_rdev_minor))
            .u64(shown.size)
            .u64(block.into())
            .u64(shown.blocks);
        for time in [&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime] {
            reply.u64(time.tv_sec as u64).u64(time.tv_nsec.into());
        }
        reply.u64(birth.0 as u64).u64(birth.1.into());
        // An inode number is used again for another file; the moment of its making is another one. The last is a data
        // version, which nobody reads.
        reply.u64((birth.0 as u64).wrapping_mul(1_000_000_000).wrapping_add(birth.1.into())).u64(0);
    }

    pub(crate) fn setattr(&self, request: &Request<'_>) -> Result<(), Errno> {
        let Request::Setattr { fid, valid, mode, uid, gid, size, .. } = *request else {
            return Err(Errno::INVAL);
        };
        if valid & !set::ALL != 0 {
            return Err(Errno::INVAL);
        }
        let times = times(request)?;
        let fid = self.fids.get(fid)?;
        let node = fid.node.host()?;
        let given = |flag: u32| valid & flag != 0;
        // Whatever changes other attributes by the way comes before them: truncation the times, `chown` the mode.
        if given(set::SIZE) {
            truncate(&fid, node, size)?;
        }
        let squashed = matches!(self.tree.options.ownership, Ownership::Squash { .. });
        if given(set::UID | set::GID) && !squashed {
            let uid = Some(uid).filter(|uid| given(set::UID) && *uid != NONE).map(Uid::from_raw);
            let gid = Some(gid).filter(|gid| given(set::GID) && *gid != NONE).map(Gid::from_raw);
            chownat(node, c"", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if given(set::MODE) {
            if node.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let mode = Mode::from_bits_retain(self.allowed_mode(mode & PERMISSIONS, node.kind));
            chmodat(CWD, node.path(), mode, AtFlags::empty())?;
        }
        if given(set::ATIME | set::MTIME) {
            utimensat(node, c"", &times, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if valid == set::CTIME {
            // Only the kernel sets it: when anything is set, be it to what it was.
            chownat(node, c"", None, None, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }
}

/// Through what the guest has open, if that can write: the file's mode may have changed since.
fn truncate(fid: &Fid, node: &HostNode, size: u64) -> Result<(), Errno> {
    match node.kind {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR),
        _ => return Err(Errno::INVAL),
    }
    if let Ok(file) = fid.file() {
        match rustix::fs::ftruncate(file, size) {
            // Open for reading only; both are in the manual.
            Err(Errno::INVAL | Errno::BADF) => {}
            done => return done,
        }
    }
    rustix::fs::ftruncate(node.open(OFlags::WRONLY)?, size)
}

fn times(request: &Request<'_>) -> Result<Timestamps, Errno> {
    let Request::Setattr {
        valid, atime_seconds, atime_nanoseconds, mtime_seconds, mtime_nanoseconds, ..
    } = *request
    else {
        return Err(Errno::INVAL);
    };
    let time = |any: u32, exact: u32, seconds: u64, nanoseconds: u64| {
        if valid & any == 0 {
            return Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT });
        }
        if valid & exact == 0 {
            return Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW });
        }
        // `UTIME_NOW` and `UTIME_OMIT` lie above.
        if nanoseconds >= 1_000_000_000 {
            return Err(Errno::INVAL);
        }
        Ok(Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds as _ })
    };
    Ok(Timestamps {
        last_access: time(set::ATIME, set::ATIME_GIVEN, atime_seconds, atime_nanoseconds)?,
        last_modification: time(set::MTIME, set::MTIME_GIVEN, mtime_seconds, mtime_nanoseconds)?,
    })
}

/// A device number as Linux's client reads it (`new_decode_dev`).
fn device_number(major: u32, minor: u32) -> u64 {
    u64::from(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_those_of_linux() {
        for (major, minor, expected) in [(0, 0, 0), (1, 3, 0x103), (259, 300, 0x0011_032c)] {
            assert_eq!(device_number(major, minor), expected, "{major}:{minor}");
        }
    }
}
