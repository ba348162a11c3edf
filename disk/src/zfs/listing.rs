//! What there is below a dataset, as `zfs list` tells it, and what of it nobody needs any more.

use std::collections::BTreeSet;

use kiln_contract::{DiskId, SnapshotName};

use crate::{DiskError, Result};

/// The columns that [`Listing::parse`] reads.
pub(super) const COLUMNS: &str = "name,type,creation,volsize,used,referenced,usedbydataset,clones,kiln:disk";

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
    /// What would be freed without it and its snapshots, were there no clones.
    pub(super) used: u64,
    /// What can be read through it.
    pub(super) referenced: u64,
    /// What would be freed without it, its snapshots kept.
    pub(super) used_by_itself: u64,
    pub(super) snapshots: Vec<Snapshot>,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// Its name, with the volume's.
    pub(super) name: String,
    pub(super) purpose: Purpose,
    /// Seconds since 1970.
    pub(super) created: i64,
    pub(super) size: u64,
    pub(super) has_clones: bool,
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
            let [name, kind, created, size, used, referenced, used_by_itself, clones, disk] = fields[..]
            else {
                return Err(unreadable(format!("{} fields instead of 9 in `{line}`", fields.len())));
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
                        used_by_itself: number(used_by_itself)?,
                        snapshots: Vec::new(),
                    });
                }
                ("snapshot", Some((_, part))) => snapshots.push(Snapshot {
                    name: name.to_owned(),
                    purpose: Purpose::parse(part),
                    created: number(created)?.try_into().unwrap_or(i64::MAX),
                    size: number(size)?,
                    has_clones: !matches!(clones, "" | "-"),
                }),
                _ => {}
            }
        }
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
        named.sort_by_key(|(snapshot, name)| (snapshot.created, *name));
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
                if needed || snapshot.has_clones {
                    kept += 1;
                } else {
                    unneeded.push(snapshot.name.as_str());
                }
            }
            let in_use = match &volume.role {
                Role::Live(_) => true,
                Role::Making(token) | Role::Old(token) => alive.contains(token),
            };
            if !in_use && kept == 0 {
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
tank/kiln\tfilesystem\t1700000000\t-\t9000000\t98304\t98304\t-\t-
tank/kiln/web\tvolume\t1700000100\t10737418240\t7000000\t5000000\t4000000\t-\tweb
tank/kiln/web@snap-before\tsnapshot\t1700000200\t10737418240\t1000000\t4500000\t-\t\t-
tank/kiln/web@base-abc\tsnapshot\t1700000300\t10737418240\t0\t5000000\t-\ttank/kiln/fork\tweb
tank/kiln/web@zfs-auto-snap_daily-2024\tsnapshot\t1700000400\t10737418240\t0\t5000000\t-\t-\tweb
tank/kiln/fork\tvolume\t1700000300\t21474836480\t250000\t5200000\t200000\t-\tfork
tank/kiln/old:xyz\tvolume\t1700000050\t10737418240\t80000\t80000\t80000\t-\tweb
tank/kiln/old:xyz@snap-first\tsnapshot\t1700000060\t10737418240\t1\t1\t-\ttank/kiln/web,tank/else\tweb
tank/kiln/other:thing\tvolume\t1700000050\t1\t1\t1\t1\t-\t-
tank/kiln/user data\tfilesystem\t1700000050\t-\t1\t1\t1\t-\t-
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
            (fork.size, fork.used, fork.referenced, fork.used_by_itself),
            (21_474_836_480, 250_000, 5_200_000, 200_000)
        );
        let snapshots = listing.snapshots_of(&id("web"));
        let seen: Vec<_> = snapshots
            .iter()
            .map(|(snapshot, name)| (name.as_str(), snapshot.created, snapshot.has_clones))
            .collect();
        assert_eq!(seen, [("first", 1_700_000_060, true), ("before", 1_700_000_200, false)]);
        assert_eq!(listing.live(&id("gone")), None);
        assert_eq!(Listing::parse("tank/kiln", "").unwrap(), Listing::default());
    }

    #[test]
    fn lines_that_are_none_are_errors() {
        for (text, expected) in [
            ("tank/kiln/web\tvolume\n", "2 fields instead of 9"),
            ("tank/kiln/web\tvolume\t1\tten\t1\t1\t1\t-\t-\n", "`ten` is not a number"),
            ("tank/kiln/web\tvolume\t1\t-1\t1\t1\t1\t-\t-\n", "`-1` is not a number"),
        ] {
            let error = Listing::parse("tank/kiln", text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    /// A listing of volumes (name, disk) and snapshots (name, clones).
    fn listing(volumes: &[(&str, &str)], snapshots: &[(&str, &str)]) -> Listing {
        let volumes =
            volumes.iter().map(|(name, disk)| format!("t/k/{name}\tvolume\t1\t1\t1\t1\t1\t-\t{disk}\n"));
        let snapshots = snapshots
            .iter()
            .map(|(name, clones)| format!("t/k/{name}\tsnapshot\t1\t1\t1\t1\t-\t{clones}\t-\n"));
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
            ("a removed disk with a foreign snapshot", &[("old:dead", "-")], &[("old:dead@daily", "-")], &[]),
        ];
        let alive = BTreeSet::from(["live".to_owned()]);
        for (what, volumes, snapshots, expected) in cases {
            assert_eq!(listing(volumes, snapshots).unneeded(&alive), *expected, "{what}");
        }
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
