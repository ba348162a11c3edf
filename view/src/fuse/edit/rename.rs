//! Names are moved, whole directories among them.
//!
//! A directory that shows something of the tree is not copied: it is marked with the path of what it shows there.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, RenameFlags};
use rustix::io::{Errno, Result};

use super::super::space::Space;
use super::change::{OnDisk, hold, on_disk};
use super::nodes::Id;
use super::place::Place;
use super::union::{Found, Union};

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name<'n> {
    pub(super) parent: Id,
    pub(super) name: &'n [u8],
}

impl Union {
    /// renameat2(2) as a request says. A name on its way to a root that everybody shares may have to be asked for once more
    /// ([`leaving`](super::leaving)).
    pub(super) fn rename_as_told(
        &mut self,
        from: Name<'_>,
        to: Name<'_>,
        flags: fuser::RenameFlags,
        space: Space,
    ) -> Result<()> {
        let to_root = |to: &Name<'_>, from: &Name<'_>| {
            space.is_everybodys(to.parent) && !space.is_everybodys(from.parent)
        };
        let leaving = match flags {
            _ if to_root(&to, &from) => Some((from.parent, from.name)),
            fuser::RenameFlags::RENAME_EXCHANGE if to_root(&from, &to) => Some((to.parent, to.name)),
            _ => None,
        };
        if let Some((parent, name)) = leaving
            && !self.leaving.may_go(parent, name)
        {
            return Err(Errno::STALE);
        }
        let renamed = match flags {
            fuser::RenameFlags::RENAME_EXCHANGE => self.exchange(from, to),
            fuser::RenameFlags::RENAME_NOREPLACE => self.rename(from, to, false),
            flags if flags.is_empty() => self.rename(from, to, true),
            _ => Err(Errno::INVAL),
        };
        // What has to be fetched first is still on its way.
        if let Some((parent, name)) = leaving.filter(|_| self.missing.is_none()) {
            self.leaving.went(parent, name);
        }
        renamed
    }

    /// rename(2), in place of what has the new name if there is such.
    fn rename(&mut self, from: Name<'_>, to: Name<'_>, replace: bool) -> Result<()> {
        let source = self.find(from.parent, from.name)?.ok_or(Errno::NOENT)?;
        let target = self.find(to.parent, to.name)?;
        if let Some(target) = &target {
            if !replace {
                return Err(Errno::EXIST);
            }
            if target.id == source.id {
                return Ok(());
            }
            self.may_replace(&source, target)?;
        }
        self.copy_up(source.id, None)?;
        let directory = self.ready(from.parent)?;
        let to_directory = self.ready(to.parent)?;
        if source.is_directory() {
            self.mark_before_move(source.id, &directory, from.name, to)?;
        }
        let held = match &target {
            Some(target) if target.in_scratch => Some(hold(&to_directory, to.name)?),
            _ => None,
        };
        let uncovers = self.lower_child(from.parent, from.name)?.is_some();
        match (source.is_directory(), on_disk(&to_directory, to.name)?) {
            // A directory cannot be renamed over a whiteout, but may change places with it.
            (true, OnDisk::Whiteout) => {
                self.upper.exchange(&directory, from.name, &to_directory, to.name)?;
                if !uncovers {
                    self.undo(&directory, from.name, false);
                }
            }
            (is_directory, there) => {
                if is_directory && there == OnDisk::Directory {
                    self.empty(&to_directory, to.name)?;
                }
                let flags = if uncovers { RenameFlags::WHITEOUT } else { RenameFlags::empty() };
                rustix::fs::renameat_with(&directory, from.name, &to_directory, to.name, flags)?;
            }
        }
        if let Some(target) = target {
            self.nodes.remove_name(target.id, to.parent, to.name, held);
        }
        self.nodes.add_name(source.id, to.parent, to.name);
        self.nodes.remove_name(source.id, from.parent, from.name, None);
        Ok(())
    }

    /// renameat2(2) with `RENAME_EXCHANGE`.
    fn exchange(&mut self, a: Name<'_>, b: Name<'_>) -> Result<()> {
        let first = self.find(a.parent, a.name)?.ok_or(Errno::NOENT)?;
        let second = self.find(b.parent, b.name)?.ok_or(Errno::NOENT)?;
        if first.id == second.id {
            return Ok(());
        }
        self.copy_up(first.id, None)?;
        self.copy_up(second.id, None)?;
        let (in_a, in_b) = (self.ready(a.parent)?, self.ready(b.parent)?);
        if first.is_directory() {
            self.mark_before_move(first.id, &in_a, a.name, b)?;
        }
        if second.is_directory() {
            self.mark_before_move(second.id, &in_b, b.name, a)?;
        }
        self.upper.exchange(&in_a, a.name, &in_b, b.name)?;
        for (id, from, to) in [(first.id, a, b), (second.id, b, a)] {
            self.nodes.add_name(id, to.parent, to.name);
            self.nodes.remove_name(id, from.parent, from.name, None);
        }
        Ok(())
    }

    fn may_replace(&self, source: &Found, target: &Found) -> Result<()> {
        match (source.is_directory(), target.is_directory()) {
            (false, true) => Err(Errno::ISDIR),
            (true, false) => Err(Errno::NOTDIR),
            (true, true) if !self.is_empty(target.id)? => Err(Errno::NOTEMPTY),
            _ => Ok(()),
        }
    }

    /// Marks a directory so that it shows the same at its new place as at the old one. At the old one that changes
    /// nothing.
    fn mark_before_move(&self, id: Id, directory: &OwnedFd, name: &[u8], to: Name<'_>) -> Result<()> {
        let place = Place::named(rustix::io::fcntl_dupfd_cloexec(directory, 0)?, name);
        let lower = self.nodes.get(id).and_then(|node| node.lower);
        match lower {
            Some(nid) => match self.upper.mark(&place, "redirect", &self.tree_path(nid)?) {
                // The path is longer than an xattr may be here: the caller copies it piece by piece.
                Err(Errno::NOSPC | Errno::RANGE | Errno::TOOBIG) => Err(Errno::XDEV),
                other => other,
            },
            None if self.lower_child(to.parent, to.name)?.is_some() => {
                self.upper.mark(&place, "opaque", b"y")
            }
            None => Ok(()),
        }
    }

    /// Puts a directory that is empty on disk too in the place of one that has nothing but whiteouts.
    fn empty(&self, directory: &OwnedFd, name: &[u8]) -> Result<()> {
        let temporary = self.upper.new_name();
        rustix::fs::mkdirat(self.upper.work(), &temporary, Mode::RWXU)?;
        let place = Place::named(self.upper.work_again()?, &temporary);
        let swapped = self
            .upper
            .mark(&place, "opaque", b"y")
            .and_then(|()| self.upper.exchange(self.upper.work(), &temporary, directory, name));
        self.upper.discard(&temporary);
        swapped
    }
}
