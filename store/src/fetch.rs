//! Getting back one object that somebody is waiting for.
//!
//! Of a lazy layer only the part of its blob is fetched that the object is in. Any other layer that has it is brought in
//! again as [`Store::check`] would do it: from what the store itself still has of its tar, or from a registry, whole: most
//! tars of OCI images are compressed as one stream, of which no part can be read alone. Whoever wants an object of a layer
//! that is on its way waits for that, and finds it there.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use kiln_contract::Digest;

use crate::check::{Findings, digest_of_file};
use crate::gc::objects_of;
use crate::import::Replaced;
use crate::staging::Staging;
use crate::{Repair, Result, Store, StoreError};

impl Store {
    /// Makes sure that an object is there and whole: if not, it is fetched, or a layer that has it is brought in again. What `repair` gives
    /// is not believed, but compared with the layer's digest.
    ///
    /// # Errors
    /// [`StoreError::NotFetched`] if no layer of an image has it, or none that does can be had.
    pub fn fetch_object(&self, digest: &Digest, repair: &dyn Repair) -> Result<()> {
        if self.has_sound_object(digest) {
            return Ok(());
        }
        let mut why = "no image has it".to_owned();
        match self.fetch_placed(digest, repair) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => why = error.to_string(),
        }
        let needs = self.needs()?;
        let mut findings = Findings::default();
        findings.objects.insert(*digest);
        let objects = BTreeSet::from([*digest]);
        for diff_id in needs.layers.keys() {
            let Some(layer) = self.layer_of_diff_id(diff_id)? else { continue };
            // A layer that cannot be read is for `check`.
            let Ok(has) = self.layer_tree(&layer).and_then(|file| objects_of(&file)) else { continue };
            if !has.iter().any(|(object, _)| object == digest) {
                continue;
            }
            let _turn = Staging::in_turn(&self.layout, &format!("fetch-{}", layer.hex()), &|| ())?;
            if self.has_sound_object(digest) {
                return Ok(());
            }
            let replaced = Replaced { objects: objects.clone(), ..Replaced::default() };
            match self.import_again(repair, &needs, &findings, diff_id, &replaced) {
                Ok(()) if self.has_sound_object(digest) => return Ok(()),
                Ok(()) => why = format!("layer {layer} came without it"),
                Err(error) => why = format!("layer {layer} {error}"),
            }
        }
        Err(StoreError::NotFetched { digest: *digest, why })
    }

    pub(crate) fn has_sound_object(&self, digest: &Digest) -> bool {
        let path = self.layout.object(digest);
        let read = digest_of_file(&path, &mut vec![0; 256 << 10], &AtomicU64::new(0));
        read.is_ok_and(|found| found == *digest)
    }
}
