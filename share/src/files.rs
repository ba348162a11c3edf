//! Open files: opening, reading, writing, syncing; and what filesystem they are on.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::fid::State;
use crate::message::open;
use crate::node::{HostNode, Node, statx_of};
use crate::session::Session;
use crate::share::Root;
use crate::wire::{HEADER, IO_HEADER, Reply};

/// Data come in whole pages where messages are long enough.
const PAGE: u32 = 4096;
/// What a guest sees as the kind of filesystem: `V9FS_MAGIC`.
const V9FS: u32 = 0x0102_1997;

/// The flags of `open(2)` for those of 9P. What concerns the guest only (`O_NONBLOCK`, `O_CLOEXEC`, `O_NOCTTY`), what was
/// decided by the walk (`O_NOFOLLOW`, `O_CREAT`), and what the host's page cache is better without
/// (`O_DIRECT`, whose alignment the message has not got) is left out.
pub(crate) fn open_flags(flags: u32) -> Result<OFlags, Errno> {
    let mut host = match flags & open::ACCESS {
        0 => OFlags::RDONLY,
        open::WRITE_ONLY => OFlags::WRONLY,
        open::READ_WRITE => OFlags::RDWR,
        _ => return Err(Errno::INVAL),
    };
    for (flag, meaning) in [
        (open::TRUNCATE, OFlags::TRUNC),
        // The guest does not know where a file ends that others on the host write to.
        (open::APPEND, OFlags::APPEND),
        (open::DATA_SYNC, OFlags::DSYNC),
        (open::SYNC, OFlags::SYNC),
    ] {
        if flags & flag != 0 {
            host |= meaning;
        }
    }
    Ok(host)
}

impl Session {
    /// How much the guest should read or write with one message.
    pub(crate) fn io_unit(&self) -> u32 {
        self.message_size().saturating_sub(IO_HEADER) & !(PAGE - 1)
    }

    pub(crate) fn lopen(&self, fid: u32, flags: u32, reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        if fid.state.get().is_some() {
            return Err(Errno::BUSY);
        }
        let mut host = open_flags(flags)?;
        let directory = match &*fid.node {
            Node::Host(node) => node.kind == FileType::Directory,
            Node::Around => true,
        };
        if directory && flags & open::CREATE != 0 {
            return Err(Errno::ISDIR);
        }
        let state = match &*fid.node {
            Node::Around if host == OFlags::RDONLY => State::Around,
            Node::Around => return Err(Errno::ISDIR),
            Node::Host(node) if directory => {
                host |= OFlags::DIRECTORY;
                State::Directory(Mutex::new(self.open_quietly(node, host)?))
            }
            Node::Host(_) if flags & open::DIRECTORY != 0 => return Err(Errno::NOTDIR),
            Node::Host(node) => State::File(self.open_quietly(node, host)?),
        };
        let qid = match &state {
            State::File(file) => self.tree.paths.qid(&statx_of(file.as_fd())?)?,
            _ => self.qid(&fid.node)?,
        };
        fid.state.set(state).map_err(|_| Errno::BUSY)?;
        reply.qid(qid).u32(self.io_unit());
        Ok(())
    }

    /// Opens a file; where nothing may be changed, without changing the time of its last access, if the kernel lets
    /// this process (its owner's, or root's) do so.
    fn open_quietly(&self, node: &HostNode, flags: OFlags) -> Result<OwnedFd, Errno> {
        if self.tree.options.read_only {
            match node.open(flags | OFlags::NOATIME) {
                Err(Errno::PERM) => {}
                opened => return opened,
            }
        }
        node.open(flags)
    }

    pub(crate) fn read(&self, fid: u32, offset: u64, count: u32, reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        let most = self.message_size().saturating_sub(HEADER as u32 + 4);
        let count = count.min(most) as usize;
        if let Some(State::Attribute(attribute)) = fid.state.get() {
            let from = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
            let rest = attribute.value.get(from..).unwrap_or_default();
            let rest = &rest[..rest.len().min(count)];
            return reply.data(rest.len(), |space| {
                space[..rest.len()].copy_from_slice(rest);
                Ok(rest.len())
            });
        }
        let file = fid.file()?;
        reply.data(count, |space| rustix::io::pread(file, space, offset))
    }

    pub(crate) fn write(&self, fid: u32, offset: u64, data: &[u8], reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        let written = match fid.state.get() {
            Some(State::NewAttribute(attribute)) => collect(attribute, offset, data)?,
            _ => rustix::io::pwrite(fid.file()?, data, offset)?,
        };
        // No more than came in one message.
        reply.u32(written as u32);
        Ok(())
    }

    pub(crate) fn fsync(&self, fid: u32, only_data: u32) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        match fid.state.get() {
            Some(State::File(file)) if only_data != 0 => rustix::fs::fdatasync(file),
            Some(State::File(file)) => rustix::fs::fsync(file),
            Some(State::Directory(directory)) => {
                rustix::fs::fsync(&*directory.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
            }
            Some(State::Around) => Ok(()),
            _ => Err(Errno::BADF),
        }
    }

    pub(crate) fn statfs(&self, fid: u32, reply: &mut Reply) -> Result<(), Errno> {
        let fid = self.fids.get(fid)?;
        let node = match (&*fid.node, &self.tree.root) {
            (Node::Host(node), _) => node.as_fd(),
            (Node::Around, Root::File { directory, .. }) => directory.as_fd(),
            (Node::Around, _) => return Err(Errno::BADF),
        };
        let found = rustix::fs::fstatvfs(node)?;
        // In units of the fragment, as `struct statvfs` has it; `f_bsize` of the reply is what the guest multiplies with.
        let unit = if found.f_frsize == 0 { found.f_bsize } else { found.f_frsize };
        reply
            .u32(V9FS)
            .u32(u32::try_from(unit).map_err(|_| Errno::OVERFLOW)?)
            .u64(found.f_blocks)
            .u64(found.f_bfree)
            .u64(found.f_bavail)
            .u64(found.f_files)
            .u64(found.f_ffree)
            .u64(found.f_fsid)
            .u32(u32::try_from(found.f_namemax).unwrap_or(255));
        Ok(())
    }
}

/// The next part of a value; it comes in its order.
fn collect(attribute: &Mutex<crate::fid::NewAttribute>, offset: u64, data: &[u8]) -> Result<usize, Errno> {
    let mut attribute = attribute.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let size = attribute.size;
    let value = &mut attribute.value.value;
    if u64::try_from(value.len()) != Ok(offset) {
        return Err(Errno::INVAL);
    }
    if size - value.len() < data.len() {
        return Err(Errno::NOSPC);
    }
    value.extend_from_slice(data);
    Ok(data.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_9p_become_the_hosts() {
        for (flags, expected) in [
            (0, Ok(OFlags::RDONLY)),
            (0o1, Ok(OFlags::WRONLY)),
            (0o2 | 0o1000, Ok(OFlags::RDWR | OFlags::TRUNC)),
            (0o1 | 0o2000, Ok(OFlags::WRONLY | OFlags::APPEND)),
            (0o4_010_000, Ok(OFlags::RDONLY | OFlags::DSYNC | OFlags::SYNC)),
            // O_CREAT, O_EXCL, O_NOCTTY, O_NONBLOCK, O_DIRECT, O_NOFOLLOW, O_NOATIME, O_CLOEXEC.
            (0o100 | 0o200 | 0o400 | 0o4000 | 0o40000 | 0o400_000 | 0o1_000_000, Ok(OFlags::RDONLY)),
            (0o3, Err(Errno::INVAL)),
        ] {
            assert_eq!(open_flags(flags), expected, "{flags:o}");
        }
    }
}
