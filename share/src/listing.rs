//! Directories, listed from any offset.
//!
//! An offset is the filesystem's own cookie (`d_off`): it stays right while names come and go, however large the directory, and
//! nothing is remembered between requests but the position of the descriptor.

use std::os::fd::OwnedFd;
use std::sync::PoisonError;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use crate::fid::{Fid, State};
use crate::node::HostNode;
use crate::qid::{Identity, qid_kind};
use crate::session::Session;
use crate::share::Root;
use crate::wire::{HEADER, Qid, Reply};

/// `offset[8] type[1] name[2+]` behind a qid.
const ENTRY: usize = Qid::SIZE + 8 + 1 + 2;
/// How much is read of a directory at once, at most and at least (one entry of the longest name).
const MOST: usize = 1 << 16;
const LEAST: usize = 512;

/// Entries behind each other in the space of a reply.
struct Entries<'a> {
    space: &'a mut [u8],
    used: usize,
}

impl Entries<'_> {
    /// `false`: it does not fit.
    fn push(&mut self, qid: Qid, offset: u64, kind: FileType, name: &[u8]) -> bool {
        let Some(entry) = self.space[self.used..].get_mut(..ENTRY + name.len()) else { return false };
        entry[0] = qid.kind;
        entry[1..5].copy_from_slice(&qid.version.to_le_bytes());
        entry[5..13].copy_from_slice(&qid.path.to_le_bytes());
        entry[13..21].copy_from_slice(&offset.to_le_bytes());
        entry[21] = directory_type(kind);
        // The kernel's names have 255 bytes at most.
        entry[22..24].copy_from_slice(&(name.len() as u16).to_le_bytes());
        entry[ENTRY..].copy_from_slice(name);
        self.used += ENTRY + name.len();
        true
    }
}

impl Session {
    pub(crate) fn readdir(&self, fid: u32, offset: u64, count: u32, reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        let most = self.message_size().saturating_sub(HEADER as u32 + 4);
        let count = count.min(most) as usize;
        reply.data(count, |space| {
            let mut entries = Entries { space, used: 0 };
            let all = match fid.state.get() {
                Some(State::Directory(directory)) => {
                    let directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
                    self.list(&fid, &directory, offset, &mut entries)?
                }
                Some(State::Around) => self.list_around(offset, &mut entries)?,
                Some(_) => return Err(Errno::NOTDIR),
                None => return Err(Errno::BADF),
            };
            // Nothing at all would mean the end.
            if entries.used == 0 && !all { Err(Errno::INVAL) } else { Ok(entries.used) }
        })
    }

    /// Whether the end was reached.
    fn list(
        &self,
        fid: &Fid,
        directory: &OwnedFd,
        offset: u64,
        entries: &mut Entries<'_>,
    ) -> Result<bool, Errno> {
        let node = fid.node.directory()?;
        let root = self.tree.is_root(node);
        let mut at = offset;
        loop {
            // Also back from what was read and did not fit.
            seek(directory, SeekFrom::Start(at))?;
            // An entry of 9P is about as long as the kernel's: hardly more is read than fits.
            let room = (entries.space.len() - entries.used).clamp(LEAST, MOST);
            let mut buffer: Vec<u8> = Vec::with_capacity(room);
            let mut listing = RawDir::new(directory, buffer.spare_capacity_mut());
            loop {
                let Some(entry) = listing.next() else { return Ok(true) };
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                let inode = if root && name == b".." { node.identity.inode } else { entry.ino() };
                let path = self.tree.paths.path(Identity { device: node.identity.device, inode })?;
                let kind = match entry.file_type() {
                    // Some filesystems do not say.
                    FileType::Unknown => kind_of(node, name),
                    kind => kind,
                };
                // The version would cost a look at each file, and clients look at those that they want.
                let qid = Qid { kind: qid_kind(kind), version: 1, path };
                if !entries.push(qid, entry.next_entry_cookie(), kind, name) {
                    return Ok(false);
                }
                at = entry.next_entry_cookie();
                if listing.is_buffer_empty() {
                    break;
                }
            }
        }
    }

    fn list_around(&self, offset: u64, entries: &mut Entries<'_>) -> Result<bool, Errno> {
        let Root::File { name, .. } = &self.tree.root else { return Err(Errno::NOTDIR) };
        let around = self.around_qid()?;
        let (_, stat) = self.tree.single()?;
        let all = [
            (around, FileType::Directory, &b"."[..]),
            (around, FileType::Directory, b".."),
            (self.tree.paths.qid(&stat)?, FileType::RegularFile, name),
        ];
        for (position, (qid, kind, name)) in (0u64..).zip(all) {
            if position >= offset && !entries.push(qid, position + 1, kind, name) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn kind_of(directory: &HostNode, name: &[u8]) -> FileType {
    match name {
        b"." | b".." => FileType::Directory,
        _ => directory.child(name).map_or(FileType::Unknown, |(node, _)| node.kind),
    }
}

/// `DT_*` of `dirent.h`.
fn directory_type(kind: FileType) -> u8 {
    match kind {
        FileType::Fifo => 1,
        FileType::CharacterDevice => 2,
        FileType::Directory => 4,
        FileType::BlockDevice => 6,
        FileType::RegularFile => 8,
        FileType::Symlink => 10,
        FileType::Socket => 12,
        FileType::Unknown => 0,
    }
}
