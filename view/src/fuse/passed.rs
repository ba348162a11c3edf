//! Files that the kernel reads by itself (`FUSE_PASSTHROUGH`), as long as they are open.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;

use fuser::{BackingId, Errno, FileHandle, FopenFlags, INodeNo, ReplyOpen};

/// The handle of files that are read by the kernel.
const PASSED: FileHandle = FileHandle(1);

#[derive(Default)]
pub(super) struct PassedFiles {
    /// With the number of handles that each has: the kernel wants one identity a file.
    files: HashMap<u64, (BackingId, usize)>,
    /// Whether the kernel takes objects: not known before the first. It refuses those that are on an overlay themselves.
    passes: Option<bool>,
}

impl PassedFiles {
    /// Whether the kernel has refused.
    pub(super) fn are_refused(&self) -> bool {
        self.passes == Some(false)
    }

    /// Answers who opens a file that is open already.
    pub(super) fn open_again(&mut self, ino: INodeNo, reply: ReplyOpen) -> Result<(), ReplyOpen> {
        let Some((backing, handles)) = self.files.get_mut(&ino.0) else { return Err(reply) };
        *handles += 1;
        reply.opened_passthrough(PASSED, FopenFlags::empty(), backing);
        Ok(())
    }

    /// Answers who opens a file that is this object.
    pub(super) fn open(&mut self, ino: INodeNo, object: &File, reply: ReplyOpen) {
        // Somebody else may have opened it a moment ago.
        if let Entry::Vacant(vacant) = self.files.entry(ino.0) {
            match reply.open_backing(object) {
                Ok(backing) => {
                    vacant.insert((backing, 0));
                }
                Err(error) if self.passes.is_none() => {
                    tracing::debug!(%error, "the kernel does not read objects by itself");
                    self.passes = Some(false);
                    return reply.error(Errno::ENOSYS);
                }
                // A file must not be read both ways at once, so that there is no way back once it took one.
                Err(error) => {
                    tracing::error!(inode = ino.0, %error, "the kernel does not take an object");
                    return reply.error(Errno::EIO);
                }
            }
            self.passes = Some(true);
        }
        if let Err(reply) = self.open_again(ino, reply) {
            reply.error(Errno::EIO);
        }
    }

    /// A handle is closed.
    pub(super) fn close(&mut self, ino: INodeNo, handle: FileHandle) {
        if handle == PASSED
            && let Some((_, handles)) = self.files.get_mut(&ino.0)
        {
            *handles -= 1;
            if *handles == 0 {
                self.files.remove(&ino.0);
            }
        }
    }
}
