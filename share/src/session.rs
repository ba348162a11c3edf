//! One connection of a guest: what it agreed on, its fids, its locks, and what is done for each request.
//!
//! How a request goes:
//! 1. [`Session::admit`] notes it, in the order in which requests come. `Tversion` waits there until everything that was
//!    before it is answered, and begins the session anew.
//! 2. [`Session::answer`] does it, on any thread, several at once.
//! 3. [`Session::finish`] ends it while its reply is written.
//!
//! A request that cannot be understood or done is answered with `Rlerror` and a number of Linux's. Only what breaks the framing
//! ends the session.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use crate::fid::{Budget, Fids};
use crate::locks::Locks;
use crate::message::{self, RLERROR, Request, TFLUSH, TVERSION, lock, open};
use crate::requests::{Cancelled, Requests};
use crate::share::Tree;
use crate::wire::{HEADER, Reply};

/// The most that a message may be long before a size is agreed on.
const FIRST_MESSAGE: u32 = 8192;
/// Linux goes no lower.
const LEAST_MESSAGE: u32 = 4096;
/// How much memory the values of extended attributes may take that the guest has begun to read or write.
const ATTRIBUTE_BYTES: usize = 4 << 20;

/// One connection.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) tree: Arc<Tree>,
    pub(crate) fids: Fids,
    pub(crate) requests: Requests,
    pub(crate) locks: Mutex<Locks>,
    /// How many requests wait for locks.
    pub(crate) waiting: AtomicUsize,
    pub(crate) attributes: Budget,
    /// 0 until the version is agreed on.
    message_size: AtomicU32,
}

/// A request that has come.
#[derive(Debug)]
pub(crate) struct Admitted {
    kind: u8,
    tag: u16,
    how: How,
}

#[derive(Debug)]
enum How {
    InFlight(Cancelled),
    /// It is not done: its tag is in use.
    Refused(Errno),
    /// The version, the message size, or why there is none.
    Agreed(Result<(&'static [u8], u32), Errno>),
}

impl Session {
    pub(crate) fn new(tree: Arc<Tree>) -> Self {
        Self {
            fids: Fids::new(tree.options.fids),
            tree,
            requests: Requests::default(),
            locks: Mutex::default(),
            waiting: AtomicUsize::new(0),
            attributes: Budget::new(ATTRIBUTE_BYTES),
            message_size: AtomicU32::new(0),
        }
    }

    /// The longest frame that may come next, header included.
    pub(crate) fn frame_limit(&self) -> u32 {
        match self.message_size.load(Ordering::Acquire) {
            0 => FIRST_MESSAGE,
            size => size,
        }
    }

    /// The message size that was agreed on.
    pub(crate) fn message_size(&self) -> u32 {
        self.message_size.load(Ordering::Acquire)
    }

    /// Notes the request in `frame`. To be called for one frame after the other, before the next is read.
    pub(crate) fn admit(&self, frame: &[u8]) -> Admitted {
        let (kind, tag) = match frame {
            [_, _, _, _, kind, low, high, ..] => (*kind, u16::from_le_bytes([*low, *high])),
            // The reader of frames lets none through that is shorter; such a one has no tag to answer to.
            _ => return Admitted { kind: 0, tag: u16::MAX, how: How::Refused(Errno::PROTO) },
        };
        let how = if kind == TVERSION {
            How::Agreed(self.begin_anew(&frame[HEADER..]))
        } else {
            self.requests.begin(tag).map_or_else(How::Refused, How::InFlight)
        };
        Admitted { kind, tag, how }
    }

    fn begin_anew(&self, body: &[u8]) -> Result<(&'static [u8], u32), Errno> {
        let Some(Ok(Request::Version { message_size, version })) = Request::decode(TVERSION, body) else {
            return Err(Errno::PROTO);
        };
        self.requests.drain();
        self.end();
        if message_size < LEAST_MESSAGE {
            return Err(Errno::MSGSIZE);
        }
        let size = message_size.min(self.tree.options.message_size);
        if version != message::VERSION {
            return Ok((message::UNKNOWN_VERSION, size));
        }
        self.message_size.store(size, Ordering::Release);
        tracing::debug!(share = self.tree.name, message_size = size, "a guest begins");
        Ok((message::VERSION, size))
    }

    /// Forgets everything about the guest: closes its files, gives its locks up.
    fn end(&self) {
        self.message_size.store(0, Ordering::Release);
        self.fids.clear();
        self.locks().clear();
    }

    pub(crate) fn locks(&self) -> std::sync::MutexGuard<'_, Locks> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether admitting this frame waits for requests that are in flight.
    pub(crate) fn blocks(frame: &[u8]) -> bool {
        frame.get(4) == Some(&TVERSION)
    }

    /// Does what `frame` asks for and puts the reply into `reply`, whole. `false`: it is a flush that is going to be answered
    /// by the request that it takes back.
    ///
    /// What is to be written then is written while nobody else writes, with [`Self::finish`] first.
    pub(crate) fn answer(&self, admitted: &Admitted, frame: &[u8], reply: &mut Reply) -> bool {
        let Admitted { kind, tag, how } = admitted;
        let body = frame.get(HEADER..).unwrap_or_default();
        reply.clear();
        let done = match how {
            How::Refused(error) => Err(*error),
            How::Agreed(agreed) => {
                agreed.and_then(|(version, size)| reply.u32(size).string(version).map(|_| ()))
            }
            How::InFlight(_) if *kind == TFLUSH => match Request::decode(*kind, body) {
                Some(Ok(Request::Flush { old })) if self.requests.flush(*tag, old) => return false,
                Some(Ok(_)) => Ok(()),
                _ => Err(Errno::PROTO),
            },
            How::InFlight(cancelled) => self.perform(*kind, body, cancelled, reply),
        };
        // Lengths are checked where they can be long; this is the last wall.
        let fits = reply.len() <= self.frame_limit() as usize;
        let done = done.and(if fits { Ok(()) } else { Err(Errno::MSGSIZE) });
        let answer = match done {
            Ok(()) => kind.wrapping_add(1),
            Err(error) => {
                tracing::trace!(share = self.tree.name, kind, tag, %error, "refused");
                reply.clear();
                reply.u32(error.raw_os_error().unsigned_abs());
                RLERROR
            }
        };
        reply.seal(answer, *tag);
        true
    }

    /// Takes a request out of flight, right before its reply is written: from here on the guest may use the tag
    /// again. Returns the tags of the flushes that are to be answered right behind it. Must be called while nobody else can
    /// write, so that no flush that comes too late for this request is answered before it.
    pub(crate) fn finish(&self, admitted: &Admitted) -> Vec<u16> {
        match admitted.how {
            How::InFlight(_) => self.requests.end(admitted.tag),
            _ => Vec::new(),
        }
    }

    /// Everything that needs an agreed version.
    fn perform(&self, kind: u8, body: &[u8], cancelled: &Cancelled, reply: &mut Reply) -> Result<(), Errno> {
        if self.message_size() == 0 {
            return Err(Errno::PROTO);
        }
        let request = Request::decode(kind, body).ok_or(Errno::OPNOTSUPP)?.map_err(|_| Errno::PROTO)?;
        if self.tree.options.read_only && changes(&request) {
            if let Request::Remove { fid } = request {
                // Whatever comes of it, the fid is gone.
                self.clunk(fid)?;
            }
            return Err(Errno::ROFS);
        }
        match request {
            Request::Statfs { fid } => self.statfs(fid, reply),
            Request::Lopen { fid, flags } => self.lopen(fid, flags, reply),
            Request::Lcreate { fid, name, flags, mode, gid } => {
                self.lcreate(fid, name, flags, mode, gid, reply)
            }
            Request::Symlink { directory, name, target, gid } => {
                self.symlink(directory, name, target, gid, reply)
            }
            Request::Mknod { directory, name, mode, gid, .. } => {
                self.mknod(directory, name, mode, gid, reply)
            }
            Request::Rename { fid, directory, name } => self.rename(fid, directory, name),
            Request::Readlink { fid } => self.readlink(fid, reply),
            Request::Getattr { fid, mask } => self.getattr(fid, mask, reply),
            Request::Setattr { .. } => self.setattr(&request),
            Request::Xattrwalk { fid, new, name } => self.xattrwalk(fid, new, name, reply),
            Request::Xattrcreate { fid, name, size, flags } => self.xattrcreate(fid, name, size, flags),
            Request::Readdir { fid, offset, count } => self.readdir(fid, offset, count, reply),
            Request::Fsync { fid, only_data } => self.fsync(fid, only_data),
            Request::Lock { fid, kind, flags, start, length, .. } => {
                self.lock(fid, kind, flags, (start, length), cancelled, reply)
            }
            Request::Getlock { fid, kind, start, length, process, client } => {
                self.getlock(fid, kind, (start, length), (process, client), reply)
            }
            Request::Link { directory, fid, name } => self.link(directory, fid, name),
            Request::Mkdir { directory, name, mode, gid } => self.mkdir(directory, name, mode, gid, reply),
            Request::Renameat { from, old, to, new } => self.renameat(from, old, to, new),
            Request::Unlinkat { directory, name, flags } => self.unlinkat(directory, name, flags),
            Request::Attach { fid, auth, tree, user, .. } => self.attach(fid, auth, tree, user, reply),
            Request::Walk { fid, new, names } => self.walk(fid, new, names, reply),
            Request::Read { fid, offset, count } => self.read(fid, offset, count, reply),
            Request::Write { fid, offset, data } => self.write(fid, offset, data.0, reply),
            Request::Clunk { fid } => self.clunk(fid),
            Request::Remove { fid } => self.remove(fid),
            // The guest is who it is by the stream that it speaks on.
            Request::Auth { .. } => Err(Errno::OPNOTSUPP),
            // Both were dealt with before.
            Request::Version { .. } | Request::Flush { .. } => Err(Errno::PROTO),
        }
    }
}

/// Whether a request would change a file. Values of extended attributes are written to a fid that is refused here.
fn changes(request: &Request<'_>) -> bool {
    match request {
        Request::Lcreate { .. }
        | Request::Symlink { .. }
        | Request::Mknod { .. }
        | Request::Rename { .. }
        | Request::Setattr { .. }
        | Request::Xattrcreate { .. }
        | Request::Link { .. }
        | Request::Mkdir { .. }
        | Request::Renameat { .. }
        | Request::Unlinkat { .. }
        | Request::Write { .. }
        | Request::Remove { .. } => true,
        Request::Lopen { flags, .. } => {
            flags & open::ACCESS != 0 || flags & (open::TRUNCATE | open::CREATE) != 0
        }
        // Others on the host would wait for a guest that may not change anything.
        Request::Lock { kind, .. } => *kind == lock::WRITE,
        _ => false,
    }
}
