//! What is said of a file (§5 of the draft).

use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Stat, Timespec, Timestamps, chmodat, chownat, fchmod, fchown, ftruncate,
    futimens, utimensat,
};
use rustix::process::{Gid, Uid};

use super::files::{Outcome, path};
use super::{Failure, Reply};
use crate::wire::{Put as _, Reader};

const SIZE: u32 = 1;
const OWNER: u32 = 2;
const MODE: u32 = 4;
const TIMES: u32 = 8;
const MORE: u32 = 1 << 31;

/// Those that are given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    pub(super) owner: Option<(u32, u32)>,
    pub(super) mode: Option<u32>,
    /// When it was used and when it was changed, in seconds since 1970.
    pub(super) times: Option<(u32, u32)>,
}

/// A path, and what is to become of it.
pub(super) struct Change<'a>(&'a [u8], Attributes);

impl Attributes {
    pub(super) fn of(stat: &Stat) -> Self {
        // The protocol ends in 2106.
        let seconds = |time: i64| u32::try_from(time).unwrap_or(if time < 0 { 0 } else { u32::MAX });
        Self {
            size: Some(u64::try_from(stat.st_size).unwrap_or(0)),
            owner: Some((stat.st_uid, stat.st_gid)),
            mode: Some(mode(stat)),
            times: Some((seconds(stat.st_atime), seconds(stat.st_mtime))),
        }
    }

    pub(super) fn read(fields: &mut Reader<'_>) -> Result<Self, Failure> {
        let flags = fields.number()?;
        let has = |flag: u32| flags & flag != 0;
        let attributes = Self {
            size: if has(SIZE) { Some(fields.long()?) } else { None },
            owner: if has(OWNER) { Some((fields.number()?, fields.number()?)) } else { None },
            mode: if has(MODE) { Some(fields.number()?) } else { None },
            times: if has(TIMES) { Some((fields.number()?, fields.number()?)) } else { None },
        };
        if has(MORE) {
            for _ in 0..fields.number()? {
                // Extensions that nobody has; each takes bytes, so this ends with the packet.
                let _ = (fields.string()?, fields.string()?);
            }
        }
        Ok(attributes)
    }

    /// Reads a path and its attributes.
    pub(super) fn read_after<'a>(fields: &mut Reader<'a>) -> Result<Change<'a>, Failure> {
        let path = fields.string()?;
        Ok(Change(path, Self::read(fields)?))
    }

    pub(super) fn put(&self, to: &mut Vec<u8>) {
        let flag = |given: bool, flag: u32| if given { flag } else { 0 };
        to.put_number(
            flag(self.size.is_some(), SIZE)
                | flag(self.owner.is_some(), OWNER)
                | flag(self.mode.is_some(), MODE)
                | flag(self.times.is_some(), TIMES),
        );
        if let Some(size) = self.size {
            to.put_long(size);
        }
        if let Some((user, group)) = self.owner {
            to.put_number(user).put_number(group);
        }
        if let Some(mode) = self.mode {
            to.put_number(mode);
        }
        if let Some((used, changed)) = self.times {
            to.put_number(used).put_number(changed);
        }
    }

    /// The mode's bits that can be set.
    pub(super) fn permissions(&self) -> Option<Mode> {
        self.mode.map(permissions)
    }

    fn timestamps(&self) -> Option<Timestamps> {
        let at = |seconds: u32| Timespec { tv_sec: seconds.into(), tv_nsec: 0 };
        self.times.map(|(used, changed)| Timestamps { last_access: at(used), last_modification: at(changed) })
    }

    fn ids(&self) -> Option<(Option<Uid>, Option<Gid>)> {
        self.owner.map(|(user, group)| (id(user).map(Uid::from_raw), id(group).map(Gid::from_raw)))
    }

    /// Gives them to an open file.
    pub(super) fn apply_to(&self, file: BorrowedFd<'_>) -> Outcome {
        if let Some(size) = self.size {
            ftruncate(file, size)?;
        }
        if let Some(mode) = self.permissions() {
            fchmod(file, mode)?;
        }
        if let Some(times) = self.timestamps() {
            futimens(file, &times)?;
        }
        if let Some((user, group)) = self.ids() {
            fchown(file, user, group)?;
        }
        Ok(Reply::Done)
    }
}

impl Change<'_> {
    /// Gives them to a path, or, if it is not to be followed, to a link itself.
    pub(super) fn apply_to_path(&self, follow: bool) -> Outcome {
        let Self(name, attributes) = self;
        let path = path(name)?;
        let flags = if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
        if let Some(size) = attributes.size.filter(|_| follow) {
            // A FIFO without a reader must not hold the server.
            let wait = OFlags::NONBLOCK | OFlags::NOCTTY;
            let mut options = std::fs::File::options();
            options.write(true).custom_flags(wait.bits().cast_signed()).open(path)?.set_len(size)?;
        }
        if let Some(mode) = attributes.permissions().filter(|_| follow) {
            chmodat(CWD, path, mode, AtFlags::empty())?;
        }
        if let Some(times) = attributes.timestamps() {
            utimensat(CWD, path, &times, flags)?;
        }
        if let Some((user, group)) = attributes.ids() {
            chownat(CWD, path, user, group, flags)?;
        }
        Ok(Reply::Done)
    }
}

/// The mode, which has 16 bits on some systems.
#[allow(clippy::useless_conversion, reason = "32 bits on others")]
pub(super) fn mode(stat: &Stat) -> u32 {
    u32::from(stat.st_mode)
}

/// `chown(2)` leaves what is all ones as it is.
fn id(number: u32) -> Option<u32> {
    (number != u32::MAX).then_some(number)
}

#[allow(clippy::cast_possible_truncation, reason = "the width of a mode differs by system; its bits fit all")]
fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode((mode & 0o7777) as _)
}
