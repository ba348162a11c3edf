//! Real file systems, each in a file, mounted where only the test sees them.

#![allow(dead_code, reason = "each program of tests uses a part")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_contract::{DiskBackend, DiskId, Home, SnapshotName};
use kiln_disk::{BtrfsPool, Choice, open};

/// Where disks are kept in a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Copied files on ext4.
    Ext4,
    /// Copied files on tmpfs, which has no extents.
    Tmpfs,
    /// Shared blocks on XFS.
    Xfs,
    /// Shared blocks on btrfs.
    Btrfs,
    /// Shared blocks in a pool on ext4.
    Pool,
}

pub(crate) const PLACES: [Place; 5] = [Place::Ext4, Place::Tmpfs, Place::Xfs, Place::Btrfs, Place::Pool];

/// A home on one of them.
pub(crate) struct Bed {
    pub(crate) place: Place,
    pub(crate) home: Home,
    pub(crate) disks: Box<dyn DiskBackend>,
}

impl Bed {
    /// Whether copies share blocks here.
    pub(crate) fn shares(&self) -> bool {
        !matches!(self.place, Place::Ext4 | Place::Tmpfs)
    }

    /// Everything below the home that belongs to disks.
    pub(crate) fn leavings(&self) -> Vec<String> {
        let mut found = Vec::new();
        for directory in [self.home.disks(), self.home.disks().join(".tmp")] {
            for entry in fs::read_dir(directory).unwrap() {
                found.push(entry.unwrap().file_name().into_string().unwrap());
            }
        }
        found.retain(|name| name != ".tmp");
        found
    }
}

/// Runs `test` with disks in each place, in a thread with a mount namespace of its own.
pub(crate) fn in_each_place(test: fn(&Bed)) {
    in_places(&PLACES, test);
}

/// Runs `test` with disks in each of `places`.
pub(crate) fn in_places(places: &[Place], test: fn(&Bed)) {
    for place in places.iter().copied() {
        with_mount(place, 512 << 20, move |mount| {
            let home = Home::at(mount.join("home"));
            if place == Place::Pool {
                BtrfsPool::make(&home, kiln_disk::SMALLEST_POOL).unwrap();
            }
            let disks = open(&home, &Choice::Auto).unwrap().backend;
            test(&Bed { place, home, disks });
        });
    }
}

/// Runs `test` with a new file system of at least `size` bytes (more where its kind or what is to be in it needs more), in a
/// thread with a mount namespace of its own: it vanishes with the thread.
pub(crate) fn with_mount(place: Place, size: u64, test: impl FnOnce(&Path) + Send + 'static) {
    if !kiln_fixtures::require_root() {
        return;
    }
    let mkfs = match place {
        Place::Tmpfs => None,
        Place::Ext4 => Some(kiln_fixtures::require("mke2fs")),
        Place::Xfs => Some(kiln_fixtures::require("mkfs.xfs")),
        Place::Btrfs => Some(kiln_fixtures::require("mkfs.btrfs")),
        Place::Pool => {
            Some(kiln_fixtures::require("mkfs.btrfs").and_then(|_| kiln_fixtures::require("mke2fs")))
        }
    };
    if mkfs == Some(None) {
        return;
    }
    let name = format!("{}: {place:?}", std::thread::current().name().unwrap_or("?"));
    let thread = std::thread::Builder::new().name(name.clone());
    let run = move || {
        // SAFETY: CLONE_NEWNS changes this thread only, and it ends with the test.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        let private =
            rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let directory = roomy_memory().map_or_else(tempfile::tempdir, tempfile::tempdir_in).unwrap();
        let mount = directory.path().join("mount");
        fs::create_dir(&mount).unwrap();
        let unmount = Unmount(mount.clone());
        let mut command = Command::new("mount");
        match mkfs.flatten() {
            None => command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "kiln-test"]),
            Some(mkfs) => {
                let image = directory.path().join("image");
                let least = match place {
                    Place::Xfs => 320 << 20,
                    Place::Pool => 768 << 20,
                    _ => 0,
                };
                File::create(&image).unwrap().set_len(size.max(least)).unwrap();
                let options: &[&str] = match place {
                    Place::Ext4 | Place::Pool => &["-q", "-F", "-t", "ext4"],
                    _ => &["-q"],
                };
                run_program(Command::new(mkfs).args(options).arg(&image));
                command.args(["-o", "loop"]).arg(&image)
            }
        };
        run_program(command.arg(&mount));
        test(&mount);
        drop(unmount);
    };
    if thread.spawn(run).unwrap().join().is_err() {
        panic!("failed: {name}");
    }
}

/// Where the images are made if there is room: these tests wait for the storage all the time, and need it to be no real one.
fn roomy_memory() -> Option<&'static str> {
    let found = rustix::fs::statvfs("/dev/shm").ok()?;
    (found.f_bavail * found.f_frsize >= 4 << 30).then_some("/dev/shm")
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        // The pool too, which is mounted in it.
        let _ = Command::new("umount").args(["-R", "-l"]).arg(&self.0).status();
    }
}

pub(crate) fn run_program(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed ({}):\n{stdout}\n{stderr}", output.status);
    stdout
}

pub(crate) fn disk(name: &str) -> DiskId {
    name.parse().unwrap()
}

pub(crate) fn snapshot(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

/// Writes bytes that depend on `seed` and cannot be compressed, and puts them on the storage.
pub(crate) fn scribble(path: &Path, at: u64, length: usize, seed: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&kiln_fixtures::noise(length, seed), at).unwrap();
    file.sync_all().unwrap();
}

/// Whether the bytes that [`scribble`] wrote are there.
pub(crate) fn has_scribble(path: &Path, at: u64, length: usize, seed: u64) -> bool {
    let mut bytes = vec![0; length];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes == kiln_fixtures::noise(length, seed)
}
