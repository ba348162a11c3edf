//! What disks in a pool of ZFS must do.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use kiln_contract::{DiskUsage, ErrorKind};
use rustix::fs::{SeekFrom, seek};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::crash;
use super::pool::{Bed, MIB, disk, run, snapshot};

pub(crate) type Test = (&'static str, fn(&Bed));

/// Where [`Bed::with_disk`] writes.
const AT: u64 = 8 * MIB;

/// Those that are done where no udev runs.
pub(crate) const TESTS: &[Test] = &[
    ("a_disk_is_copied_saved_put_back_and_removed", a_disk_is_copied_saved_put_back_and_removed),
    ("clones_of_clones_stay_whole_whichever_goes_first", clones_of_clones_stay_whole_whichever_goes_first),
    ("snapshots_outlive_restores_and_are_told_oldest_first", snapshots_outlive_restores),
    (
        "what_a_disk_takes_alone_is_what_is_free_without_it",
        what_a_disk_takes_alone_is_what_is_free_without_it,
    ),
    ("a_disk_grows_while_it_is_open", a_disk_grows_while_it_is_open),
    ("names_are_as_long_as_they_may_be_and_longer_ones_leave_nothing", names_at_their_limits),
    ("a_full_dataset_fails_what_needs_room_and_disks_can_be_removed", a_full_dataset),
    ("snapshots_of_others_stay_and_hold_nothing_of_ours_for_ever", snapshots_of_others),
    ("killed_at_any_instant_they_leave_whole_disks_or_none", crash::killed_at_any_instant),
];

/// Those that are done where it does.
pub(crate) const WITH_UDEV: &[Test] =
    &[("a_name_that_is_given_again_is_another_disk", a_name_that_is_given_again_is_another_disk)];

fn a_disk_is_copied_saved_put_back_and_removed(bed: &Bed) {
    let (web, fork, before) = (bed.with_disk("web", 1), disk("fork"), snapshot("before"));
    let disks = &bed.disks;
    disks.flush(&web).unwrap();
    disks.snapshot(&web, &before).unwrap();
    let copy = disks.clone_disk(&web, None, &fork).unwrap();
    assert!(bed.has(&fork, AT, 1));
    bed.scribble(&fork, AT, 2);
    assert!(bed.has(&web, AT, 1), "the original changed with its copy");
    bed.scribble(&web, AT, 3);
    disks.restore(&web, &before).unwrap();
    assert!(bed.has(&web, AT, 1) && bed.has(&fork, AT, 2));
    disks.resize(&fork, 128 * MIB).unwrap();
    assert_eq!((disks.size(&web).unwrap(), disks.size(&fork).unwrap()), (64 * MIB, 128 * MIB));

    // The file system that all begin with is one to a kernel.
    std::fs::create_dir_all("/mnt").unwrap();
    bed.scribble(&fork, 32 * MIB, 4);
    mount(&copy, "/mnt", "ext4", MountFlags::empty(), None).unwrap();
    std::fs::write("/mnt/file", "words").unwrap();
    unmount("/mnt", UnmountFlags::empty()).unwrap();

    disks.remove(&web).unwrap();
    assert!(bed.has(&fork, 32 * MIB, 4));
    disks.remove(&fork).unwrap();
    bed.is_empty();
}

fn clones_of_clones_stay_whole_whichever_goes_first(bed: &Bed) {
    let names = ["a", "b", "c", "d"];
    // Each writes at a place of its own, and all have what those before them wrote.
    bed.with_disk(names[0], 1);
    for index in 1..names.len() {
        let (from, to) = (disk(names[index - 1]), disk(names[index]));
        if index == 2 {
            bed.disks.snapshot(&from, &snapshot("kept")).unwrap();
            bed.disks.clone_disk(&from, Some(&snapshot("kept")), &to).unwrap();
            // The clones keep it, without its name.
            bed.disks.delete_snapshot(&from, &snapshot("kept")).unwrap();
            assert_eq!(bed.disks.snapshots(&from).unwrap(), []);
        } else {
            bed.disks.clone_disk(&from, None, &to).unwrap();
        }
        bed.scribble(&to, AT + index as u64 * MIB, index as u64 * 2 + 1);
    }
    // From the middle, the first, the last.
    let order = [2, 0, 3, 1];
    for (gone, index) in order.iter().enumerate() {
        bed.disks.remove(&disk(names[*index])).unwrap();
        for left in &order[gone + 1..] {
            let wrote: Vec<_> = (0..=*left as u64).map(|wrote| (AT + wrote * MIB, wrote * 2 + 1)).collect();
            assert!(bed.has_all(&disk(names[*left]), &wrote), "{left} without {index}");
        }
    }
    bed.is_empty();
}

fn snapshots_outlive_restores(bed: &Bed) {
    let web = bed.with_disk("web", 1);
    let told = |bed: &Bed| {
        let all = bed.disks.snapshots(&web).unwrap();
        all.into_iter().map(|saved| saved.name.to_string()).collect::<Vec<_>>()
    };
    // In one second, in an order that is not that of their names.
    bed.disks.snapshot(&web, &snapshot("zero")).unwrap();
    bed.scribble(&web, AT, 2);
    bed.disks.snapshot(&web, &snapshot("one")).unwrap();
    assert_eq!(told(bed), ["zero", "one"]);
    for (name, seed) in [("zero", 1), ("one", 2), ("zero", 1)] {
        bed.scribble(&web, AT, 9);
        bed.disks.restore(&web, &snapshot(name)).unwrap();
        assert!(bed.has(&web, AT, seed), "{name}");
        assert_eq!(told(bed), ["zero", "one"]);
        let volumes = bed.names().iter().filter(|name| !name.contains('@')).count();
        assert_eq!(
            volumes,
            2,
            "each restore leaves what its snapshots are on, and nothing else: {:?}",
            bed.names()
        );
    }
    bed.disks.snapshot(&web, &snapshot("last")).unwrap();
    assert_eq!(told(bed), ["zero", "one", "last"]);
    bed.disks.delete_snapshot(&web, &snapshot("zero")).unwrap();
    bed.disks.delete_snapshot(&web, &snapshot("one")).unwrap();
    assert_eq!(told(bed), ["last"]);
    assert!(bed.has(&web, AT, 1));
    bed.disks.remove(&web).unwrap();
    bed.is_empty();
}

/// Removes disks one after the other, and looks how much ZFS has less each time.
fn what_a_disk_takes_alone_is_what_is_free_without_it(bed: &Bed) {
    const NOISE: u64 = 256 << 10;
    let web = bed.with_disk("web", 1);
    bed.scribble(&web, AT + MIB, 2);
    bed.disks.snapshot(&web, &snapshot("before")).unwrap();
    bed.scribble(&web, AT, 3);
    let told = |name: &str| -> (DiskUsage, u64) {
        let used = bed.used();
        let usage = bed.disks.usage().unwrap();
        assert!(usage.taken.abs_diff(used) < NOISE, "{} and ZFS says {used}", usage.taken);
        (usage.disks.into_iter().find(|(id, _)| *id == disk(name)).unwrap().1, used)
    };
    let near = |bytes: u64, mebibytes: u64| bytes.abs_diff(mebibytes * MIB) < NOISE;
    // Its snapshot is its own: two MiB now, and one that it overwrote. So is what a restore leaves.
    let (alone, _) = told("web");
    assert!(near(alone.exclusive, 3) && alone.shared == 0, "{alone:?}");
    bed.disks.restore(&web, &snapshot("before")).unwrap();
    bed.scribble(&web, AT, 3);
    let (restored, _) = told("web");
    assert!(near(restored.exclusive, 3) && restored.shared == 0, "{restored:?}");

    bed.disks.clone_disk(&web, None, &disk("fork")).unwrap();
    bed.disks.clone_disk(&disk("fork"), None, &disk("other")).unwrap();
    bed.scribble(&disk("fork"), AT + MIB, 4);
    bed.scribble(&web, AT + 2 * MIB, 5);
    for (name, exclusive, shared) in [("web", 1, 2), ("fork", 1, 1), ("other", 3, 0)] {
        let (alone, before) = told(name);
        assert!(near(alone.exclusive, exclusive) && near(alone.shared, shared), "{name}: {alone:?}");
        bed.disks.remove(&disk(name)).unwrap();
        let freed = before - bed.used();
        assert!(near(freed, exclusive), "{name}: {alone:?}, and {freed} bytes were freed");
    }
    bed.is_empty();
}

fn a_disk_grows_while_it_is_open(bed: &Bed) {
    let web = bed.with_disk("web", 1);
    let path = bed.disks.path(&web).unwrap();
    let open = File::options().read(true).write(true).open(&path).unwrap();
    bed.disks.resize(&web, 128 * MIB).unwrap();
    assert_eq!(seek(&open, SeekFrom::End(0)).unwrap(), 128 * MIB, "fd {}", open.as_raw_fd());
    open.write_all_at(b"past the old end", 100 * MIB).unwrap();
    open.sync_all().unwrap();
    let mut read = [0; 16];
    File::open(bed.disks.path(&web).unwrap()).unwrap().read_exact_at(&mut read, 100 * MIB).unwrap();
    assert_eq!(&read, b"past the old end");
    // A copy and a restore while it is: who has it open goes on with what it opened.
    bed.disks.snapshot(&web, &snapshot("now")).unwrap();
    let error = bed.disks.resize(&web, 64 * MIB).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    // Removed while it is open: out of sight at once, and gone with the next command after it was closed.
    bed.disks.remove(&web).unwrap();
    assert_eq!(bed.disks.list().unwrap(), []);
    assert_eq!(bed.names().len(), 1, "{:?}", bed.names());
    drop(open);
    drop(bed.again());
    assert_eq!(bed.names(), [""; 0]);
}

fn names_at_their_limits(bed: &Bed) {
    let (long, longest) = ("d".repeat(100), "s".repeat(100));
    // 255 bytes are the most that ZFS has for dataset, disk and snapshot.
    let deep = format!("{}/{}", bed.dataset, "p".repeat(99 - bed.dataset.len()));
    run("zfs", &["create", "-o", "canmount=off", &deep]);
    let below = Bed::of(&deep);
    let web = below.with_disk(&long, 1);
    let error = below.disks.snapshot(&web, &snapshot(&longest)).unwrap_err().to_string();
    assert!(error.contains("too long"), "{error}");
    assert_eq!(below.disks.snapshots(&web).unwrap(), []);
    assert_eq!(below.names(), [long.as_str()]);
    below.disks.snapshot(&web, &snapshot(&longest[..48])).unwrap();
    // Its other names are longer than this one.
    let x = below.with_disk("x", 3);
    below.disks.snapshot(&x, &snapshot(&longest)).unwrap();
    below.disks.restore(&x, &snapshot(&longest)).unwrap();
    assert!(below.has(&x, AT, 3));
    below.disks.remove(&web).unwrap();
    below.disks.remove(&x).unwrap();
    below.is_empty();
}

fn a_full_dataset(bed: &Bed) {
    let web = bed.with_disk("web", 1);
    bed.disks.clone_disk(&web, None, &disk("fork")).unwrap();
    bed.used();
    let used = run("zfs", &["get", "-H", "-p", "-o", "value", "used", &bed.dataset]);
    run("zfs", &["set", &format!("quota={}", used.trim()), &bed.dataset]);
    let error = bed.disks.create(&disk("new"), 64 * MIB).unwrap_err().to_string();
    assert!(error.contains("no space left in `tank/"), "{error}");
    let all = bed.disks.list().unwrap();
    assert_eq!(all, [disk("fork"), web.clone()]);
    for name in all {
        assert!(bed.has(&name, AT, 1));
        bed.disks.remove(&name).unwrap();
    }
    bed.is_empty();
}

fn snapshots_of_others(bed: &Bed) {
    let web = bed.with_disk("web", 1);
    run("zfs", &["snapshot", "-r", &format!("{}@hourly", bed.dataset)]);
    assert_eq!(bed.disks.snapshots(&web).unwrap(), []);
    bed.scribble(&web, AT, 2);
    bed.disks.remove(&web).unwrap();
    let left = bed.names();
    assert!(left.len() == 2 && left[1].ends_with("@hourly"), "{left:?}");
    run("zfs", &["destroy", "-r", &format!("{}@hourly", bed.dataset)]);
    drop(bed.again());
    bed.is_empty();
}

/// Names go from one volume to another, and the links that udev makes follow later.
fn a_name_that_is_given_again_is_another_disk(bed: &Bed) {
    let (base, web) = (bed.with_disk("base", 100), disk("web"));
    for seed in 1..3 {
        bed.disks.clone_disk(&base, None, &web).unwrap();
        assert!(bed.has(&web, AT, 100), "round {seed}");
        bed.scribble(&web, AT, 2 * seed);
        bed.disks.snapshot(&web, &snapshot("now")).unwrap();
        bed.scribble(&web, AT, 2 * seed + 100);
        bed.disks.restore(&web, &snapshot("now")).unwrap();
        assert!(bed.has(&web, AT, 2 * seed), "round {seed}");
        bed.disks.remove(&web).unwrap();
    }
    bed.disks.remove(&base).unwrap();
    bed.is_empty();
}
