//! Byte-range locks that the guest holds against everybody else on the host.
//!
//! What the guest's processes lock against each other, the guest's own kernel decides before it asks here. So the guest
//! as a whole is one owner: for each file there is one open file description of the host that holds (as `F_OFD_SETLK` has it) the
//! strongest of what the guest's fids hold of each byte. Two fids of one process never lock each other out, and closing one
//! gives up its own locks only. That description is opened for reading and writing if it may be, so
//! that `flock -x` on a file that is open for reading works.
//!
//! `fcntl` locks and `flock` are the same here, as they are over NFS: the message does not tell them apart.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::fid::Fid;
use crate::message::lock::{BLOCKED, READ, SUCCESS, UNLOCK, WAIT, WRITE};
use crate::node::HostNode;
use crate::qid::Identity;
use crate::requests::Cancelled;
use crate::session::Session;
use crate::wire::Reply;

/// How many ranges a guest may have locked at once.
const MOST: usize = 4096;
/// How long a request waits for a lock before the client is told to ask again, which Linux does after 30 seconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it looks.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(25));

/// How strongly bytes are locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Strength {
    Free,
    Shared,
    Exclusive,
}

/// Bytes from `start` up to but without `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
}

/// Behind the last byte that a file can have.
const INFINITY: u64 = 1 << 63;

impl Range {
    /// A length of 0 goes to infinity, as in `fcntl(2)`.
    fn new((start, length): (u64, u64)) -> Result<Self, Errno> {
        let end = if length == 0 { INFINITY } else { start.checked_add(length).ok_or(Errno::OVERFLOW)? };
        if start < end && end <= INFINITY { Ok(Self { start, end }) } else { Err(Errno::INVAL) }
    }

    fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    fid: u32,
    strength: Strength,
    range: Range,
}

/// All locks of one file.
#[derive(Debug)]
struct Locked {
    holder: OwnedFd,
    held: Vec<Held>,
}

/// All locks of a session.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    files: HashMap<Identity, Locked>,
}

/// What is held once `fid` holds `strength` in `range`.
fn changed(held: &[Held], fid: u32, strength: Strength, range: Range) -> Vec<Held> {
    let mut after = Vec::with_capacity(held.len() + 2);
    for lock in held {
        if lock.fid != fid || !lock.range.overlaps(range) {
            after.push(*lock);
            continue;
        }
        for (start, end) in [(lock.range.start, range.start), (range.end, lock.range.end)] {
            if start < end {
                after.push(Held { range: Range { start, end }, ..*lock });
            }
        }
    }
    if strength != Strength::Free {
        after.push(Held { fid, strength, range });
    }
    after
}

/// The strongest of what is held, piece by piece of `range`.
fn strongest(held: &[Held], range: Range) -> Vec<(Range, Strength)> {
    let inside = held.iter().filter(|lock| lock.range.overlaps(range));
    let mut edges: Vec<u64> = inside
        .clone()
        .flat_map(|lock| [lock.range.start, lock.range.end])
        .chain([range.start, range.end])
        .filter(|edge| (range.start..=range.end).contains(edge))
        .collect();
    edges.sort_unstable();
    edges.dedup();
    let inside: Vec<&Held> = inside.collect();
    let mut pieces: Vec<(Range, Strength)> = Vec::new();
    for edge in edges.windows(2) {
        let piece = Range { start: edge[0], end: edge[1] };
        let here = inside.iter().filter(|lock| lock.range.overlaps(piece));
        let strength = here.map(|lock| lock.strength).max().unwrap_or(Strength::Free);
        match pieces.last_mut() {
            Some((last, same)) if *same == strength => last.end = piece.end,
            _ => pieces.push((piece, strength)),
        }
    }
    pieces
}

fn record(range: Range, kind: libc::c_int) -> libc::flock {
    let length = if range.end == INFINITY { 0 } else { range.end - range.start };
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start as libc::off_t,
        l_len: length as libc::off_t,
        l_pid: 0,
    }
}

fn hold(holder: &OwnedFd, range: Range, strength: Strength) -> Result<(), Errno> {
    let kind = match strength {
        Strength::Free => libc::F_UNLCK,
        Strength::Shared => libc::F_RDLCK,
        Strength::Exclusive => libc::F_WRLCK,
    };
    let done = fcntl(holder.as_fd(), FcntlArg::F_OFD_SETLK(&record(range, kind)));
    done.map(|_| ()).map_err(|error| Errno::from_raw_os_error(error as i32))
}

impl Locked {
    fn set(&mut self, fid: u32, strength: Strength, range: Range) -> Result<(), Errno> {
        let after = changed(&self.held, fid, strength, range);
        let before = strongest(&self.held, range);
        let mut failed = None;
        for (piece, strength) in strongest(&after, range) {
            if let Err(error) = hold(&self.holder, piece, strength) {
                failed = Some(error);
                break;
            }
        }
        let Some(error) = failed else {
            self.held = after;
            return Ok(());
        };
        // All or nothing. What was held before cannot have been taken by somebody else, so this does not fail.
        for (piece, strength) in before {
            let _ = hold(&self.holder, piece, strength);
        }
        Err(error)
    }
}

impl Locks {
    fn set(
        &mut self,
        node: &HostNode,
        fid: u32,
        strength: Strength,
        range: Range,
        writable: bool,
    ) -> Result<(), Errno> {
        use std::collections::hash_map::Entry;

        let count: usize = self.files.values().map(|file| file.held.len()).sum();
        let mut file = match self.files.entry(node.identity) {
            Entry::Occupied(file) => file,
            Entry::Vacant(_) if strength == Strength::Free => return Ok(()),
            Entry::Vacant(none) => {
                let both = if writable { node.open(OFlags::RDWR) } else { Err(Errno::ROFS) };
                let holder =
                    both.or_else(|_| node.open(OFlags::RDONLY)).or_else(|_| node.open(OFlags::WRONLY))?;
                none.insert_entry(Locked { holder, held: Vec::new() })
            }
        };
        let done = if count >= MOST && strength != Strength::Free {
            Err(Errno::NOLCK)
        } else {
            file.get_mut().set(fid, strength, range)
        };
        if file.get().held.is_empty() {
            file.remove();
        }
        done
    }

    /// What keeps the guest from locking, if anything does.
    fn obstacle(&self, node: &HostNode, range: Range, kind: libc::c_int) -> Result<libc::flock, Errno> {
        let mut found = record(range, kind);
        let opened;
        let holder = match self.files.get(&node.identity) {
            Some(file) => file.holder.as_fd(),
            None => {
                opened = node.open(OFlags::RDONLY)?;
                opened.as_fd()
            }
        };
        let done = fcntl(holder, FcntlArg::F_OFD_GETLK(&mut found));
        done.map(|_| found).map_err(|error| Errno::from_raw_os_error(error as i32))
    }

    /// Gives up everything that is held through this fid.
    pub(crate) fn release(&mut self, fid: u32) {
        let all = Range { start: 0, end: INFINITY };
        self.files.retain(|_, file| {
            if file.held.iter().any(|lock| lock.fid == fid) {
                // To give up does not fail, and with the last lock its holder is closed.
                let _ = file.set(fid, Strength::Free, all);
            }
            !file.held.is_empty()
        });
    }

    pub(crate) fn clear(&mut self) {
        self.files.clear();
    }
}

impl Session {
    pub(crate) fn lock(
        &self,
        number: u32,
        kind: u8,
        flags: u32,
        range: (u64, u64),
        cancelled: &Cancelled,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let strength = match kind {
            READ => Strength::Shared,
            WRITE => Strength::Exclusive,
            UNLOCK => Strength::Free,
            _ => return Err(Errno::INVAL),
        };
        let range = Range::new(range)?;
        let fid = self.fids.get(number)?;
        let node = lockable(&fid)?;
        let writable = !self.tree.options.read_only;
        let set = || {
            // Before the lock, so that whoever clunks the fid meanwhile sees it.
            fid.locked.store(true, Ordering::Release);
            let mut locks = self.locks();
            // A fid that is gone gives up nothing any more.
            if !self.fids.get(number).is_ok_and(|current| std::sync::Arc::ptr_eq(&current, &fid)) {
                return Err(Errno::BADF);
            }
            locks.set(node, number, strength, range, writable)
        };
        let mut outcome = set();
        if flags & WAIT != 0 && blocked(&outcome) && self.begin_waiting() {
            let until = Instant::now() + PATIENCE;
            let mut pause = PAUSES.0;
            while blocked(&outcome) && Instant::now() < until && !cancelled.load(Ordering::Acquire) {
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSES.1);
                outcome = set();
            }
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        // Nobody would learn of a lock that came too late.
        if outcome.is_ok() && strength != Strength::Free && cancelled.load(Ordering::Acquire) {
            let _ = self.locks().set(node, number, Strength::Free, range, writable);
            return Err(Errno::INTR);
        }
        let status = if blocked(&outcome) { BLOCKED } else { outcome.map(|()| SUCCESS)? };
        reply.u8(status);
        Ok(())
    }

    /// Half of the threads wait at most: the rest serve whoever holds the lock.
    fn begin_waiting(&self) -> bool {
        let most = self.tree.options.requests / 2;
        let more = |waiting: usize| (waiting < most).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    pub(crate) fn getlock(
        &self,
        fid: u32,
        kind: u8,
        range: (u64, u64),
        (process, client): (u32, &[u8]),
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let wanted = match kind {
            READ => libc::F_RDLCK,
            // Linux's client asks about unlocking, whatever it was asked about (`v9fs_file_getlock`): it gets any lock.
            WRITE | UNLOCK => libc::F_WRLCK,
            _ => return Err(Errno::INVAL),
        };
        let fid = self.fids.get(fid)?;
        let found = self.locks().obstacle(lockable(&fid)?, Range::new(range)?, wanted)?;
        if i32::from(found.l_type) == libc::F_UNLCK {
            reply.u8(UNLOCK).u64(range.0).u64(range.1).u32(process).string(client)?;
            return Ok(());
        }
        let kind = if i32::from(found.l_type) == libc::F_RDLCK { READ } else { WRITE };
        // A process of the host is nobody in the guest.
        reply.u8(kind).u64(found.l_start as u64).u64(found.l_len as u64).u32(0).string(b"host")?;
        Ok(())
    }
}

fn blocked(outcome: &Result<(), Errno>) -> bool {
    matches!(outcome, Err(Errno::AGAIN | Errno::ACCESS))
}

fn lockable(fid: &Fid) -> Result<&HostNode, Errno> {
    fid.file()?;
    let node = fid.node.host()?;
    if node.kind == FileType::RegularFile { Ok(node) } else { Err(Errno::INVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Strength::{Exclusive, Free, Shared};

    fn range(start: u64, end: u64) -> Range {
        Range { start, end }
    }

    fn held(fid: u32, strength: Strength, start: u64, end: u64) -> Held {
        Held { fid, strength, range: range(start, end) }
    }

    #[test]
    fn ranges_are_those_of_fcntl() {
        for (wire, expected) in [
            ((0, 0), Ok(range(0, INFINITY))),
            ((5, 10), Ok(range(5, 15))),
            ((5, 0), Ok(range(5, INFINITY))),
            ((INFINITY - 1, 1), Ok(range(INFINITY - 1, INFINITY))),
            ((INFINITY, 0), Err(Errno::INVAL)),
            ((INFINITY - 1, 2), Err(Errno::INVAL)),
            ((u64::MAX, u64::MAX), Err(Errno::OVERFLOW)),
        ] {
            assert_eq!(Range::new(wire), expected, "{wire:?}");
        }
    }

    #[test]
    fn a_fid_changes_its_own_locks_only() {
        let before = [held(1, Shared, 0, 100), held(2, Shared, 50, 60)];
        for (fid, strength, part, expected) in [
            (
                1,
                Free,
                range(40, 60),
                vec![held(1, Shared, 0, 40), held(1, Shared, 60, 100), held(2, Shared, 50, 60)],
            ),
            (1, Free, range(0, INFINITY), vec![held(2, Shared, 50, 60)]),
            (
                2,
                Exclusive,
                range(55, 70),
                vec![held(1, Shared, 0, 100), held(2, Shared, 50, 55), held(2, Exclusive, 55, 70)],
            ),
            (3, Free, range(0, INFINITY), before.to_vec()),
        ] {
            assert_eq!(changed(&before, fid, strength, part), expected, "{fid} {strength:?} {part:?}");
        }
    }

    #[test]
    fn the_host_sees_the_strongest_of_what_the_guest_holds() {
        let all = [held(1, Shared, 10, 30), held(2, Exclusive, 20, 40), held(3, Shared, 25, 26)];
        let expected = [
            (range(0, 10), Free),
            (range(10, 20), Shared),
            (range(20, 40), Exclusive),
            (range(40, 50), Free),
        ];
        assert_eq!(strongest(&all, range(0, 50)), expected);
        assert_eq!(strongest(&all, range(21, 22)), [(range(21, 22), Exclusive)]);
        assert_eq!(strongest(&[], range(0, 1)), [(range(0, 1), Free)]);
    }
}
