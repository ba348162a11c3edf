//! Finishes what killed processes began, and takes away what nobody needs any more.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::ZfsDisks;
use crate::{DiskError, Result};

/// A volume that goes may let the one go that it was cloned from: a chain of that many is taken down at once.
const SWEEPS: usize = 64;

/// How long something may look at a device that is to go, such as udev at one that is new.
const BUSY_WAIT: Duration = Duration::from_secs(1);

impl ZfsDisks {
    /// Finishes what killed processes began.
    pub(super) fn recover(&self) -> Result<()> {
        let alive = self.alive()?;
        while let Some((from, id)) =
            self.listing()?.half_restored(&alive).map(|(made, id)| (made.name.clone(), id.clone()))
        {
            self.rename(&format!("restore `{id}`"), &from, &self.volume(&id))?;
        }
        for volume in self.listing()?.half_removed() {
            self.zfs("remove a disk", &["inherit", "kiln:disk", &volume.name])?;
        }
        self.take_away_unneeded();
        Ok(())
    }

    /// Nothing depends on this: what stays is tried again the next time.
    pub(super) fn take_away_unneeded(&self) {
        let begun = Instant::now();
        let mut stuck = BTreeSet::new();
        for _ in 0..SWEEPS {
            let (Ok(alive), Ok(listing)) = (self.alive(), self.listing()) else { return };
            let mut unneeded = listing.unneeded(&alive);
            unneeded.retain(|name| !stuck.contains(*name));
            if unneeded.is_empty() {
                for snapshot in listing.outgrown(&alive) {
                    if let Err(error) = self.zfs("free what nobody needs", &["rollback", snapshot]) {
                        tracing::debug!(snapshot, %error, "left for another time");
                    }
                }
                return;
            }
            for name in unneeded {
                if let Err(error) = self.destroy(name, begun) {
                    tracing::debug!(name, %error, "left for another time");
                    stuck.insert(name.to_owned());
                }
            }
        }
    }

    /// Destroys a volume or a snapshot. Until a while after `begun`, waits if something has it open.
    pub(super) fn destroy(&self, name: &str, begun: Instant) -> Result<()> {
        loop {
            match self.zfs("take away what nobody needs", &["destroy", name]) {
                Err(DiskError::ProgramFailed { said, .. })
                    if said.contains("is busy") && begun.elapsed() < BUSY_WAIT =>
                {
                    std::thread::sleep(Duration::from_millis(50));
                }
                destroyed => return destroyed.map(drop),
            }
        }
    }
}
