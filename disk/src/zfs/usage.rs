//! What disks take, out of what ZFS charges to volumes and snapshots.
//!
//! ZFS charges a block to the volume that wrote it first, whoever else needs it (`used`, `usedbydataset`: zfsprops(7)). A
//! volume whose snapshots have clones cannot go while they are there: with its disk go only what it wrote after its last
//! snapshot (`written`), and snapshots without clones.

use kiln_contract::{DiskId, DiskUsage, DisksUsage};

use super::listing::{Listing, Role, Volume};

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
    let own: Vec<&Volume> =
        listing.volumes.iter().filter(|volume| volume.disk.as_ref() == Some(id)).collect();
    let exclusive = |volume: &&Volume| {
        if !stays(&own, volume) {
            return volume.used;
        }
        let free_to_go = volume.snapshots.iter().filter(|snapshot| snapshot.clones.is_empty());
        volume.written + free_to_go.map(|snapshot| snapshot.used).sum::<u64>()
    };
    let has_others = own.iter().any(|volume| stays(&own, volume) || stands_on_others(&own, volume));
    let alone = if stays(&own, live) { live.written } else { live.used_by_itself };
    DiskUsage {
        logical: live.size,
        exclusive: own.iter().map(exclusive).sum(),
        shared: if has_others { live.referenced.saturating_sub(alone) } else { 0 },
    }
}

/// Whether a volume would stay without a name if its disk, of which these are all volumes, were removed.
fn stays(own: &[&Volume], volume: &Volume) -> bool {
    let mut clones = volume.snapshots.iter().flat_map(|snapshot| &snapshot.clones);
    clones.any(|clone| match own.iter().find(|candidate| candidate.name == *clone) {
        Some(own_clone) => stays(own, own_clone),
        None => true,
    })
}

/// Whether a volume is a clone of what belongs to no volume of its disk.
fn stands_on_others(own: &[&Volume], volume: &Volume) -> bool {
    volume.origin.as_ref().is_some_and(|origin| own.iter().all(|candidate| candidate.name != *origin))
}
