//! Whether a tree is changed, as whoever shows it decides.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::io::{Errno, Result};

/// What may be changed in a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Everything, if it has a scratch.
    Changing,
    /// Nothing, and nothing is open to be written.
    Frozen,
    /// Only what is open to be written: another tree has its scratch.
    Retired,
}

/// The state of a tree.
#[derive(Debug)]
pub(super) struct Changes(RwLock<State>);

impl Changes {
    pub(super) fn new(state: State) -> Self {
        Self(RwLock::new(state))
    }

    /// Everything may be changed. Held, that stays so.
    pub(super) fn are_allowed(&self) -> Result<RwLockReadGuard<'_, State>> {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match *state {
            // The kernel looks the whole path up again then, which leads to what is seen now, if it begins above.
            State::Retired => Err(Errno::STALE),
            State::Frozen => Err(Errno::ROFS),
            State::Changing => Ok(state),
        }
    }

    /// To decide anew. Held, nobody who asks gets an answer.
    pub(super) fn decide(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}
