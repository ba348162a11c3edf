//! The pool: made, grown while it is used, found again after a reboot, removed.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::process::Command;

use common::{Place, disk, has_scribble, run_program, scribble, with_mount};
use kiln_contract::{BackendError, ErrorKind, Home};
use kiln_disk::{BtrfsPool, Choice, SMALLEST_POOL, open};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// What is mounted below a home, in the mount namespace of this test.
fn mounts(home: &Home) -> usize {
    let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let place = home.disks().to_str().unwrap().replace(' ', r"\040");
    table.lines().filter(|line| line.contains(&place)).count()
}

#[test]
fn a_pool_lives_through_growth_and_reboots_until_it_is_removed() {
    with_mount(Place::Pool, 3 * GIB, |mount| {
        let home = Home::at(mount.join("home with blanks"));
        assert!(BtrfsPool::of(&home).is_none());
        let pool = BtrfsPool::make(&home, SMALLEST_POOL).unwrap();
        let status = pool.status().unwrap();
        assert_eq!(status.size, SMALLEST_POOL);
        assert!(status.taken < 64 * MIB && status.free > 256 * MIB, "{status:?}");
        let disks = open(&home, &Choice::Auto).unwrap().backend;
        assert_eq!(disks.name(), "btrfs");
        let path = disks.create(&disk("web"), GIB).unwrap();
        scribble(&path, 100 << 20, 8 << 20, 1);

        // While a disk is open.
        let open_disk = fs::File::open(&path).unwrap();
        pool.grow(GIB).unwrap();
        pool.grow(GIB).unwrap();
        let grown = pool.status().unwrap();
        assert_eq!(grown.size, GIB);
        assert!(grown.free > status.free + 256 * MIB, "{grown:?}");
        let error = pool.grow(GIB - 1).unwrap_err().to_string();
        assert!(error.contains("cannot shrink the pool for disks from 1.0 GiB"), "{error}");
        let error = pool.grow(100 * GIB).unwrap_err().to_string();
        assert!(error.contains("no space left in") && error.contains("GiB more needed"), "{error}");
        assert_eq!(pool.status().unwrap().size, GIB);

        // In use, and with a disk in it, it stays.
        let error = BackendError::from(pool.remove().unwrap_err());
        assert!(error.to_string().contains("there is a disk in the pool"), "{error}");
        drop(open_disk);

        // After a reboot it is not mounted, and whoever opens the disks first mounts it: once, also if many come at once.
        run_program(Command::new("umount").arg(home.disks()));
        assert!(!path.exists());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(open(&home, &Choice::Auto).unwrap().backend.name(), "btrfs"));
            }
        });
        assert_eq!(mounts(&home), 1);
        assert!(has_scribble(&path, 100 << 20, 8 << 20, 1));

        disks.remove(&disk("web")).unwrap();
        let held = fs::File::create(home.disks().join(".held")).unwrap();
        let error = BackendError::from(pool.remove().unwrap_err());
        assert_eq!(
            (error.kind(), error.to_string().contains("is in use")),
            (ErrorKind::State, true),
            "{error}"
        );
        drop(held);
        pool.remove().unwrap();
        assert_eq!((mounts(&home), home.disk_pool().exists()), (0, false));
        assert_eq!(open(&home, &Choice::Auto).unwrap().backend.name(), "sparse");
        let loops = run_program(Command::new("losetup").arg("--associated").arg(home.disk_pool()));
        assert_eq!(loops, "", "a loop device is left");
    });
}

#[test]
fn a_pool_that_cannot_be_is_refused_with_a_reason_and_leaves_nothing() {
    with_mount(Place::Pool, GIB, |mount| {
        let home = Home::at(mount.join("home"));
        let refused = |size: u64, kind: ErrorKind, text: &str| {
            let error = BackendError::from(BtrfsPool::make(&home, size).unwrap_err());
            assert!(error.to_string().contains(text), "{error}");
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.hint_text().is_some(), "{error}");
        };
        refused(SMALLEST_POOL - 1, ErrorKind::Invalid, "a pool has at least 512.0 MiB");
        refused(10 * GIB, ErrorKind::Failed, "no space left in");
        let disks = open(&home, &Choice::Auto).unwrap().backend;
        disks.create(&disk("web"), GIB).unwrap();
        refused(SMALLEST_POOL, ErrorKind::Conflict, "there is a disk in");
        disks.remove(&disk("web")).unwrap();
        run_program(Command::new("mount").args(["-t", "tmpfs", "other"]).arg(home.disks()));
        refused(SMALLEST_POOL, ErrorKind::Conflict, "another file system is mounted at");
        run_program(Command::new("umount").arg(home.disks()));
        assert!(!home.disk_pool().exists());

        // What a killed maker left is no obstacle.
        let left = home.path().join(".disks.btrfs.new");
        fs::write(&left, "half").unwrap();
        BtrfsPool::make(&home, SMALLEST_POOL).unwrap();
        assert!(!left.exists());
        refused(SMALLEST_POOL, ErrorKind::Conflict, "there is a pool");

        // Something else where the pool is to be.
        run_program(Command::new("umount").arg(home.disks()));
        run_program(Command::new("mount").args(["-t", "tmpfs", "other"]).arg(home.disks()));
        let error = open(&home, &Choice::Auto).unwrap_err().to_string();
        assert!(error.contains("`other` (tmpfs) is mounted at"), "{error}");
        let (_, ok, text) = kiln_disk::doctor(&home).remove(0);
        assert!(!ok && text.contains("and not the pool"), "{text}");
        run_program(Command::new("umount").arg(home.disks()));
        assert_eq!(open(&home, &Choice::Btrfs).unwrap().backend.name(), "btrfs");
    });
}
