//! Fids: the numbers by which a guest speaks of files.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::Errno;

use crate::node::Node;

/// Where a file was found, for the requests that remove or rename a fid instead of a name.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) directory: Arc<Node>,
    pub(crate) name: Box<[u8]>,
}

/// A file that a guest knows.
#[derive(Debug)]
pub(crate) struct Fid {
    pub(crate) node: Arc<Node>,
    /// `None` for the root.
    pub(crate) place: Mutex<Option<Place>>,
    /// The guest's user who attached; `None` if he did not say.
    pub(crate) user: Option<u32>,
    /// What it was opened for, once.
    pub(crate) state: OnceLock<State>,
    /// Whether locks may be held through it.
    pub(crate) locked: AtomicBool,
}

/// What a fid is open for.
#[derive(Debug)]
pub(crate) enum State {
    File(OwnedFd),
    /// Listing: its position is part of the descriptor.
    Directory(Mutex<OwnedFd>),
    /// Listing the directory around a single file.
    Around,
    /// Reading the value of an extended attribute, or the list of their names.
    Attribute(Charged),
    /// Collecting the value of an extended attribute, which is set when the fid goes.
    NewAttribute(Mutex<NewAttribute>),
}

/// An extended attribute that is going to be set.
#[derive(Debug)]
pub(crate) struct NewAttribute {
    pub(crate) name: Box<[u8]>,
    pub(crate) flags: u32,
    /// How long the value is going to be.
    pub(crate) size: usize,
    pub(crate) value: Charged,
}

impl Fid {
    pub(crate) fn new(node: Arc<Node>, place: Option<Place>, user: Option<u32>) -> Self {
        Self { node, place: Mutex::new(place), user, state: OnceLock::new(), locked: AtomicBool::new(false) }
    }

    pub(crate) fn opened(self, state: State) -> Self {
        Self { state: OnceLock::from(state), ..self }
    }

    /// The open file.
    pub(crate) fn file(&self) -> Result<&OwnedFd, Errno> {
        match self.state.get() {
            Some(State::File(file)) => Ok(file),
            Some(State::Directory(_) | State::Around) => Err(Errno::ISDIR),
            _ => Err(Errno::BADF),
        }
    }

    pub(crate) fn place(&self) -> MutexGuard<'_, Option<Place>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All fids of a session. Whoever got one keeps it until he is done, even if it is clunked meanwhile.
#[derive(Debug)]
pub(crate) struct Fids {
    table: Mutex<HashMap<u32, Arc<Fid>>>,
    most: usize,
}

impl Fids {
    pub(crate) fn new(most: usize) -> Self {
        Self { table: Mutex::default(), most }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<u32, Arc<Fid>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, number: u32) -> Result<Arc<Fid>, Errno> {
        self.table().get(&number).cloned().ok_or(Errno::BADF)
    }

    /// Whether the number is in use.
    pub(crate) fn has(&self, number: u32) -> bool {
        self.table().contains_key(&number)
    }

    pub(crate) fn insert(&self, number: u32, fid: Fid) -> Result<(), Errno> {
        let mut table = self.table();
        let full = table.len() >= self.most;
        match table.entry(number) {
            Entry::Occupied(_) => Err(Errno::BADF),
            Entry::Vacant(_) if full => Err(Errno::MFILE),
            Entry::Vacant(free) => {
                free.insert(Arc::new(fid));
                Ok(())
            }
        }
    }

    /// Puts `fid` in the place of `old`, which must still be there.
    pub(crate) fn replace(&self, number: u32, old: &Arc<Fid>, fid: Fid) -> Result<(), Errno> {
        match self.table().get_mut(&number) {
            Some(current) if Arc::ptr_eq(current, old) => {
                *current = Arc::new(fid);
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    pub(crate) fn remove(&self, number: u32) -> Result<Arc<Fid>, Errno> {
        self.table().remove(&number).ok_or(Errno::BADF)
    }

    pub(crate) fn clear(&self) {
        // Closing takes a while; not under the lock.
        let all = std::mem::take(&mut *self.table());
        drop(all);
    }
}

/// How many bytes of values a session may keep at once.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<AtomicUsize>);

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    /// Takes `bytes` for as long as the result lives.
    pub(crate) fn charge(&self, bytes: usize) -> Result<Charged, Errno> {
        let take = |left: usize| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).map_err(|_| Errno::NOBUFS)?;
        Ok(Charged { value: Vec::new(), bytes, budget: self.clone() })
    }
}

/// A value within a [`Budget`].
#[derive(Debug)]
pub(crate) struct Charged {
    pub(crate) value: Vec<u8>,
    bytes: usize,
    budget: Budget,
}

impl Drop for Charged {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_gets_back_what_was_taken_from_it() {
        let budget = Budget::new(100);
        let first = budget.charge(60).unwrap();
        assert_eq!(budget.charge(41).map(|_| ()), Err(Errno::NOBUFS));
        drop(first);
        assert!(budget.charge(100).is_ok());
    }

    #[test]
    fn a_number_is_used_once_and_there_are_only_so_many() {
        let fids = Fids::new(2);
        let fid = || Fid::new(Arc::new(Node::Around), None, None);
        fids.insert(1, fid()).unwrap();
        assert_eq!(fids.insert(1, fid()), Err(Errno::BADF));
        fids.insert(u32::MAX - 1, fid()).unwrap();
        assert_eq!(fids.insert(3, fid()), Err(Errno::MFILE));
        let one = fids.get(1).unwrap();
        fids.remove(1).unwrap();
        assert_eq!(fids.replace(1, &one, fid()), Err(Errno::BADF));
        fids.insert(1, fid()).unwrap();
        assert_eq!(fids.replace(1, &one, fid()), Err(Errno::BADF), "it is another one by now");
    }
}
