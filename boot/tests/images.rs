//! The forms in which kernels come, and what machines boot of them.

mod support;

use std::io::Write as _;

use kiln_boot::{Arch, BootError, Form, Kernel, Kernels, Result, Source};
use kiln_contract::{Home, Silent};
use support::{VERSION, bzimage_with, vmlinux};

/// Installs the file `content` as a kernel that has everything built in.
fn install(content: &[u8], check: impl FnOnce(&Kernel)) -> Result<()> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernel");
    std::fs::write(&path, content).unwrap();
    let kernels = Kernels::open(&Home::at(directory.path().join("home")));
    kernels.install(&Source::Path(path), None, &Silent).map(|kernel| check(&kernel))
}

/// A loaded byte of an ELF file: what is at `address`, counted from where its first segment is.
fn loaded(elf: &[u8], address: usize) -> u8 {
    let word = |at: usize| u64::from_le_bytes(*elf[at..].first_chunk().unwrap());
    let (offset, in_file, in_memory) = (word(64 + 8), word(64 + 32), word(64 + 40));
    assert!((address as u64) < in_memory);
    if (address as u64) < in_file { elf[offset as usize + address] } else { 0 }
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(content).unwrap();
    gzip.finish().unwrap()
}

/// LZ4's legacy frame, in blocks of 8 MiB.
fn lz4(content: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in content.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend_from_slice(&block);
    }
    packed
}

#[test]
fn a_bzimage_is_unpacked_to_the_kernel_that_is_in_it() {
    let code: Vec<u8> =
        (0..9_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 27) as u8 + 1).collect();
    let kernel = vmlinux(&code, true);
    let size = u32::try_from(kernel.len()).unwrap().to_le_bytes();
    for (form, mut payload) in [
        ("gzip", gzip(&kernel)),
        ("zstd", zstd::encode_all(&kernel[..], 1).unwrap()),
        ("lz4", lz4(&kernel)),
        ("plain", kernel.clone()),
    ] {
        if form != "plain" {
            payload.extend_from_slice(&size);
        }
        let image = bzimage_with(&payload);
        install(&image, |installed| {
            assert_eq!((installed.version(), installed.record().form), (VERSION, Form::BzImage), "{form}");
            assert_eq!(std::fs::read(installed.image()).unwrap(), image, "{form}");
            assert!(installed.record().pvh, "{form}");
            assert_eq!(Some(installed.for_qemu()), installed.vmlinux(), "{form}");
            let elf = std::fs::read(installed.vmlinux().unwrap()).unwrap();
            for at in (0..code.len()).step_by(1013).chain([code.len() - 1]) {
                assert_eq!(loaded(&elf, 20 + at), code[at], "{form}: byte {at}");
            }
            assert_eq!(loaded(&elf, 20 + code.len() + 100), 0, "{form}");
        })
        .unwrap();
    }
}

#[test]
fn a_vmlinux_keeps_only_what_is_loaded() {
    let whole = vmlinux(b"Linux version 6.6.6-elf (someone)", true);
    install(&whole, |kernel| {
        assert_eq!(
            (kernel.version(), kernel.record().form, kernel.arch()),
            ("6.6.6-elf", Form::Elf, Arch::X86_64)
        );
        assert_eq!(Some(kernel.image()), kernel.vmlinux());
        let elf = std::fs::read(kernel.image()).unwrap();
        assert!(elf.len() < 0x1000 + 200, "{} bytes", elf.len());
        assert!(!elf.windows(7).any(|window| window == b"symbols"));
        // The entry, and the segment's addresses, stay.
        assert_eq!(elf[24..32], whole[24..32]);
        assert_eq!(elf[64 + 16..64 + 32], whole[64 + 16..64 + 32]);
        assert_eq!(elf[64 + 40..64 + 48], whole[64 + 40..64 + 48]);
    })
    .unwrap();
}

#[test]
fn a_kernel_without_a_note_for_pvh_is_not_given_to_qemu_as_elf() {
    let image = bzimage_with(&vmlinux(b"code", false));
    install(&image, |kernel| {
        assert!(kernel.vmlinux().is_some() && !kernel.record().pvh);
        assert_eq!(kernel.for_qemu(), kernel.image());
    })
    .unwrap();
}

#[test]
fn a_payload_that_cannot_be_unpacked_leaves_the_bzimage() {
    let mut cut = gzip(&vmlinux(b"code", true));
    cut.truncate(cut.len() / 2);
    let mut lz4 = lz4(&vmlinux(b"code", true));
    lz4[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut outside = bzimage_with(b"");
    outside[0x248..0x250].fill(0xff);
    let mut old = bzimage_with(&vmlinux(b"code", true));
    old[0x206..0x208].copy_from_slice(&0x0207_u16.to_le_bytes());
    for (case, image) in [
        ("cut", bzimage_with(&cut)),
        ("lz4", bzimage_with(&lz4)),
        ("no kernel", bzimage_with(b"\x7fELF and nothing more")),
        ("outside", outside),
        ("old", old),
    ] {
        install(&image, |kernel| {
            assert_eq!(kernel.vmlinux(), None, "{case}");
            assert_eq!(kernel.for_qemu(), kernel.image(), "{case}");
        })
        .unwrap_or_else(|error| panic!("{case}: {error}"));
    }
}

/// An arm64 Image that greets.
fn arm64() -> Vec<u8> {
    let mut image = vec![0; 256];
    image[56..60].copy_from_slice(b"ARM\x64");
    image.extend_from_slice(b"Linux version %s (%s)\0Linux version 6.12.3-arm64 (someone)\0");
    image
}

#[test]
fn an_image_of_arm64_is_kept_uncompressed() {
    let plain = arm64();
    let packed = gzip(&plain);
    let mut zboot = b"MZ\0\0zimg".to_vec();
    zboot.extend_from_slice(&0x200_u32.to_le_bytes());
    zboot.extend_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
    zboot.resize(0x200, 0);
    zboot.extend_from_slice(&packed);
    zboot.extend_from_slice(b"more");
    for (case, file) in [("plain", plain.clone()), ("gzip", packed), ("zboot", zboot)] {
        install(&file, |kernel| {
            assert_eq!((kernel.version(), kernel.arch()), ("6.12.3-arm64", Arch::Aarch64), "{case}");
            assert_eq!((kernel.record().form, kernel.vmlinux()), (Form::Image, None), "{case}");
            assert_eq!(std::fs::read(kernel.for_qemu()).unwrap(), plain, "{case}");
        })
        .unwrap();
    }
}

#[test]
fn what_is_no_kernel_is_refused() {
    let mut nameless = vmlinux(b"Linux version %s", true);
    nameless.retain(|&byte| byte != b'%');
    let mut too_far = vmlinux(b"Linux version 6.1", true);
    too_far[64 + 8..64 + 16].fill(0x7f);
    let mut for_arm = vmlinux(b"Linux version 6.1", true);
    for_arm[18] = 40;
    let mut zboot = b"MZ\0\0zimg".to_vec();
    zboot.extend_from_slice(&[0xff; 100]);
    let cases: [(&str, Vec<u8>); 8] = [
        ("neither a bzImage", Vec::new()),
        ("neither a bzImage", b"#!/bin/sh\n".to_vec()),
        ("neither a bzImage", zboot),
        ("neither a bzImage", gzip(b"a text")),
        ("it has no version", nameless),
        ("it has no version", support::bzimage("")),
        ("a segment lies outside of it", too_far),
        ("it is no program for x86-64", for_arm),
    ];
    for (expected, file) in cases {
        match install(&file, |kernel| panic!("{expected}: installed as {kernel:?}")) {
            Err(BootError::NotAKernel { reason, .. }) => {
                assert!(reason.contains(expected), "{expected}: {reason}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn a_kernel_that_carries_its_configuration_is_checked_by_it() {
    let mut code = b"Linux version 6.6.6 (someone)".to_vec();
    code.extend_from_slice(b"IKCFG_ST is named in its code, too\0IKCFG_ST");
    code.extend_from_slice(&gzip(b"CONFIG_EROFS_FS=y\nCONFIG_EXT4_FS=m\n"));
    code.extend_from_slice(b"IKCFG_ED");
    match install(&vmlinux(&code, true), |kernel| panic!("installed as {kernel:?}")) {
        Err(BootError::Lacks { missing, .. }) => {
            let has = |name: &str| missing.iter().any(|missing| missing.module == name);
            assert!(has("ext4") && has("overlay") && !has("erofs"), "{missing:?}");
        }
        other => panic!("{other:?}"),
    }
}
