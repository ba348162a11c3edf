//! Damaged kernels, modules and packages: refused or installed, but nothing worse.

mod support;

use std::path::Path;

use kiln_boot::{Kernels, Source, initramfs};
use kiln_contract::{Home, Silent};
use proptest::prelude::*;
use support::{VERSION, bzimage_with, deb, module, package_files, tar, unpack, vmlinux};

/// Installs what is at `path`, and makes an initramfs if that works.
fn try_to_install(directory: &Path, path: &Path) {
    let kernels = Kernels::open(&Home::at(directory.join("home")));
    if let Ok(kernel) = kernels.install(&Source::Path(path.into()), None, &Silent) {
        initramfs(&kernel, b"").unwrap();
    }
}

/// `sound` with some of its bytes replaced, each by a value that is likely to matter, and cut off somewhere.
fn damaged(sound: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![Just(0), Just(1), Just(0x7f), Just(0x80), Just(0xff), any::<u8>()];
    // Most of what is read are headers.
    let place = prop_oneof![0..sound.len().min(1200), 0..sound.len()];
    let changes = prop::collection::vec((place, value), 1..12);
    let cut = prop_oneof![4 => Just(usize::MAX), 1 => 0..sound.len()];
    (changes, cut).prop_map(move |(changes, cut)| {
        let mut bytes = sound.clone();
        changes.into_iter().for_each(|(place, value)| bytes[place] = value);
        bytes.truncate(cut);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_vmlinux(bytes in damaged(vmlinux(b"Linux version 6.1.1 (someone)", true))) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        std::fs::write(&path, bytes).unwrap();
        try_to_install(directory.path(), &path);
    }

    #[test]
    fn a_damaged_bzimage(bytes in damaged(bzimage_with(&zstd::encode_all(&vmlinux(b"code", true)[..], 1).unwrap()))) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bzImage");
        std::fs::write(&path, bytes).unwrap();
        try_to_install(directory.path(), &path);
    }

    #[test]
    fn a_damaged_module(bytes in damaged(module(&["name=erofs", "depends=virtio,9p", "softdep=pre: crc32c"]))) {
        let directory = tempfile::tempdir().unwrap();
        let mut files = package_files();
        files.iter_mut().find(|(path, _)| path.ends_with("/erofs.ko")).unwrap().1 = bytes;
        unpack(directory.path(), &files);
        try_to_install(directory.path(), &directory.path().join(format!("boot/vmlinuz-{VERSION}")));
    }

    #[test]
    fn a_damaged_package(bytes in damaged({
        let directory = tempfile::tempdir().unwrap();
        std::fs::read(deb(directory.path(), "data.tar", &tar(&package_files()))).unwrap()
    })) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("package.deb");
        std::fs::write(&path, bytes).unwrap();
        try_to_install(directory.path(), &path);
    }
}
