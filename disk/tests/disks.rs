//! What every back end that keeps files does, on every file system that it is for.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use common::{
    Bed, Place, disk, has_scribble, in_each_place, in_places, run_program, scribble, snapshot, with_mount,
};
use kiln_contract::{BackendError, ErrorKind, Home};
use kiln_disk::template::{LARGEST, SMALLEST};
use kiln_disk::{Choice, Copying, DiskError, copy_file, open};

const GIB: u64 = 1 << 30;
const MIB: usize = 1 << 20;

#[test]
fn what_works_is_found_by_trying_it() {
    in_each_place(|bed| {
        let expected = match bed.place {
            Place::Ext4 | Place::Tmpfs => "sparse",
            Place::Xfs | Place::Btrfs => "reflink",
            Place::Pool => "btrfs",
        };
        assert_eq!((bed.disks.name(), bed.disks.copies_on_write()), (expected, bed.shares()));
        let opened = open(&bed.home, &Choice::Auto).unwrap();
        let reason = match bed.place {
            Place::Ext4 => "ext4 at",
            Place::Tmpfs => "tmpfs at",
            Place::Xfs => "copies share blocks on XFS",
            Place::Btrfs => "copies share blocks on btrfs",
            Place::Pool => "copies share blocks in the pool",
        };
        assert!(opened.reason.contains(reason), "{}", opened.reason);
        let [(what, ok, text)] = &kiln_disk::doctor(&bed.home)[..] else { panic!("one line") };
        assert_eq!((what.as_str(), *ok), ("disks", bed.shares()), "{text}");
        assert!(text.starts_with(&format!("{expected}: ")), "{text}");

        // What was chosen counts more than what is best.
        Choice::Sparse.save(&bed.home).unwrap();
        let opened = open(&bed.home, &Choice::Auto).unwrap();
        assert_eq!((opened.backend.name(), opened.backend.copies_on_write()), ("sparse", false));
        assert!(opened.reason.ends_with("as `kiln init` chose"), "{}", opened.reason);
        let reflink = open(&bed.home, &Choice::Reflink);
        assert_eq!(reflink.is_ok(), bed.shares(), "{reflink:?}");
        if let Err(error) = reflink {
            assert!(matches!(error, DiskError::NoReflinks { .. }), "{error}");
            assert!(BackendError::from(error).hint_text().unwrap().contains("pool"));
        }
        assert_eq!(open(&bed.home, &Choice::Btrfs).is_ok(), bed.place == Place::Pool);
    });
}

#[test]
fn a_disk_begins_as_an_ext4_of_its_own_in_the_size_that_was_asked_for() {
    in_each_place(|bed| {
        let (one, other) = (disk("one"), disk("other"));
        let path = bed.disks.create(&one, 10 * GIB + 1).unwrap();
        assert_eq!(bed.disks.size(&one).unwrap(), 10 * GIB + 4096);
        assert_eq!(bed.disks.path(&one).unwrap(), path);
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (10 * GIB + 4096, 0o600));
        let usage = bed.disks.usage().unwrap();
        assert!(usage.taken <= 256 << 10, "{usage:?}");

        let second = bed.disks.create(&other, SMALLEST).unwrap();
        let [first_id, second_id] = [&path, &second].map(|path| {
            let Some(e2fsck) = kiln_fixtures::require("e2fsck") else { return String::new() };
            run_program(Command::new(e2fsck).arg("-fn").arg(path));
            run_program(Command::new("blkid").args(["-p", "-s", "UUID", "-o", "value"]).arg(path))
        });
        assert_ne!(first_id, second_id);
        let files = bed.disks.directory(&one).unwrap();
        fs::write(files.join("memory"), "1").unwrap();
        assert_eq!(bed.disks.list().unwrap(), [one.clone(), other.clone()]);
        for id in [&one, &other] {
            bed.disks.remove(id).unwrap();
            bed.disks.remove(id).unwrap();
        }
        assert_eq!(bed.leavings(), [""; 0]);
    });
}

#[test]
fn copies_are_independent_of_their_originals() {
    in_each_place(|bed| {
        let (web, fork, second) = (disk("web"), disk("fork"), disk("second"));
        let before = snapshot("before");
        let path = bed.disks.create(&web, GIB).unwrap();
        // Past the file system's 64 MiB, and at the very end.
        let (middle, end) = (500 << 20, GIB - 4096);
        scribble(&path, middle, 3 * MIB, 1);
        scribble(&path, end, 4096, 2);
        bed.disks.flush(&web).unwrap();
        bed.disks.snapshot(&web, &before).unwrap();

        let copy = bed.disks.clone_disk(&web, None, &fork).unwrap();
        assert_eq!((&copy, bed.disks.size(&fork).unwrap()), (&bed.disks.path(&fork).unwrap(), GIB));
        assert!(has_scribble(&copy, middle, 3 * MIB, 1) && has_scribble(&copy, end, 4096, 2));
        assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        scribble(&copy, middle + 4096, MIB, 3);
        assert!(has_scribble(&path, middle, 3 * MIB, 1), "the original changed with its copy");
        scribble(&path, end, 4096, 4);
        assert!(has_scribble(&copy, end, 4096, 2), "the copy changed with its original");

        // From the snapshot, although the disk went on.
        let old = bed.disks.clone_disk(&web, Some(&before), &second).unwrap();
        assert!(has_scribble(&old, end, 4096, 2));
        assert_eq!(fs::metadata(&old).unwrap().permissions().mode() & 0o777, 0o600);
        // A copy of a copy of a copy stays when all others go.
        let (third, fourth) = (disk("third"), disk("fourth"));
        bed.disks.clone_disk(&fork, None, &third).unwrap();
        let last = bed.disks.clone_disk(&third, None, &fourth).unwrap();
        for id in [&web, &fork, &second, &third] {
            bed.disks.remove(id).unwrap();
        }
        assert!(has_scribble(&last, middle + 4096, MIB, 3) && has_scribble(&last, end, 4096, 2));
        bed.disks.remove(&fourth).unwrap();
        assert_eq!(bed.leavings(), [""; 0]);
    });
}

#[test]
fn a_disk_is_renamed_with_all_that_it_has_while_it_is_in_use() {
    in_each_place(|bed| {
        let (spare, web, other) = (disk("spare"), disk("web"), disk("other"));
        assert!(bed.disks.can_rename());
        let path = bed.disks.create(&spare, GIB).unwrap();
        let in_use = fs::File::open(&path).unwrap();
        bed.disks.snapshot(&spare, &snapshot("before")).unwrap();
        let moved = bed.disks.rename(&spare, &web).unwrap();
        assert_eq!(moved, bed.disks.path(&web).unwrap());
        scribble(&moved, 1 << 20, 4096, 1);
        let mut read = vec![0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&in_use, &mut read, 1 << 20).unwrap();
        assert!(read.iter().any(|byte| *byte != 0), "it is the same disk");
        assert_eq!(bed.disks.list().unwrap(), std::slice::from_ref(&web));
        assert_eq!(bed.disks.snapshots(&web).unwrap().len(), 1);

        bed.disks.create(&other, GIB).unwrap();
        let taken = bed.disks.rename(&web, &other).unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::Conflict, "{taken}");
        let gone = bed.disks.rename(&spare, &disk("new")).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound, "{gone}");
        for id in [&web, &other] {
            bed.disks.remove(id).unwrap();
        }
        assert_eq!(bed.leavings(), [""; 0]);
    });
}

#[test]
fn a_restore_brings_back_content_and_size_and_keeps_all_snapshots() {
    in_each_place(|bed| {
        let web = disk("web");
        let path = bed.disks.create(&web, GIB).unwrap();
        scribble(&path, 100 << 20, MIB, 1);
        bed.disks.snapshot(&web, &snapshot("z-first")).unwrap();
        bed.disks.resize(&web, 2 * GIB).unwrap();
        scribble(&path, 100 << 20, MIB, 2);
        scribble(&path, 3 * GIB / 2, MIB, 3);
        std::thread::sleep(std::time::Duration::from_millis(20));
        bed.disks.snapshot(&web, &snapshot("a-second")).unwrap();
        scribble(&path, 100 << 20, MIB, 4);
        let listed = || {
            let all = bed.disks.snapshots(&web).unwrap();
            all.into_iter().map(|one| (one.name.to_string(), one.size)).collect::<Vec<_>>()
        };
        let both = [("z-first".to_owned(), GIB), ("a-second".to_owned(), 2 * GIB)];
        assert_eq!(listed(), both, "oldest first");
        let created = bed.disks.snapshots(&web).unwrap()[0].created;
        let age = jiff::Timestamp::now().duration_since(created);
        assert!((0..600).contains(&age.as_secs()), "{age:?}");

        for (name, size, seed) in [("z-first", GIB, 1), ("a-second", 2 * GIB, 2), ("z-first", GIB, 1)] {
            bed.disks.restore(&web, &snapshot(name)).unwrap();
            assert_eq!(bed.disks.size(&web).unwrap(), size);
            assert!(has_scribble(&path, 100 << 20, MIB, seed), "{name}");
            // What is written after a restore is not written into the snapshot.
            scribble(&path, 100 << 20, MIB, 5);
            assert_eq!(listed(), both);
        }
        bed.disks.restore(&web, &snapshot("a-second")).unwrap();
        assert!(has_scribble(&path, 3 * GIB / 2, MIB, 3));
        bed.disks.delete_snapshot(&web, &snapshot("z-first")).unwrap();
        assert_eq!(listed(), both[1..]);
    });
}

#[test]
fn a_copy_is_of_the_instant_at_which_it_was_begun_and_is_not_seen_before_it_is_finished() {
    in_each_place(|bed| {
        let (web, fork) = (disk("web"), disk("fork"));
        let path = bed.disks.create(&web, GIB).unwrap();
        scribble(&path, 100 << 20, MIB, 1);
        let clone = bed.disks.start_clone(&web, None, &fork).unwrap();
        let save = bed.disks.start_snapshot(&web, &snapshot("now")).unwrap();
        scribble(&path, 100 << 20, MIB, 2);
        assert_eq!(bed.disks.list().unwrap(), std::slice::from_ref(&web));
        assert_eq!(bed.disks.snapshots(&web).unwrap(), []);
        // Somebody opens the same disks meanwhile, and sweeps.
        open(&bed.home, &Choice::Auto).unwrap();
        clone.finish().unwrap();
        save.finish().unwrap();
        assert!(has_scribble(&bed.disks.path(&fork).unwrap(), 100 << 20, MIB, 1));
        bed.disks.restore(&web, &snapshot("now")).unwrap();
        assert!(has_scribble(&path, 100 << 20, MIB, 1));

        drop(bed.disks.start_clone(&web, None, &disk("never")).unwrap());
        drop(bed.disks.start_snapshot(&web, &snapshot("never")).unwrap());
        assert_eq!(bed.disks.list().unwrap(), [fork.clone(), web.clone()]);
        assert_eq!(bed.disks.snapshots(&web).unwrap().len(), 1);

        // The original goes while it is copied: a clone has all it needs, a snapshot has no disk to belong to.
        let clone = bed.disks.start_clone(&web, None, &disk("orphan")).unwrap();
        let save = bed.disks.start_snapshot(&web, &snapshot("late")).unwrap();
        bed.disks.remove(&web).unwrap();
        clone.finish().unwrap();
        assert!(has_scribble(&bed.disks.path(&disk("orphan")).unwrap(), 100 << 20, MIB, 1));
        assert_eq!(save.finish().unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(bed.leavings().len(), 2, "{:?}", bed.leavings());
    });
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason_and_changes_nothing() {
    in_each_place(|bed| {
        let (web, gone) = (disk("web"), disk("gone"));
        let (before, never) = (snapshot("before"), snapshot("never"));
        bed.disks.create(&web, GIB).unwrap();
        bed.disks.snapshot(&web, &before).unwrap();
        let d = &bed.disks;
        let table: Vec<(Result<(), BackendError>, ErrorKind, &str)> = vec![
            (d.create(&web, GIB).map(drop), ErrorKind::Conflict, "there is a disk `web` already"),
            (d.create(&gone, SMALLEST - 1).map(drop), ErrorKind::Invalid, "at least 64.0 MiB"),
            (d.create(&gone, LARGEST + 1).map(drop), ErrorKind::Invalid, "at most 63.0 TiB"),
            (d.path(&gone).map(drop), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.directory(&gone).map(drop), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.size(&gone).map(drop), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.flush(&gone), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.clone_disk(&gone, None, &disk("x")).map(drop), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.clone_disk(&gone, Some(&never), &disk("x")).map(drop), ErrorKind::NotFound, "no disk `gone`"),
            (
                d.clone_disk(&web, Some(&never), &disk("x")).map(drop),
                ErrorKind::NotFound,
                "no snapshot `never`",
            ),
            (d.clone_disk(&web, None, &web).map(drop), ErrorKind::Conflict, "there is a disk `web` already"),
            (d.snapshot(&gone, &before), ErrorKind::NotFound, "there is no disk `gone`"),
            (
                d.snapshot(&web, &before),
                ErrorKind::Conflict,
                "the disk `web` has a snapshot `before` already",
            ),
            (d.snapshots(&gone).map(drop), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.restore(&gone, &before), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.restore(&web, &never), ErrorKind::NotFound, "the disk `web` has no snapshot `never`"),
            (d.delete_snapshot(&gone, &before), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.delete_snapshot(&web, &never), ErrorKind::NotFound, "the disk `web` has no snapshot `never`"),
            (d.resize(&gone, GIB), ErrorKind::NotFound, "there is no disk `gone`"),
            (d.resize(&web, GIB - 1), ErrorKind::Invalid, "from 1.0 GiB to 1024.0 MiB"),
            (d.resize(&web, LARGEST + 1), ErrorKind::Invalid, "at most 63.0 TiB"),
        ];
        for (index, (outcome, kind, text)) in table.into_iter().enumerate() {
            if text.starts_with("from 1.0") {
                // Less than a block below the size: rounded up it is the same.
                outcome.unwrap();
                continue;
            }
            let error = outcome.expect_err(text);
            assert_eq!(error.kind(), kind, "{index}: {error}");
            assert!(error.to_string().contains(text), "{index}: {error}");
        }
        let shrink = bed.disks.resize(&web, GIB / 2).unwrap_err();
        assert_eq!(shrink.kind(), ErrorKind::Invalid);
        assert!(
            shrink.to_string().contains("cannot shrink the disk `web` from 1.0 GiB to 512.0 MiB"),
            "{shrink}"
        );
        let hint = bed.disks.restore(&web, &never).unwrap_err();
        assert_eq!(hint.hint_text(), Some("it has before"));
        assert_eq!(bed.disks.size(&web).unwrap(), GIB);
        assert_eq!(bed.leavings(), ["web"]);
        // A size that the host's file system cannot have is an error and not a shorter disk.
        match bed.disks.resize(&web, LARGEST) {
            Ok(()) => assert_eq!(bed.disks.size(&web).unwrap(), LARGEST),
            Err(error) => {
                assert!(error.to_string().contains("cannot grow"), "{error}");
                assert_eq!(bed.disks.size(&web).unwrap(), GIB);
            }
        }
    });
}

#[test]
fn of_many_who_want_a_name_at_once_one_gets_it() {
    in_each_place(|bed| {
        let source = disk("source");
        bed.disks.create(&source, GIB).unwrap();
        std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|racer| {
                    let (disks, source) = (&bed.disks, &source);
                    scope.spawn(move || match racer % 2 {
                        0 => disks.create(&disk("wanted"), GIB).map(drop),
                        _ => disks.clone_disk(source, None, &disk("wanted")).map(drop),
                    })
                })
                .collect();
            let outcomes: Vec<_> = racers.into_iter().map(|racer| racer.join().unwrap()).collect();
            assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
            let others = outcomes.into_iter().filter_map(Result::err);
            others.for_each(|error| assert_eq!(error.kind(), ErrorKind::Conflict, "{error}"));
        });
        assert_eq!(bed.leavings().len(), 2, "{:?}", bed.leavings());
    });
}

#[test]
fn a_full_disk_says_how_much_was_missing_and_leaves_nothing() {
    for place in [Place::Tmpfs, Place::Ext4] {
        with_mount(place, 64 << 20, move |mount| {
            let home = Home::at(mount.join("home"));
            let disks = open(&home, &Choice::Auto).unwrap().backend;
            let bed = Bed { place, home, disks };
            let web = disk("web");
            let path = bed.disks.create(&web, GIB).unwrap();
            scribble(&path, 100 << 20, 40 * MIB, 1);
            for outcome in [
                bed.disks.clone_disk(&web, None, &disk("fork")).map(drop),
                bed.disks.snapshot(&web, &snapshot("before")),
            ] {
                let error = outcome.unwrap_err().to_string();
                assert!(error.contains("no space left in") && error.contains("MiB more needed"), "{error}");
                let place = format!("in `{}`", bed.home.disks().display());
                assert!(error.contains("(40.0 MiB to be written, ") && error.contains(&place), "{error}");
            }
            assert_eq!(bed.leavings(), ["web"]);
            assert!(has_scribble(&path, 100 << 20, 40 * MIB, 1));

            fill(mount);
            let error = bed.disks.create(&disk("new"), GIB).unwrap_err().to_string();
            assert!(error.contains("no space left in"), "{error}");
            assert_eq!(bed.leavings(), ["web"]);
            // A disk can be removed even then, and there is room again.
            bed.disks.remove(&web).unwrap();
            assert_eq!(bed.leavings(), [""; 0]);
            bed.disks.create(&disk("new"), GIB).unwrap();
        });
    }
}

#[test]
fn a_full_disk_that_shares_blocks_still_does_and_lets_disks_be_removed() {
    in_places(&[Place::Xfs, Place::Btrfs], |bed| {
        let (web, fork) = (disk("web"), disk("fork"));
        let path = bed.disks.create(&web, GIB).unwrap();
        scribble(&path, 100 << 20, MIB, 1);
        fill(bed.home.path().parent().unwrap());
        // No room to try whether blocks can be shared.
        let disks = open(&bed.home, &Choice::Auto).unwrap().backend;
        assert_eq!(disks.name(), "reflink");
        match disks.clone_disk(&web, None, &fork) {
            Ok(copy) => assert!(has_scribble(&copy, 100 << 20, MIB, 1)),
            Err(error) => {
                assert!(error.to_string().contains("no space left in"), "{error}");
                assert_eq!(bed.leavings(), ["web"]);
            }
        }
        for id in [&web, &fork] {
            disks.remove(id).unwrap();
        }
        assert_eq!(bed.leavings(), [""; 0]);
    });
}

/// Fills a file system to the last block that a file can have.
fn fill(mount: &Path) {
    let filler = fs::File::create(mount.join("filler")).unwrap();
    let (mut at, mut step) = (0, 16 * MIB);
    while step >= 4096 {
        let written = filler.write_all_at(&vec![1; step], at).and_then(|()| filler.sync_data());
        if written.is_ok() {
            at += step as u64;
        } else {
            step /= 2;
        }
    }
}

#[test]
fn other_files_are_copied_by_the_same_means() {
    in_places(&[Place::Ext4, Place::Xfs, Place::Pool], |bed| {
        let (web, fork) = (disk("web"), disk("fork"));
        bed.disks.create(&web, GIB).unwrap();
        bed.disks.create(&fork, GIB).unwrap();
        let from = bed.disks.directory(&web).unwrap().join("memory");
        let to = bed.disks.directory(&fork).unwrap().join("memory");
        fs::File::create(&from).unwrap().set_len(256 << 20).unwrap();
        scribble(&from, 10 << 20, MIB, 1);
        let how = copy_file(&from, &to).unwrap();
        assert_eq!(how == Copying::Reflink, bed.shares(), "{how:?}");
        assert!(has_scribble(&to, 10 << 20, MIB, 1));
        assert_eq!(fs::metadata(&to).unwrap().len(), 256 << 20);
        let error = copy_file(&from, &to).unwrap_err();
        assert!(matches!(error, DiskError::Io { .. }), "{error}");
        assert!(copy_file(Path::new("/nowhere"), &to.with_extension("2")).is_err());
        assert_eq!(fs::read_dir(bed.disks.directory(&fork).unwrap()).unwrap().count(), 1);
        // Onto another file system there is nothing to share.
        let elsewhere = tempfile::tempdir().unwrap();
        assert_eq!(copy_file(&from, &elsewhere.path().join("memory")).unwrap(), Copying::Sparse);
    });
}
