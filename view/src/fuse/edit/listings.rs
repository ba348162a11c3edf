//! Listings of directories, which the kernel reads piece by piece and without opening them.
//!
//! Where it goes on it says by the position that the last entry was given. So a position belongs to a name and not to a place
//! in a list: for a name that the tree has it is the name's place in the tree, whatever the scratch says of it; for
//! others it is given when they are listed first, and never again while they are there. Whatever is made or removed between
//! two pieces, what was there all the time is told once.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::nodes::Id;

/// So many listings are kept for their next pieces, and so many entries of them together.
const KEPT: usize = 64;
const KEPT_ENTRIES: usize = 1 << 18;
/// Where the positions of names begin that the tree does not have. No directory of a tree has so many.
const OF_SCRATCH: u64 = 1 << 40;

/// An entry of a directory.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) name: Cow<'static, [u8]>,
    pub(super) id: Id,
    pub(super) kind: fuser::FileType,
    /// Where a listing goes on after it, from 1.
    pub(super) position: u64,
}

/// What is known of listings.
#[derive(Debug, Default)]
pub(super) struct Listings {
    recent: HashMap<Id, Arc<Vec<Listed>>>,
    /// The one that was read last is the last.
    order: VecDeque<Id>,
    entries: usize,
    given: HashMap<Id, Given>,
}

/// Positions that names of the scratch have in one directory.
#[derive(Debug, Default)]
struct Given {
    last: u64,
    positions: HashMap<Vec<u8>, u64>,
}

impl Listings {
    /// The listing that is being read.
    pub(super) fn recent(&mut self, directory: Id) -> Option<Arc<Vec<Listed>>> {
        let listing = Arc::clone(self.recent.get(&directory)?);
        self.order.retain(|kept| *kept != directory);
        self.order.push_back(directory);
        Some(listing)
    }

    /// Keeps a listing, in the order of its positions: `of_tree` in the tree's order, `of_scratch` in any, without positions.
    pub(super) fn keep(
        &mut self,
        directory: Id,
        of_tree: Vec<Listed>,
        mut of_scratch: Vec<Listed>,
    ) -> Arc<Vec<Listed>> {
        if of_scratch.is_empty() {
            self.given.remove(&directory);
        } else {
            let Given { last, positions } = self.given.entry(directory).or_default();
            let earlier = std::mem::take(positions);
            for entry in &mut of_scratch {
                entry.position = earlier.get(&*entry.name).copied().unwrap_or_else(|| {
                    *last += 1;
                    OF_SCRATCH + *last
                });
                positions.insert(entry.name.to_vec(), entry.position);
            }
            of_scratch.sort_by_key(|entry| entry.position);
        }
        let mut listing = of_tree;
        listing.append(&mut of_scratch);
        let listing = Arc::new(listing);
        self.end(directory);
        self.entries += listing.len();
        self.recent.insert(directory, Arc::clone(&listing));
        self.order.push_back(directory);
        while self.order.len() > KEPT || self.entries > KEPT_ENTRIES && self.order.len() > 1 {
            if let Some(oldest) = self.order.front().copied() {
                self.end(oldest);
            }
        }
        listing
    }

    /// A listing was read to its end.
    pub(super) fn end(&mut self, directory: Id) {
        if let Some(listing) = self.recent.remove(&directory) {
            self.entries -= listing.len();
            self.order.retain(|kept| *kept != directory);
        }
    }

    /// The kernel forgets a directory: nobody reads it.
    pub(super) fn forget(&mut self, directory: Id) {
        self.end(directory);
        self.given.remove(&directory);
    }
}

/// The entries behind a position.
pub(super) fn after(listing: &[Listed], position: u64) -> &[Listed] {
    &listing[listing.partition_point(|entry| entry.position <= position)..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str, position: u64) -> Listed {
        let name = Cow::Owned(name.as_bytes().to_vec());
        Listed { name, id: 1, kind: fuser::FileType::RegularFile, position }
    }

    fn names(listing: &[Listed]) -> Vec<String> {
        listing.iter().map(|entry| String::from_utf8(entry.name.to_vec()).unwrap()).collect()
    }

    #[test]
    fn a_listing_goes_on_where_it_was_whatever_was_made_and_removed() {
        let mut listings = Listings::default();
        let of_tree = || vec![listed("b", 1), listed("d", 3)];
        let of_scratch = |names: &[&str]| names.iter().map(|name| listed(name, 0)).collect::<Vec<_>>();
        let first = listings.keep(7, of_tree(), of_scratch(&["z", "a", "m"]));
        assert_eq!(names(&first), ["b", "d", "z", "a", "m"]);
        let at = first[2].position;
        // `z` was told already, and goes; `y` comes.
        let second = listings.keep(7, of_tree(), of_scratch(&["m", "y", "a"]));
        assert_eq!(names(after(&second, at)), ["a", "m", "y"]);
        assert_eq!(names(after(&second, 1)), ["d", "a", "m", "y"]);
        assert!(after(&second, second.last().unwrap().position).is_empty());
        // The same name made again is another entry.
        let third = listings.keep(7, of_tree(), of_scratch(&["z", "y"]));
        assert_eq!(names(after(&third, at)), ["y", "z"]);
    }

    #[test]
    fn few_listings_are_kept() {
        let mut listings = Listings::default();
        for directory in 0..1000 {
            listings.keep(directory, vec![listed("a", 1)], Vec::new());
        }
        assert_eq!((listings.recent.len(), listings.order.len(), listings.given.len()), (KEPT, KEPT, 0));
        listings.end(999);
        assert!(listings.recent(999).is_none() && listings.recent(998).is_some());
        let many = || (1..KEPT_ENTRIES as u64).map(|position| listed("a", position)).collect();
        listings.keep(1, many(), Vec::new());
        listings.keep(2, many(), Vec::new());
        assert_eq!((listings.order.len(), listings.entries), (1, KEPT_ENTRIES - 1));
        listings.forget(2);
        assert_eq!(listings.entries, 0);
    }
}
