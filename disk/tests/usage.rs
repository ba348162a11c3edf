//! What disks take, as their extents tell it, beside what the file systems' own programs say.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use common::{Bed, Place, disk, in_each_place, in_places, run_program, scribble, snapshot};
use kiln_contract::DiskUsage;
use kiln_disk::usage_of;

const GIB: u64 = 1 << 30;
const MIB: usize = 1 << 20;

/// In whole MiB: what the file systems in the disks take beside the data is less than one.
fn in_mib(usage: DiskUsage) -> (u64, u64) {
    (usage.exclusive >> 20, usage.shared >> 20)
}

fn of(bed: &Bed, name: &str) -> DiskUsage {
    let usage = bed.disks.usage().unwrap();
    usage.disks.into_iter().find(|(id, _)| *id == disk(name)).unwrap().1
}

#[test]
fn shared_bytes_are_counted_once() {
    in_each_place(|bed| {
        let path = bed.disks.create(&disk("web"), GIB).unwrap();
        scribble(&path, 100 << 20, 8 * MIB, 1);
        let alone = of(bed, "web");
        assert_eq!((alone.logical, in_mib(alone)), (GIB, (8, 0)));

        // Two copies, one of which changes a quarter.
        bed.disks.clone_disk(&disk("web"), None, &disk("fork")).unwrap();
        let changed = bed.disks.clone_disk(&disk("web"), None, &disk("changed")).unwrap();
        scribble(&changed, 102 << 20, 2 * MIB, 2);
        let usage = bed.disks.usage().unwrap();
        if bed.shares() {
            assert_eq!(in_mib(of(bed, "web")), (0, 8));
            assert_eq!(in_mib(of(bed, "fork")), (0, 8));
            assert_eq!(in_mib(of(bed, "changed")), (2, 6));
            assert_eq!(usage.taken >> 20, 10);
        } else {
            for name in ["web", "fork", "changed"] {
                assert_eq!(in_mib(of(bed, name)), (8, 0), "{name}");
            }
            assert_eq!(usage.taken >> 20, 24);
        }
        let parts: u64 = usage.disks.iter().map(|(_, usage)| usage.exclusive).sum();
        assert!(parts <= usage.taken, "{usage:?}");
        let names: Vec<&str> = usage.disks.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(names, ["changed", "fork", "web"]);
    });
}

#[test]
fn what_only_a_disks_own_snapshots_share_is_its_own() {
    in_each_place(|bed| {
        let path = bed.disks.create(&disk("web"), GIB).unwrap();
        scribble(&path, 100 << 20, 8 * MIB, 1);
        bed.disks.snapshot(&disk("web"), &snapshot("before")).unwrap();
        scribble(&path, 100 << 20, 3 * MIB, 2);
        let own = if bed.shares() { 11 } else { 16 };
        assert_eq!(in_mib(of(bed, "web")), (own, 0));
        assert_eq!(bed.disks.usage().unwrap().taken >> 20, own);

        // A clone of the snapshot shares what the snapshot has; the disk's new data stays its own.
        bed.disks.clone_disk(&disk("web"), Some(&snapshot("before")), &disk("fork")).unwrap();
        let (web, fork) = if bed.shares() { ((3, 8), (0, 8)) } else { ((16, 0), (8, 0)) };
        assert_eq!((in_mib(of(bed, "web")), in_mib(of(bed, "fork"))), (web, fork));

        // Its other files count too.
        let memory = bed.disks.directory(&disk("fork")).unwrap().join("memory");
        fs::write(&memory, "").unwrap();
        scribble(&memory, 0, 5 * MIB, 3);
        assert_eq!(in_mib(of(bed, "fork")), (fork.0 + 5, fork.1));
    });
}

#[test]
fn what_is_removed_frees_what_was_exclusive() {
    in_places(&[Place::Xfs, Place::Btrfs, Place::Pool], |bed| {
        let free = || {
            let directory = fs::File::open(bed.home.disks()).unwrap();
            rustix::fs::syncfs(&directory).unwrap();
            let found = rustix::fs::statvfs(bed.home.disks()).unwrap();
            found.f_bfree * found.f_frsize
        };
        let path = bed.disks.create(&disk("web"), GIB).unwrap();
        scribble(&path, 100 << 20, 32 * MIB, 1);
        let copy = bed.disks.clone_disk(&disk("web"), None, &disk("fork")).unwrap();
        scribble(&copy, 100 << 20, 16 * MIB, 2);
        let exclusive = of(bed, "fork").exclusive;
        assert_eq!(exclusive >> 20, 16);
        let before = free();
        bed.disks.remove(&disk("fork")).unwrap();
        // btrfs and XFS free what was removed when they get to it.
        let begun = std::time::Instant::now();
        while free() < before + (15 << 20) && begun.elapsed().as_secs() < 40 {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let freed = free().saturating_sub(before);
        assert!(freed.abs_diff(exclusive) <= 2 << 20, "{freed} were freed, and {exclusive} exclusive");
    });
}

#[test]
fn btrfs_counts_the_same() {
    let Some(btrfs) = kiln_fixtures::require("btrfs") else { return };
    assert!(btrfs.is_absolute());
    in_places(&[Place::Btrfs], |bed| {
        let first = bed.disks.create(&disk("a"), GIB).unwrap();
        scribble(&first, 100 << 20, 8 * MIB, 1);
        // Many extents with holes between them, more than are told at once.
        let file = fs::File::options().write(true).open(&first).unwrap();
        for block in 0..1500 {
            file.write_all_at(&[1; 4096], (200 << 20) + block * 8192).unwrap();
        }
        file.sync_all().unwrap();
        let second = bed.disks.clone_disk(&disk("a"), None, &disk("b")).unwrap();
        scribble(&second, 100 << 20, MIB, 2);
        let third = bed.disks.clone_disk(&disk("b"), None, &disk("c")).unwrap();
        let files = [first, second, third];
        let ours = usage_of(&files).unwrap();
        for (path, ours) in files.iter().zip(&ours.files) {
            // Total, exclusive, set shared, name.
            let said = run_program(Command::new("btrfs").args(["filesystem", "du", "--raw"]).arg(path));
            let line = said.lines().last().unwrap();
            let numbers: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
            assert_eq!((numbers[0], numbers[1]), (ours.exclusive + ours.shared, ours.exclusive), "{said}");
        }
        let extents = run_program(Command::new("filefrag").arg("-v").arg(&files[0]));
        assert!(extents.lines().count() > 1500, "{extents}");
    });
}

#[test]
fn extents_of_every_kind_are_counted_for_what_they_are() {
    in_places(&[Place::Ext4, Place::Xfs, Place::Btrfs], |bed| {
        let directory = bed.home.disks();
        let file = |name: &str| directory.join(name);
        let one = |path: &Path| usage_of(&[path]).unwrap().files[0];

        // Allocated and never written.
        fs::write(file("reserved"), "").unwrap();
        let handle = fs::File::options().write(true).open(file("reserved")).unwrap();
        rustix::fs::fallocate(&handle, rustix::fs::FallocateFlags::empty(), 0, 8 << 20).unwrap();
        assert_eq!(one(&file("reserved")), DiskUsage { logical: 8 << 20, exclusive: 8 << 20, shared: 0 });

        // Written, but not on the storage: without a place yet.
        fs::write(file("cached"), vec![1; 4 * MIB]).unwrap();
        assert_eq!(one(&file("cached")), DiskUsage { logical: 4 << 20, exclusive: 4 << 20, shared: 0 });

        // So small that btrfs keeps it with its metadata.
        fs::write(file("small"), "small").unwrap();
        fs::File::open(file("small")).unwrap().sync_all().unwrap();
        assert!((1..=4096).contains(&one(&file("small")).exclusive), "{:?}", one(&file("small")));

        // Nothing but a hole.
        fs::File::create(file("hole")).unwrap().set_len(GIB).unwrap();
        assert_eq!(one(&file("hole")), DiskUsage { logical: GIB, exclusive: 0, shared: 0 });
        assert_eq!(usage_of(&[] as &[&Path]).unwrap(), Default::default());

        if bed.shares() {
            // Twice the same blocks in one file: shared with nobody but itself.
            scribble_new(&file("twice"), 4 * MIB);
            let twice = fs::File::options().read(true).write(true).open(file("twice")).unwrap();
            let (mut from, mut to) = (0, 4 << 20);
            let shared = rustix::fs::copy_file_range(&twice, Some(&mut from), &twice, Some(&mut to), 4 * MIB);
            assert_eq!(shared.unwrap(), 4 * MIB);
            twice.sync_all().unwrap();
            assert_eq!(one(&file("twice")), DiskUsage { logical: 8 << 20, exclusive: 4 << 20, shared: 0 });
            assert_eq!(usage_of(&[file("twice")]).unwrap().taken, 4 << 20);
            // Shared with a file that nobody asked about.
            scribble_new(&file("known"), 4 * MIB);
            kiln_disk::copy_file(&file("known"), &file("unknown")).unwrap();
            assert_eq!(one(&file("known")), DiskUsage { logical: 4 << 20, exclusive: 0, shared: 4 << 20 });
        }
    });
}

fn scribble_new(path: &Path, length: usize) {
    fs::write(path, "").unwrap();
    scribble(path, 0, length, 9);
}
