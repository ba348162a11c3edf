//! The entries of one directory of a [`crate::Tree`], sorted by name.

/// Entries in one run. Adding moves half a run of 12-byte entries at most, so that a directory of any size is
/// filled in any order in linear time for all practical purposes, and a small one is a single short vector.
const RUN: usize = 512;

/// A name (in the tree's name bytes) and the node it is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) name_at: u32,
    pub(crate) node: u32,
    pub(crate) name_len: u8,
}

impl Slot {
    pub(crate) fn name<'n>(&self, names: &'n [u8]) -> &'n [u8] {
        &names[self.name_at as usize..self.name_at as usize + usize::from(self.name_len)]
    }
}

/// Sorted runs of entries; no run is empty.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    runs: Vec<Vec<Slot>>,
    /// How many entries are directories: links of this one beyond its own two.
    pub(crate) subdirectories: u32,
}

impl Directory {
    /// The run in which `name` is or would be, and `Ok` of its place there or `Err` of where it would go.
    fn find(&self, names: &[u8], name: &[u8]) -> (usize, Result<usize, usize>) {
        let run = self.runs.partition_point(|run| run[0].name(names) <= name).saturating_sub(1);
        let place = match self.runs.get(run) {
            Some(slots) => match slots.last() {
                // Sources are mostly sorted: the end first.
                Some(last) if last.name(names) < name => Err(slots.len()),
                _ => slots.binary_search_by(|slot| slot.name(names).cmp(name)),
            },
            None => Err(0),
        };
        (run, place)
    }

    pub(crate) fn get(&self, names: &[u8], name: &[u8]) -> Option<u32> {
        let (run, place) = self.find(names, name);
        place.ok().map(|at| self.runs[run][at].node)
    }

    /// Adds an entry; the caller has made sure that the name is free.
    pub(crate) fn insert(&mut self, names: &[u8], slot: Slot) {
        let (run, place) = self.find(names, slot.name(names));
        let (Ok(at) | Err(at)) = place;
        match self.runs.get_mut(run) {
            None => self.runs.push(vec![slot]),
            Some(slots) if slots.len() < RUN => slots.insert(at, slot),
            // Appending to a full run begins a new one, so that sorted input fills runs wholly.
            Some(slots) if at == slots.len() => self.runs.insert(run + 1, vec![slot]),
            Some(slots) => {
                let mut upper = slots.split_off(RUN / 2);
                if at <= slots.len() {
                    slots.insert(at, slot);
                } else {
                    upper.insert(at - slots.len(), slot);
                }
                self.runs.insert(run + 1, upper);
            }
        }
    }

    pub(crate) fn remove(&mut self, names: &[u8], name: &[u8]) -> Option<u32> {
        let (run, place) = self.find(names, name);
        let slot = self.runs[run..].first_mut().and_then(|slots| place.ok().map(|at| slots.remove(at)))?;
        if self.runs[run].is_empty() {
            self.runs.remove(run);
        }
        Some(slot.node)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.runs.iter().flatten()
    }
}
