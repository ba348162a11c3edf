//! The same bytes on every file system, and few of them twice where blocks can be shared.

use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::process::Command;

use kiln_contract::Silent;
use kiln_fixtures::{noise, require};
use kiln_store::ImportLimits;

use crate::common::{Tar, fixture};
use crate::file_system::{fresh, run};
use crate::{expected, make, open};

/// Where blocks are shared, a disk has only its tree, ends of files, and files of less than a block for itself.
const OWN: u64 = 300 << 10;

#[test]
fn a_disk_has_the_same_bytes_wherever_it_is_made_and_shares_what_can_be_shared() {
    let reference = fixture();
    let image = make(&reference.store, "a:1");
    let bytes = expected(&reference.store, &image.layers);
    let disk = reference.store.image_disk(&image.layers, &Silent).unwrap();
    assert!(std::fs::read(&disk).unwrap() == bytes, "as a writer in memory makes it");
    assert_eq!(disk.metadata().unwrap().permissions().mode() & 0o7777, 0o444);
    for (kind, shares) in [("tmpfs", false), ("ext4", false), ("xfs", true), ("btrfs", true)] {
        let directory = tempfile::tempdir().unwrap();
        let Some(mounted) = fresh(kind, 400, directory.path()) else { continue };
        let (_home, store) = open(&mounted.0);
        let image = make(&store, "a:1");
        store.merged_tree(&image.layers).unwrap();
        let before = mounted.used();
        let disk = store.image_disk(&image.layers, &Silent).unwrap();
        let taken = mounted.used().saturating_sub(before);
        assert!(std::fs::read(&disk).unwrap() == bytes, "{kind}");
        let usage = store.usage().unwrap();
        assert_eq!(usage.image_disks, 1);
        let own = usage.image_disk_bytes;
        if shares {
            // The file system's own records of so many extents come on top.
            assert!(own < OWN && taken < 4 * OWN, "{kind}: {own} of its own, {taken} taken");
            if let Some(filefrag) = require("filefrag") {
                let extents = run(Command::new(filefrag).arg("-v").arg(&disk));
                let shared = extents.lines().filter(|line| line.contains("shared")).count();
                assert!(shared >= 8, "{kind}: {extents}");
            }
        } else {
            assert!(own > 12_000_000, "{kind}: {own} of its own");
        }
        drop(store);
    }
}

#[test]
fn ten_gigabytes_of_holes_take_no_room() {
    for kind in ["", "xfs"] {
        let directory = tempfile::tempdir().unwrap();
        let mounted = if kind.is_empty() { None } else { fresh(kind, 400, directory.path()) };
        let at = mounted.as_ref().map_or(directory.path(), |mounted| &mounted.0);
        let (_home, store) = open(at);
        let size: u64 = 10 << 30;
        let data = noise(100_000, 1);
        // Data at 5 GiB and nowhere else.
        let map = format!("{},{}", 5_u64 << 30, data.len());
        let tar = Tar::new()
            .pax(&[
                ("GNU.sparse.major", b"0"),
                ("GNU.sparse.minor", b"1"),
                ("GNU.sparse.name", b"sparse"),
                ("GNU.sparse.size", size.to_string().as_bytes()),
                ("GNU.sparse.map", map.as_bytes()),
            ])
            .file("sparse", &data)
            .file("after", &noise(100_000, 2));
        let layer = store.import_tar(&tar.end()[..], None, ImportLimits::default()).unwrap().layer;
        let disk = store.image_disk(&[layer], &Silent).unwrap();
        let metadata = disk.metadata().unwrap();
        assert!(metadata.len() > size && metadata.len() < size + (1 << 20), "{}", metadata.len());
        assert!(metadata.blocks() * 512 < 1 << 20, "{kind}: {} bytes are allocated", metadata.blocks() * 512);
        // The tree has one block; `after` comes first.
        let start = 4096 + 102_400;
        let mut read = vec![0; data.len() + 200];
        let file = std::fs::File::open(&disk).unwrap();
        file.read_exact_at(&mut read, start + (5 << 30) - 100).unwrap();
        assert!(read[100..100 + data.len()] == data, "{kind}: the data are at their place");
        assert!(read[..100].iter().chain(&read[100 + data.len()..]).all(|byte| *byte == 0), "{kind}");
        drop(store);
    }
}
