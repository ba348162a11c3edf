//! What disks take, out of what ZFS charges to volumes and snapshots.
//!
//! ZFS charges a block to the volume that wrote it first, whoever else needs it (`used`, `usedbydataset`: zfsprops(7)), and
//! destroys no volume whose snapshots have clones. So a volume goes when the last disk goes that is it, or that was cloned from it
//! or its clones. What it wrote after its last snapshot (`written`), and what only one of its snapshots holds (`used` of that),
//! may go earlier.

use std::collections::BTreeSet;

use kiln_contract::{DiskId, DiskUsage, DisksUsage};

use super::listing::{Listing, Purpose, Role, Snapshot, Volume};

/// The disks that need something; `None` stands for whatever is no disk.
type Needed<'l> = BTreeSet<Option<&'l DiskId>>;

pub(super) fn usage(listing: &Listing) -> DisksUsage {
    let mut disks: Vec<_> = listing
        .volumes
        .iter()
        .filter_map(|live| match &live.role {
            Role::Live(id) => Some((id.clone(), of_disk(listing, id, live))),
            _ => None,
        })
        .collect();
    disks.sort_by(|one, other| one.0.cmp(&other.0));
    DisksUsage { disks, taken: listing.volumes.iter().map(|volume| volume.used).sum() }
}

fn of_disk(listing: &Listing, id: &DiskId, live: &Volume) -> DiskUsage {
    let alone = Needed::from([Some(id)]);
    let exclusive = |volume: &Volume| {
        if listing.needing(volume) == alone {
            return volume.used;
        }
        let own = if volume.disk.as_ref() == Some(id) { volume.written } else { 0 };
        let of_snapshots =
            volume.snapshots.iter().filter(|snapshot| listing.needing_snapshot(volume, snapshot) == alone);
        own + of_snapshots.map(|snapshot| snapshot.used).sum::<u64>()
    };
    DiskUsage {
        logical: live.size,
        exclusive: listing.volumes.iter().map(exclusive).sum(),
        shared: live.referenced.saturating_sub(listing.read_alone(live, &alone)),
    }
}

impl Listing {
    /// Who needs a volume.
    fn needing<'l>(&'l self, volume: &'l Volume) -> Needed<'l> {
        let mut needing: Needed<'_> =
            volume.snapshots.iter().flat_map(|snapshot| self.needing_snapshot(volume, snapshot)).collect();
        match &volume.role {
            Role::Making(_) => needing.extend([None]),
            Role::Live(_) => needing.extend([volume.disk.as_ref()]),
            // Nothing of it but its snapshots.
            Role::Old(_) => {}
        }
        needing
    }

    fn needing_snapshot<'l>(&'l self, volume: &'l Volume, snapshot: &'l Snapshot) -> Needed<'l> {
        let by_clone = |clone: &String| match self.volumes.iter().find(|volume| volume.name == *clone) {
            Some(clone) => self.needing(clone),
            None => Needed::from([None]),
        };
        let mut needing: Needed<'_> = snapshot.clones.iter().flat_map(by_clone).collect();
        match snapshot.purpose {
            Purpose::Named(_) => needing.extend(volume.disk.as_ref().map(Some)),
            Purpose::Foreign => needing.extend([None]),
            Purpose::Base(_) => {}
        }
        needing
    }

    /// What can be read through a volume and nobody else needs.
    fn read_alone(&self, volume: &Volume, alone: &Needed<'_>) -> u64 {
        if self.needing(volume) != *alone {
            return volume.written;
        }
        let origin =
            volume.origin.as_ref().and_then(|name| self.volumes.iter().find(|volume| volume.name == *name));
        match origin {
            None => volume.used_by_itself,
            // Nothing below it is anybody else's, or else some part is: that much is not known better.
            Some(origin) if self.needing(origin) == *alone => {
                let below = self.read_alone(origin, alone);
                if below >= origin.referenced { volume.referenced } else { volume.used_by_itself + below }
            }
            Some(_) => volume.used_by_itself,
        }
    }
}
