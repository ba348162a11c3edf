//! What there is below a dataset, as `zfs list` tells it, and what of it nobody needs any more.

use std::collections::BTreeSet;

use kiln_contract::{DiskId, SnapshotName};

use crate::{DiskError, Result};

/// The columns that [`Listing::parse`] reads.
pub(super) const COLUMNS: &str =
    "name,type,createtxg,creation,volsize,used,referenced,usedbydataset,written,origin,clones,kiln:disk";

/// A volume that was rolled back has that much of its own again, in bytes: what ZFS notes about it.
const NEGLIGIBLE: u64 = 64 << 10;

/// What a volume is for: the last part of its name tells. The names of disks have no colon.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// `<disk>`: a disk.
    Live(DiskId),
    /// `making:<token>`: becomes a disk when it is ready.
    Making(String),
    /// `old:<token>`: was a disk, until that was restored or removed. Kept for its snapshots.
    Old(String),
}

impl Role {
    fn parse(name: &str) -> Option<Self> {
        match name.split_once(':') {
            Some(("making", token)) => Some(Self::Making(token.to_owned())),
            Some(("old", token)) => Some(Self::Old(token.to_owned())),
            Some(_) => None,
            None => name.parse().ok().map(Self::Live),
        }
    }
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Volume {
    /// Its name, with the dataset's.
    pub(super) name: String,
    pub(super) role: Role,
    /// Whose snapshots it keeps; `None` when that disk was removed.
    pub(super) disk: Option<DiskId>,
    pub(super) size: u64,
    /// What is charged to it and its snapshots: would be freed without them, were there no clones.
    pub(super) used: u64,
    /// What can be read through it.
    pub(super) referenced: u64,
    /// What of that is charged to it, and not to the volume that it is a clone of; its snapshots may need it too.
    pub(super) used_by_itself: u64,
    /// What of that was written since its last snapshot (since it was made, if it has none).
    pub(super) written: u64,
    /// The volume that it is a clone of.
    pub(super) origin: Option<String>,
    /// Oldest first.
    pub(super) snapshots: Vec<Snapshot>,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// Its name, with the volume's.
    pub(super) name: String,
    pub(super) purpose: Purpose,
    /// The pool's transaction that it is of: a later snapshot has a greater one.
    pub(super) transaction: u64,
    /// Seconds since 1970.
    pub(super) created: i64,
    pub(super) size: u64,
    /// What nothing but this snapshot needs.
    pub(super) used: u64,
    /// The volumes that are clones of it.
    pub(super) clones: Vec<String>,
}

/// What a snapshot is for: the part of its name after `@` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Purpose {
    /// `snap-<name>`: somebody's.
    Named(SnapshotName),
    /// `base-<token>`: what clones are made from.
    Base(String),
    /// Something else's: left alone.
    Foreign,
}

impl Purpose {
    fn parse(name: &str) -> Self {
        let named = name.strip_prefix("snap-").and_then(|name| name.parse().ok()).map(Self::Named);
        let base = || name.strip_prefix("base-").map(|token| Self::Base(token.to_owned()));
        named.or_else(base).unwrap_or(Self::Foreign)
    }
}

/// All volumes of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Listing {
    pub(super) volumes: Vec<Volume>,
}

impl Listing {
    /// Reads the output of `zfs list -H -p -o` [`COLUMNS`]: a line each, with tabs between its fields, sizes in bytes, times in
    /// seconds since 1970, and `-` for what there is not.
    pub(super) fn parse(dataset: &str, text: &str) -> Result<Self> {
        let unreadable = |what: String| DiskError::Unreadable { program: "zfs", what };
        let mut listing = Self::default();
        let mut snapshots = Vec::new();
        for line in text.lines() {
            let fields: Vec<&str> = line.split('\t').collect();
            let [
                name,
                kind,
                transaction,
                created,
                size,
                used,
                referenced,
                by_itself,
                written,
                origin,
                clones,
                disk,
            ] = fields[..]
            else {
                return Err(unreadable(format!("{} fields instead of 12 in `{line}`", fields.len())));
            };
            let number = |text: &str| match text {
                "-" => Ok(0),
                text => text.parse().map_err(|_| unreadable(format!("`{text}` is not a number in `{line}`"))),
            };
            let Some(inside) = name.strip_prefix(dataset).and_then(|rest| rest.strip_prefix('/')) else {
                continue;
            };
            match (kind, inside.split_once('@')) {
                ("volume", None) => {
                    let Some(role) = Role::parse(inside) else { continue };
                    listing.volumes.push(Volume {
                        name: name.to_owned(),
                        role,
                        disk: disk.parse().ok(),
                        size: number(size)?,
                        used: number(used)?,
                        referenced: number(referenced)?,
                        used_by_itself: number(by_itself)?,
                        written: number(written)?,
                        origin: origin.split_once('@').map(|(volume, _)| volume.to_owned()),
                        snapshots: Vec::new(),
                    });
                }
                ("snapshot", Some((_, part))) => snapshots.push(Snapshot {
                    name: name.to_owned(),
                    purpose: Purpose::parse(part),
                    transaction: number(transaction)?,
                    created: number(created)?.try_into().unwrap_or(i64::MAX),
                    size: number(size)?,
                    used: number(used)?,
                    clones: match clones {
                        "" | "-" => Vec::new(),
                        clones => clones.split(',').map(str::to_owned).collect(),
                    },
                }),
                _ => {}
            }
        }
        snapshots.sort_by_key(|snapshot: &Snapshot| snapshot.transaction);
        for snapshot in snapshots {
            let volume = snapshot.name.split('@').next().unwrap_or_default();
            if let Some(volume) = listing.volumes.iter_mut().find(|candidate| candidate.name == volume) {
                volume.snapshots.push(snapshot);
            }
        }
        Ok(listing)
    }

    /// The volume of a disk.
    pub(super) fn live(&self, id: &DiskId) -> Option<&Volume> {
        self.volumes.iter().find(|volume| matches!(&volume.role, Role::Live(disk) if disk == id))
    }

    /// The snapshots of a disk, on whichever volume they are, oldest first.
    pub(super) fn snapshots_of(&self, id: &DiskId) -> Vec<(&Snapshot, &SnapshotName)> {
        let volumes = self.volumes.iter().filter(|volume| volume.disk.as_ref() == Some(id));
        let all = volumes.flat_map(|volume| &volume.snapshots);
        let mut named: Vec<_> = all
            .filter_map(|snapshot| match &snapshot.purpose {
                Purpose::Named(name) => Some((snapshot, name)),
                _ => None,
            })
            .collect();
        named.sort_by_key(|(snapshot, _)| snapshot.transaction);
        named
    }

    /// A volume that was being restored when whoever did it was killed, between taking the old one away and putting the
    /// new one in its place: the new one's name, and the disk that it is to be.
    pub(super) fn half_restored(&self, alive: &BTreeSet<String>) -> Option<(&Volume, &DiskId)> {
        self.volumes.iter().find_map(|made| {
            let (Role::Making(token), Some(id)) = (&made.role, &made.disk) else { return None };
            let taken_away = self.volumes.iter().any(|old| {
                matches!(&old.role, Role::Old(of) if of == token) && old.disk.as_ref() == Some(id)
            });
            (!alive.contains(token) && taken_away && self.live(id).is_none()).then_some((made, id))
        })
    }

    /// Volumes of disks that are gone, because whoever removed them was killed before noting that on each.
    pub(super) fn half_removed(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.iter().filter(|volume| {
            let (Role::Old(_), Some(id)) = (&volume.role, &volume.disk) else { return false };
            let being_restored = self
                .volumes
                .iter()
                .any(|other| matches!(other.role, Role::Making(_)) && other.disk.as_ref() == Some(id));
            self.live(id).is_none() && !being_restored
        })
    }

    /// Whether both volumes of a restore are there that was cut short between the renames: each is needed.
    fn is_half_restored(&self, token: &str) -> bool {
        let disk_of = |role: Role| self.volumes.iter().find(|volume| volume.role == role)?.disk.as_ref();
        let made = disk_of(Role::Making(token.to_owned()));
        made.is_some_and(|id| disk_of(Role::Old(token.to_owned())) == Some(id) && self.live(id).is_none())
    }

    /// Whether a volume has to stay as it is, whatever stands on it.
    fn is_in_use(&self, volume: &Volume, alive: &BTreeSet<String>) -> bool {
        match &volume.role {
            Role::Live(_) => true,
            Role::Making(token) | Role::Old(token) => alive.contains(token) || self.is_half_restored(token),
        }
    }

    /// The last snapshots of volumes that are kept only for snapshots, where the volume has changed a lot since: it may be rolled
    /// back to that.
    pub(super) fn outgrown(&self, alive: &BTreeSet<String>) -> Vec<&str> {
        let outgrown = self.volumes.iter().filter(|volume| {
            volume.written > NEGLIGIBLE
                && matches!(volume.role, Role::Old(_))
                && !self.is_in_use(volume, alive)
        });
        outgrown.filter_map(|volume| Some(volume.snapshots.last()?.name.as_str())).collect()
    }

    /// What nobody needs and nothing depends on, snapshots before volumes. `alive` are the tokens of what is being done. When
    /// all that is gone, there may be more.
    pub(super) fn unneeded(&self, alive: &BTreeSet<String>) -> Vec<&str> {
        let mut unneeded = Vec::new();
        for volume in &self.volumes {
            let mut kept = 0;
            for snapshot in &volume.snapshots {
                let needed = match &snapshot.purpose {
                    Purpose::Named(_) => volume.disk.is_some(),
                    Purpose::Base(token) => alive.contains(token),
                    Purpose::Foreign => true,
                };
                if needed || !snapshot.clones.is_empty() {
                    kept += 1;
                } else {
                    unneeded.push(snapshot.name.as_str());
                }
            }
            if kept == 0 && !self.is_in_use(volume, alive) {
                unneeded.push(volume.name.as_str());
            }
        }
        unneeded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As OpenZFS 2.1 writes it: a disk with a snapshot of its own and one that a clone stands on, that clone, what a
    /// restore left, and things that are not ours.
    const SAMPLE: &str = "\
tank/kiln\tfilesystem\t5\t1700000000\t-\t9000000\t98304\t98304\t98304\t-\t-\t-
tank/kiln/web\tvolume\t9\t1700000100\t10737418240\t7000000\t5000000\t4000000\t300000\ttank/kiln/old:xyz@snap-first\t-\tweb
tank/kiln/web@snap-before\tsnapshot\t21\t1700000300\t10737418240\t1000000\t4500000\t-\t4500000\t-\t\tweb
tank/kiln/web@base-abc\tsnapshot\t20\t1700000300\t10737418240\t0\t5000000\t-\t500000\t-\ttank/kiln/fork\tweb
tank/kiln/web@zfs-auto-snap_daily-2024\tsnapshot\t22\t1700000400\t10737418240\t0\t5000000\t-\t0\t-\t-\tweb
tank/kiln/fork\tvolume\t20\t1700000300\t21474836480\t250000\t5200000\t200000\t200000\ttank/kiln/web@base-abc\t-\tfork
tank/kiln/old:xyz\tvolume\t3\t1700000050\t10737418240\t80000\t80000\t80000\t0\t-\t-\tweb
tank/kiln/old:xyz@snap-first\tsnapshot\t8\t1700000060\t10737418240\t1\t1\t-\t1\t-\ttank/kiln/web,tank/else\tweb
tank/kiln/other:thing\tvolume\t2\t1700000050\t1\t1\t1\t1\t1\t-\t-\t-
tank/kiln/user data\tfilesystem\t2\t1700000050\t-\t1\t1\t1\t1\t-\t-\t-
";

    fn id(text: &str) -> DiskId {
        text.parse().unwrap()
    }

    #[test]
    fn a_listing_is_read_and_what_is_not_ours_is_not_in_it() {
        let listing = Listing::parse("tank/kiln", SAMPLE).unwrap();
        let names: Vec<&str> = listing.volumes.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["tank/kiln/web", "tank/kiln/fork", "tank/kiln/old:xyz"]);
        let fork = listing.live(&id("fork")).unwrap();
        assert_eq!(
            (fork.size, fork.used, fork.referenced, fork.used_by_itself, fork.written),
            (21_474_836_480, 250_000, 5_200_000, 200_000, 200_000)
        );
        assert_eq!(fork.origin.as_deref(), Some("tank/kiln/web"));
        let of_web: Vec<u64> =
            listing.live(&id("web")).unwrap().snapshots.iter().map(|snapshot| snapshot.transaction).collect();
        assert_eq!(of_web, [20, 21, 22], "oldest first, also of one second");
        let snapshots = listing.snapshots_of(&id("web"));
        let seen: Vec<_> = snapshots
            .iter()
            .map(|(snapshot, name)| (name.as_str(), snapshot.created, snapshot.clones.len()))
            .collect();
        assert_eq!(seen, [("first", 1_700_000_060, 2), ("before", 1_700_000_300, 0)]);
        assert_eq!(listing.live(&id("gone")), None);
        assert_eq!(Listing::parse("tank/kiln", "").unwrap(), Listing::default());
    }

    #[test]
    fn lines_that_are_none_are_errors() {
        for (text, expected) in [
            ("tank/kiln/web\tvolume\n", "2 fields instead of 12"),
            ("tank/kiln/web\tvolume\t1\t1\tten\t1\t1\t1\t1\t-\t-\t-\n", "`ten` is not a number"),
            ("tank/kiln/web\tvolume\t1\t1\t-1\t1\t1\t1\t1\t-\t-\t-\n", "`-1` is not a number"),
        ] {
            let error = Listing::parse("tank/kiln", text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    /// A listing of volumes (name, disk) and snapshots (name, clones).
    fn listing(volumes: &[(&str, &str)], snapshots: &[(&str, &str)]) -> Listing {
        let written = 2 * NEGLIGIBLE;
        let volumes = volumes
            .iter()
            .map(|(name, disk)| format!("t/k/{name}\tvolume\t1\t1\t1\t1\t1\t1\t{written}\t-\t-\t{disk}\n"));
        let snapshots = snapshots
            .iter()
            .map(|(name, clones)| format!("t/k/{name}\tsnapshot\t1\t1\t1\t1\t1\t-\t1\t-\t{clones}\t-\n"));
        Listing::parse("t/k", &volumes.chain(snapshots).collect::<String>()).unwrap()
    }

    #[test]
    fn what_nobody_needs_is_told_and_nothing_else() {
        type Case = (
            &'static str,
            &'static [(&'static str, &'static str)],
            &'static [(&'static str, &'static str)],
            &'static [&'static str],
        );
        let cases: &[Case] = &[
            ("a disk and its snapshots", &[("a", "a")], &[("a@snap-x", "-"), ("a@daily", "-")], &[]),
            ("a base without clones", &[("a", "a")], &[("a@base-dead", "")], &["t/k/a@base-dead"]),
            ("a base that is becoming one", &[("a", "a")], &[("a@base-live", "-")], &[]),
            ("a base with a clone", &[("a", "a"), ("b", "b")], &[("a@base-dead", "t/k/b")], &[]),
            (
                "what a killed maker left",
                &[("making:dead", "a"), ("making:live", "b")],
                &[],
                &["t/k/making:dead"],
            ),
            (
                "an old volume with the disk's snapshot",
                &[("a", "a"), ("old:dead", "a")],
                &[("old:dead@snap-x", "-")],
                &[],
            ),
            ("an old volume that keeps nothing", &[("a", "a"), ("old:dead", "a")], &[], &["t/k/old:dead"]),
            (
                "a removed disk",
                &[("old:dead", "-")],
                &[("old:dead@snap-x", "-"), ("old:dead@base-dead", "")],
                &["t/k/old:dead@snap-x", "t/k/old:dead@base-dead", "t/k/old:dead"],
            ),
            (
                "a removed disk that clones stand on",
                &[("old:dead", "-"), ("b", "b")],
                &[("old:dead@snap-x", "t/k/b"), ("old:dead@snap-y", "-")],
                &["t/k/old:dead@snap-y"],
            ),
            (
                "a restore that was cut short",
                &[("making:dead", "a"), ("old:dead", "a"), ("making:x", "b"), ("old:y", "b"), ("b", "b")],
                &[("old:dead@base-gone", "t/k/making:dead")],
                &["t/k/making:x", "t/k/old:y"],
            ),
            ("a removed disk with a foreign snapshot", &[("old:dead", "-")], &[("old:dead@daily", "-")], &[]),
        ];
        let alive = BTreeSet::from(["live".to_owned()]);
        for (what, volumes, snapshots, expected) in cases {
            assert_eq!(listing(volumes, snapshots).unneeded(&alive), *expected, "{what}");
        }
    }

    #[test]
    fn what_is_kept_for_its_snapshots_is_rolled_back_to_the_last_of_them() {
        let volumes =
            [("a", "a"), ("old:dead", "a"), ("old:live", "a"), ("old:gone", "-"), ("making:x", "b")];
        let snapshots =
            [("a@snap-w", "-"), ("old:dead@snap-x", "-"), ("old:dead@daily", "-"), ("old:live@snap-y", "-")];
        let alive = BTreeSet::from(["live".to_owned()]);
        assert_eq!(listing(&volumes, &snapshots).outgrown(&alive), ["t/k/old:dead@daily"]);
        let half = [("old:dead", "a"), ("making:dead", "a")];
        assert_eq!(listing(&half, &snapshots).outgrown(&alive), [""; 0], "a restore is to be finished");
    }

    #[test]
    fn restores_and_removals_that_were_cut_short_are_recognised() {
        let alive = BTreeSet::from(["live".to_owned()]);
        type Volumes = &'static [(&'static str, &'static str)];
        let cases: &[(&str, Volumes, Option<&str>, &[&str])] = &[
            ("between the renames", &[("making:x", "a"), ("old:x", "a")], Some("t/k/making:x"), &[]),
            ("the same, by somebody alive", &[("making:live", "a"), ("old:live", "a")], None, &[]),
            ("before them", &[("making:x", "a"), ("a", "a")], None, &[]),
            ("after them", &[("a", "a"), ("old:x", "a")], None, &[]),
            ("a new disk", &[("making:x", "a")], None, &[]),
            ("a removal", &[("old:x", "a"), ("old:y", "a"), ("b", "b")], None, &["t/k/old:x", "t/k/old:y"]),
            ("a finished removal", &[("old:x", "-")], None, &[]),
        ];
        for (what, volumes, restored, removed) in cases {
            let listing = listing(volumes, &[]);
            let half = listing.half_restored(&alive);
            assert_eq!(half.map(|(volume, _)| volume.name.as_str()), *restored, "{what}");
            let half: Vec<&str> = listing.half_removed().map(|volume| volume.name.as_str()).collect();
            assert_eq!(half, *removed, "{what}");
        }
    }
}
