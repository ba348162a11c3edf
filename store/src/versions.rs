//! Older versions of tags: which of them stay, and the way back to one.

use std::collections::HashSet;

use jiff::Timestamp;
use kiln_contract::{Digest, Home};

use crate::{ImageName, Result, Store, StoreError, TagEntry};

/// Which older versions go out of the history of each tag. The latest version always stays; a policy without conditions
/// takes none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VersionPolicy {
    /// As many of the latest versions stay (at least one).
    pub keep: Option<usize>,
    /// Only versions go that were replaced before this.
    pub replaced_before: Option<Timestamp>,
}

impl VersionPolicy {
    /// Whether a version stays that is `back` versions behind the latest, and was replaced at `replaced`.
    fn keeps(&self, back: usize, replaced: Option<Timestamp>) -> bool {
        let Some(replaced) = replaced else { return true };
        if *self == Self::default() {
            return true;
        }
        self.keep.is_some_and(|keep| back < keep)
            || self.replaced_before.is_some_and(|before| replaced >= before)
    }
}

impl Store {
    /// Takes the latest version out of a tag's history: the tag points to what it pointed to before. Takes the store's
    /// lock exclusively, as [`Store::gc`] does. Returns what the tag points to now; nothing is left of one that had a
    /// single version.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such tag; the store cannot be written.
    pub fn untag_latest(home: &Home, name: &ImageName) -> Result<Option<TagEntry>> {
        let store = Self::open_alone(home)?;
        let mut history = store.tag_history(name)?;
        if history.pop().is_none() {
            return Err(StoreError::NotFound { text: name.familiar(), near: Vec::new() });
        }
        if history.is_empty() {
            store.untag(name)?;
        } else {
            store.write_history(name, &history)?;
        }
        Ok(history.pop())
    }

    /// Takes versions out of histories. Returns the names of these (`name:tag~N`), and the manifests of all that stay.
    pub(crate) fn thin_histories(
        &self,
        policy: &VersionPolicy,
        dry_run: bool,
    ) -> Result<(Vec<String>, HashSet<Digest>)> {
        let (mut gone, mut kept) = (Vec::new(), HashSet::new());
        for (name, _) in self.tags()? {
            let history = self.tag_history(&name)?;
            let mut left = Vec::with_capacity(history.len());
            for (index, entry) in history.iter().enumerate() {
                let back = history.len() - 1 - index;
                if policy.keeps(back, history.get(index + 1).map(|next| next.time)) {
                    kept.insert(entry.target);
                    left.push(entry.clone());
                } else {
                    gone.push(format!("{}~{back}", name.familiar()));
                }
            }
            if left.len() < history.len() && !dry_run {
                self.write_history(&name, &left)?;
            }
        }
        Ok((gone, kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_versions_go_when_all_conditions_of_the_policy_are_met_and_the_latest_never() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let (keep, before) = (Some(2), Some(at(100)));
        // How far back, when it was replaced, and whether it stays: by number, by age, by both, without a policy.
        for (back, replaced, stays) in [
            (0, None, [true, true, true, true]),
            (1, Some(at(50)), [true, false, true, true]),
            (1, Some(at(100)), [true, true, true, true]),
            (2, Some(at(50)), [false, false, false, true]),
            (2, Some(at(150)), [false, true, true, true]),
        ] {
            let policies = [(keep, None), (None, before), (keep, before), (None, None)];
            let kept = policies
                .map(|(keep, replaced_before)| VersionPolicy { keep, replaced_before }.keeps(back, replaced));
            assert_eq!(kept, stays, "{back} {replaced:?}");
        }
    }

    #[test]
    fn a_tag_goes_back_version_by_version_until_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let name = ImageName::parse("a:b").unwrap();
        let store = Store::open(&home).unwrap();
        let blobs = [b"{}".as_slice(), b"{ }", b"{  }"].map(|blob| store.put_blob(blob).unwrap());
        for blob in &blobs {
            store.tag(&name, blob, "made").unwrap();
        }
        let (gone, kept) =
            store.thin_histories(&VersionPolicy { keep: Some(2), ..Default::default() }, true).unwrap();
        assert_eq!((gone, kept), (vec!["a:b~2".to_owned()], HashSet::from([blobs[1], blobs[2]])));
        assert_eq!(store.tag_history(&name).unwrap().len(), 3, "nothing was to be done");
        drop(store);
        let targets = [Some(blobs[1]), Some(blobs[0]), None];
        for target in targets {
            let now = Store::untag_latest(&home, &name).unwrap();
            assert_eq!(now.map(|entry| entry.target), target);
        }
        assert!(matches!(Store::untag_latest(&home, &name), Err(StoreError::NotFound { .. })));
        assert!(Store::open(&home).unwrap().tags().unwrap().is_empty());
    }
}
