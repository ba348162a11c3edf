//! What is done to the names in a directory: made, linked, renamed, removed.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Statx, Uid, chmodat, chownat};
use rustix::io::Errno;

use crate::Ownership;
use crate::fid::{Fid, Place, State};
use crate::files::open_flags;
use crate::message::{NONE, UNLINK_DIRECTORY, open};
use crate::node::{HostNode, Node, statx_of, step};
use crate::session::Session;
use crate::wire::Reply;

/// Everything in a mode but the kind.
pub(crate) const PERMISSIONS: u32 = 0o7777;
/// What a new file may have before it belongs to its owner.
const PLAIN: u32 = 0o777;
const SET_ID: u32 = 0o6000;

impl Session {
    /// Makes a file and opens it; the fid of the directory becomes that of the file. Without `O_EXCL`, one that is there is opened.
    pub(crate) fn lcreate(
        &self,
        number: u32,
        name: &[u8],
        flags: u32,
        mode: u32,
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let fid = self.fids.get(number)?;
        let directory = fid.node.directory()?;
        if fid.state.get().is_some() {
            return Err(Errno::BUSY);
        }
        let host_flags = open_flags(flags)?;
        // Somebody on the host may make and remove the name meanwhile; not for ever.
        let mut tries = 0;
        let (node, file) = loop {
            match directory.create(name, host_flags - OFlags::TRUNC, Mode::from_bits_retain(mode & PLAIN)) {
                Ok(file) => {
                    let owned = self.give(&file, mode, &fid, gid);
                    let held = owned.and_then(|()| HostNode::new(rustix::io::fcntl_dupfd_cloexec(&file, 0)?));
                    let (node, _) = held.inspect_err(|_| {
                        // What cannot be given to its owner is not left to somebody else.
                        let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
                    })?;
                    break (node, file);
                }
                Err(Errno::EXIST) if flags & open::EXCLUSIVE == 0 => match directory.child(name) {
                    Ok((node, _)) if node.kind == FileType::Directory => return Err(Errno::ISDIR),
                    Ok((node, _)) => {
                        let file = node.open(host_flags)?;
                        break (node, file);
                    }
                    Err(Errno::NOENT) if tries < 8 => tries += 1,
                    Err(error) => return Err(error),
                },
                Err(error) => return Err(error),
            }
        };
        let qid = self.tree.paths.qid(&statx_of(file.as_fd())?)?;
        let place = Place { directory: Arc::clone(&fid.node), name: name.into() };
        let created = Fid::new(Arc::new(Node::Host(node)), Some(place), fid.user);
        self.fids.replace(number, &fid, created.opened(State::File(file)))?;
        reply.qid(qid).u32(self.io_unit());
        Ok(())
    }

    pub(crate) fn mkdir(
        &self,
        directory: u32,
        name: &[u8],
        mode: u32,
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let fid = self.fids.get(directory)?;
        let parent = fid.node.directory()?;
        rustix::fs::mkdirat(parent, step(name)?, Mode::from_bits_retain(mode & PLAIN))?;
        self.made(&fid, parent, name, Some(mode), gid, AtFlags::REMOVEDIR, reply)
    }

    pub(crate) fn symlink(
        &self,
        directory: u32,
        name: &[u8],
        target: &[u8],
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let fid = self.fids.get(directory)?;
        let parent = fid.node.directory()?;
        rustix::fs::symlinkat(target, parent, step(name)?)?;
        self.made(&fid, parent, name, None, gid, AtFlags::empty(), reply)
    }

    /// Makes regular files, pipes and sockets, which are nothing on the host but names. Devices are refused to everybody:
    /// on the host they would be the host's.
    pub(crate) fn mknod(
        &self,
        directory: u32,
        name: &[u8],
        mode: u32,
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let fid = self.fids.get(directory)?;
        let parent = fid.node.directory()?;
        let plain = Mode::from_bits_retain(mode & PLAIN);
        match FileType::from_raw_mode(mode) {
            // A mode without a kind is that of a regular file, too (mknod(2)).
            _ if mode & !PERMISSIONS == 0 => drop(parent.create(name, OFlags::WRONLY, plain)?),
            FileType::RegularFile => drop(parent.create(name, OFlags::WRONLY, plain)?),
            kind @ (FileType::Fifo | FileType::Socket) => {
                rustix::fs::mknodat(parent, step(name)?, kind, plain, 0)?;
            }
            _ => return Err(Errno::PERM),
        }
        self.made(&fid, parent, name, Some(mode), gid, AtFlags::empty(), reply)
    }

    /// Finishes what was made under a name: its owner, its mode, its qid.
    #[expect(clippy::too_many_arguments, reason = "what was made, where, by whom, and how it is undone")]
    fn made(
        &self,
        fid: &Fid,
        parent: &HostNode,
        name: &[u8],
        mode: Option<u32>,
        gid: u32,
        undo: AtFlags,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let (node, stat) = parent.child(name)?;
        let finished = self.own(&node, &stat, fid, gid).and_then(|()| match mode {
            Some(mode) => self.set_new_mode(&node, mode),
            None => Ok(()),
        });
        finished.inspect_err(|_| {
            let _ = rustix::fs::unlinkat(parent, name, undo);
        })?;
        reply.qid(self.tree.paths.qid(&node.stat()?)?);
        Ok(())
    }

    /// Gives a new open file to the guest's user who made it, with the mode that he wanted.
    fn give(&self, file: &OwnedFd, mode: u32, fid: &Fid, gid: u32) -> Result<(), Errno> {
        let stat = statx_of(file.as_fd())?;
        if let Some((uid, gid)) = self.new_owner(&stat, fid, gid) {
            rustix::fs::fchown(file, uid, gid)?;
        }
        // The umask of this process is none of the guest's.
        let mode = self.allowed_mode(mode, FileType::RegularFile);
        if u32::from(stat.stx_mode) & PERMISSIONS != mode {
            rustix::fs::fchmod(file, Mode::from_bits_retain(mode))?;
        }
        Ok(())
    }

    fn own(&self, node: &HostNode, stat: &Statx, fid: &Fid, gid: u32) -> Result<(), Errno> {
        match self.new_owner(stat, fid, gid) {
            Some((uid, gid)) => chownat(node, c"", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW),
            None => Ok(()),
        }
    }

    /// To whom something new is to be given, if it has not got that owner by itself.
    fn new_owner(&self, stat: &Statx, fid: &Fid, gid: u32) -> Option<(Option<Uid>, Option<Gid>)> {
        if !self.tree.gives_away {
            return None;
        }
        let uid = fid.user.filter(|uid| *uid != stat.stx_uid).map(Uid::from_raw);
        let gid = Some(gid).filter(|gid| *gid != NONE && *gid != stat.stx_gid).map(Gid::from_raw);
        (uid.is_some() || gid.is_some()).then_some((uid, gid))
    }

    fn set_new_mode(&self, node: &HostNode, mode: u32) -> Result<(), Errno> {
        let mode = self.allowed_mode(mode, node.kind);
        if u32::from(node.stat()?.stx_mode) & PERMISSIONS == mode {
            return Ok(());
        }
        chmodat(CWD, node.path(), Mode::from_bits_retain(mode), AtFlags::empty())
    }

    /// The mode that a guest may give to a file: where all users are one, a program that becomes its owner
    /// becomes somebody else than the guest meant.
    pub(crate) fn allowed_mode(&self, mode: u32, kind: FileType) -> u32 {
        match self.tree.options.ownership {
            Ownership::Squash { .. } if kind != FileType::Directory => mode & PERMISSIONS & !SET_ID,
            _ => mode & PERMISSIONS,
        }
    }

    pub(crate) fn link(&self, directory: u32, fid: u32, name: &[u8]) -> Result<(), Errno> {
        let directory = self.fids.get(directory)?;
        let fid = self.fids.get(fid)?;
        let node = fid.node.host()?;
        let parent = directory.node.directory()?;
        rustix::fs::linkat(CWD, node.path(), parent, step(name)?, AtFlags::SYMLINK_FOLLOW)
    }

    /// Renames what the fid stands for, by the name under which it was found.
    pub(crate) fn rename(&self, fid: u32, directory: u32, name: &[u8]) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        let target = self.fids.get(directory)?;
        let to = target.node.directory()?;
        let node = fid.node.host()?;
        let mut place = fid.place();
        let Place { directory, name: old } = place.as_ref().ok_or(Errno::BUSY)?;
        let from = directory.directory()?;
        from.still_has(old, node)?;
        rustix::fs::renameat(from, &**old, to, step(name)?)?;
        *place = Some(Place { directory: Arc::clone(&target.node), name: name.into() });
        Ok(())
    }

    pub(crate) fn renameat(&self, from: u32, old: &[u8], to: u32, new: &[u8]) -> Result<(), Errno> {
        let from = self.fids.get(from)?;
        let to = self.fids.get(to)?;
        rustix::fs::renameat(from.node.directory()?, step(old)?, to.node.directory()?, step(new)?)
    }

    pub(crate) fn unlinkat(&self, directory: u32, name: &[u8], flags: u32) -> Result<(), Errno> {
        let directory = self.fids.get(directory)?;
        let flags = match flags {
            0 => AtFlags::empty(),
            UNLINK_DIRECTORY => AtFlags::REMOVEDIR,
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::unlinkat(directory.node.directory()?, step(name)?, flags)
    }

    pub(crate) fn readlink(&self, fid: u32, reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        let node = fid.node.host()?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(node, c"", Vec::new())?;
        reply.string(target.to_bytes()).map(|_| ())
    }
}
