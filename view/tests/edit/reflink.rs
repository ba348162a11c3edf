//! A copy that shares its blocks with what it was made of.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use kiln_erofs::{NodeId, Tree, write_metadata};

use crate::ground::{Backend, Ground, owned, with_ground_in};

const SIZE: usize = 64 << 20;

/// Far less than the file, far more than what a file system writes down of it.
const LITTLE: u64 = 8 << 20;

/// Bytes that are taken, when all is on disk.
fn used(directory: &Path) -> u64 {
    rustix::fs::syncfs(File::open(directory).unwrap()).unwrap();
    let told = rustix::fs::statvfs(directory).unwrap();
    (told.f_blocks - told.f_bfree) * told.f_frsize
}

/// A new btrfs in a file, mounted where the test's mounts are nobody else's.
fn btrfs(directory: &Path, mkfs: &Path) {
    let image = directory.join("image");
    File::create(&image).unwrap().set_len(1 << 30).unwrap();
    let mount = directory.join("btrfs");
    fs::create_dir(&mount).unwrap();
    for command in [
        Command::new(mkfs).arg("-q").arg(&image),
        Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount),
    ] {
        let ended = command.output().unwrap();
        assert!(ended.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
    }
}

fn takes_little(ground: &Ground, backend: Backend) {
    let bytes = kiln_fixtures::noise(SIZE, 7);
    let mut tree = Tree::new(owned(0o755));
    tree.add(NodeId::ROOT, b"large", ground.object(&bytes), owned(0o644)).unwrap();
    write_metadata(&tree, File::create(ground.at("tree.erofs")).unwrap()).unwrap();
    let mounted = ground.edit();
    let large = ground.at("view/large");
    let before = used(&ground.at("upper"));
    let file = File::options().write(true).open(&large).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[!bytes[1000]], 1000).unwrap();
    drop(file);
    let taken = used(&ground.at("upper")).saturating_sub(before);
    assert!(taken < LITTLE, "{backend:?}: {taken} bytes for one");
    let mut expected = bytes.clone();
    expected[1000] = !bytes[1000];
    assert!(fs::read(&large).unwrap() == expected, "{backend:?}: not the file with one byte changed");
    // That the room is told right: other bytes do take it.
    fs::write(ground.at("view/other"), kiln_fixtures::noise(SIZE / 2, 8)).unwrap();
    assert!(used(&ground.at("upper")) - before > SIZE as u64 / 4, "{backend:?}");
    mounted.unmount().unwrap();
}

#[test]
fn one_changed_byte_of_a_large_file_takes_little_room_where_blocks_can_be_shared() {
    let Some(mkfs) = kiln_fixtures::require("mkfs.btrfs") else { return };
    for backend in [Backend::Fuse, Backend::Overlay] {
        let mkfs = mkfs.clone();
        let on_btrfs = move |directory: &Path| {
            btrfs(directory, &mkfs);
            directory.join("btrfs")
        };
        with_ground_in(backend, on_btrfs, move |ground| takes_little(ground, backend));
    }
}
