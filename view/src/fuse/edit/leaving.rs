//! Names on their way to a root that everybody shares.
//!
//! What the kernel knows under a name moves with a rename, and with it how long it may be remembered. Below the root of a
//! router's view that is for ever, in the root it must not be at all: another view's process would be given it. So the first
//! rename(2) of a name into the root is answered with `ESTALE`, upon which Linux looks the name up once more before it tries again
//! (`retry_estale`, as for NFS). This time it is told to remember nothing, and then the name may move.

use std::collections::HashMap;

use super::nodes::Id;

/// More at once are not waited for: who was, tries again.
const MOST: usize = 1000;

/// Names in directories that are to go to the root, and whether they were looked up since that is known.
#[derive(Debug, Default)]
pub(super) struct Leaving(HashMap<(Id, Vec<u8>), bool>);

impl Leaving {
    /// Whether a name that is being looked up may be remembered.
    pub(super) fn may_be_remembered(&mut self, parent: Id, name: &[u8]) -> bool {
        if self.0.is_empty() {
            return true;
        }
        match self.0.get_mut(&(parent, name.to_owned())) {
            Some(asked) => {
                *asked = true;
                false
            }
            None => true,
        }
    }

    /// Whether a name may go: not before it was looked up.
    pub(super) fn may_go(&mut self, parent: Id, name: &[u8]) -> bool {
        if self.0.len() >= MOST {
            self.0.clear();
        }
        *self.0.entry((parent, name.to_owned())).or_insert(false)
    }

    /// A name has gone, or could not.
    pub(super) fn went(&mut self, parent: Id, name: &[u8]) {
        self.0.remove(&(parent, name.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_goes_when_it_was_looked_up_and_not_before() {
        let mut leaving = Leaving::default();
        assert!(leaving.may_be_remembered(5, b"a"));
        assert!(!leaving.may_go(5, b"a"));
        assert!(!leaving.may_go(5, b"a"));
        assert!(leaving.may_be_remembered(5, b"b") && leaving.may_be_remembered(6, b"a"));
        assert!(!leaving.may_be_remembered(5, b"a"));
        assert!(leaving.may_go(5, b"a"));
        leaving.went(5, b"a");
        assert!(leaving.may_be_remembered(5, b"a"));
        for number in 0..2 * MOST as u64 {
            assert!(!leaving.may_go(number, b"x"));
        }
        assert!(leaving.0.len() <= MOST);
    }
}
