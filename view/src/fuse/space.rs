//! Which numbers and times of a FUSE connection are a tree's.
//!
//! One connection may serve many trees, the views of a router. A number is then made of the view's and of the tree's own:
//!
//! ```text
//! bit   63   62       61 … 47   46 … 0
//!       0    scratch  view      number in the tree or the scratch
//! ```
//!
//! so that what the kernel remembers of one view can never be taken for another's. Only the root's number, 1, is the same
//! in all; nothing of it may be remembered, nor of the names in it.

use std::time::Duration;

use fuser::{Errno, FileHandle, FopenFlags, INodeNo, ReplyOpen};

/// As long as the kernel can count: nothing in a tree changes.
pub(super) const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// FUSE's number for the root of everything.
pub(super) const ROOT: u64 = 1;

/// Set in the numbers of what is only in a scratch. No tree has that many inodes: it would have 2^67 bytes.
pub(crate) const SCRATCH: u64 = 1 << 62;

const VIEW_SHIFT: u32 = 47;
const NUMBERS: u64 = (1 << VIEW_SHIFT) - 1;
const VIEWS: u64 = (SCRATCH >> VIEW_SHIFT) - 1;

/// The number of a view among those of one connection: never 0, and never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Share(u16);

impl Share {
    /// The first that is given.
    pub(crate) const FIRST: Self = Self(1);

    /// The one after this; `None` after the last, which stands for nothing.
    pub(crate) fn next(self) -> Option<Self> {
        Some(Self(self.0 + 1)).filter(|share| u64::from(share.0) < VIEWS)
    }

    /// As a number, 1 to 32,766.
    pub(crate) fn number(self) -> u16 {
        self.0
    }

    /// The share that has a number; none has 0.
    pub(crate) fn of_number(number: u16) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }

    /// Whose a number or a handle of a root's listing is, and what it is there.
    pub(crate) fn split(number: u64) -> (Option<Self>, u64) {
        let view = (number >> VIEW_SHIFT) & VIEWS;
        (Self::of_number(view as u16), number & (SCRATCH | NUMBERS))
    }

    fn join(self, number: u64) -> u64 {
        match number & !(SCRATCH | NUMBERS) {
            0 => number | u64::from(self.0) << VIEW_SHIFT,
            // A scratch on a file system that numbers its files higher: nobody's.
            _ => u64::MAX >> 1,
        }
    }
}

/// The numbers of one tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// All: the connection serves nothing else.
    Whole,
    /// One view's among many.
    Share(Share),
}

impl Space {
    /// What the kernel is told for a number of the tree.
    pub(crate) fn number(self, own: u64) -> INodeNo {
        INodeNo(match self {
            Self::Whole => own,
            Self::Share(share) => share.join(own),
        })
    }

    /// How long the kernel may remember a directory, its names and their attributes.
    pub(crate) fn remembered(self, directory: u64) -> &'static Duration {
        if self.is_everybodys(directory) { &Duration::ZERO } else { &FOR_EVER }
    }

    /// Answers who opens a directory.
    pub(crate) fn open_directory(self, directory: u64, reply: ReplyOpen) {
        let Self::Share(share) = self else {
            // Listings need no handle, and the kernel may keep them: it never asks again.
            return reply.error(Errno::ENOSYS);
        };
        if self.is_everybodys(directory) {
            // Whose listing it is.
            reply.opened(FileHandle(share.join(0)), FopenFlags::empty());
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
        }
    }

    /// Whether others ask about the same directory and must be told something else.
    pub(crate) fn is_everybodys(self, directory: u64) -> bool {
        matches!(self, Self::Share(_)) && directory == ROOT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_different_views_never_meet_and_come_back_as_they_were() {
        let mut last = Share::FIRST;
        let mut shares = vec![last];
        while let Some(next) = last.next() {
            shares.push(next);
            last = next;
        }
        assert_eq!(shares.len(), 32_766);
        for share in [shares[0], shares[1], last] {
            for own in [ROOT, 36, NUMBERS, SCRATCH | 1, SCRATCH | NUMBERS] {
                let told = Space::Share(share).number(own);
                assert_eq!(Share::split(told.0), (Some(share), own));
                assert_ne!(told.0, ROOT);
            }
            // Too high for a share: a number that is no view's.
            let (view, _) = Share::split(Space::Share(share).number(NUMBERS + 1).0);
            assert!(view > Some(last));
        }
        assert_eq!(Share::split(ROOT), (None, ROOT));
    }
}
