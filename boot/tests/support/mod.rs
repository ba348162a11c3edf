//! Small made-up kernels, modules and packages.

#![allow(dead_code, reason = "each test program uses a part")]

use std::path::{Path, PathBuf};

/// The version of the made-up kernel.
pub(crate) const VERSION: &str = "6.1.0-test";

/// A `bzImage` with a setup header and no code.
pub(crate) fn bzimage(version: &str) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[0x1f1] = 4;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    image[0x20e..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
    let text = format!("{version} (builder@test) #1 SMP\0");
    image[0x500..0x500 + text.len()].copy_from_slice(text.as_bytes());
    image
}

/// A relocatable ELF file for x86-64 with nothing but `.modinfo`.
pub(crate) fn module(info: &[&str]) -> Vec<u8> {
    const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
    let mut modinfo = Vec::new();
    for line in info.iter().copied().map(str::to_owned).chain([format!("vermagic={VERSION} SMP mod_unload ")])
    {
        modinfo.extend_from_slice(line.as_bytes());
        modinfo.push(0);
    }
    let names_at = 64 + modinfo.len();
    let sections_at = (names_at + NAMES.len()).next_multiple_of(8);
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&1_u16.to_le_bytes()); // relocatable
    elf.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1_u32.to_le_bytes());
    for value in [0_u64, 0, sections_at as u64] {
        elf.extend_from_slice(&value.to_le_bytes()); // entry, program headers, section headers
    }
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for value in [64_u16, 0, 0, 64, 3, 2] {
        elf.extend_from_slice(&value.to_le_bytes());
    }
    elf.extend_from_slice(&modinfo);
    elf.extend_from_slice(NAMES);
    elf.resize(sections_at, 0);
    elf.resize(sections_at + 64, 0); // the first section is none
    for (name, kind, offset, size) in [(1_u32, 1_u32, 64, modinfo.len()), (10, 3, names_at, NAMES.len())] {
        elf.extend_from_slice(&name.to_le_bytes());
        elf.extend_from_slice(&kind.to_le_bytes());
        for value in [0, 0, offset as u64, size as u64] {
            elf.extend_from_slice(&value.to_le_bytes()); // flags, address, offset, size
        }
        elf.extend_from_slice(&[0; 8]); // link, info
        for value in [1_u64, 0] {
            elf.extend_from_slice(&value.to_le_bytes()); // alignment, size of entries
        }
    }
    elf
}

/// What every machine needs, as modules in a made-up kernel; `9p` needs two more, `ext4` wishes for a checksum.
pub(crate) fn modules() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("kernel/drivers/virtio/virtio.ko", module(&["name=virtio", "depends="])),
        ("kernel/drivers/virtio/virtio_ring.ko", module(&["name=virtio_ring", "depends="])),
        ("kernel/drivers/virtio/virtio_mmio.ko", module(&["name=virtio_mmio", "depends=virtio_ring,virtio"])),
        ("kernel/drivers/virtio/virtio_pci.ko", module(&["name=virtio_pci", "depends=virtio_ring,virtio"])),
        ("kernel/drivers/virtio/virtio_balloon.ko", module(&["name=virtio_balloon", "depends=virtio"])),
        ("kernel/drivers/char/virtio_console.ko", module(&["name=virtio_console", "depends=virtio"])),
        ("kernel/drivers/char/hw_random/virtio-rng.ko", module(&["name=virtio_rng", "depends=virtio"])),
        ("kernel/drivers/block/virtio_blk.ko", module(&["name=virtio_blk", "depends=virtio"])),
        ("kernel/net/vmw_vsock_virtio_transport.ko", module(&["depends=vsock"])),
        ("kernel/net/vsock.ko", module(&["depends="])),
        ("kernel/fs/erofs.ko", module(&["depends=", "alias=fs-erofs"])),
        ("kernel/fs/ext4.ko", module(&["depends=", "softdep=pre: crc32c post: other"])),
        ("kernel/crypto/crc32c_generic.ko", module(&["depends=", "alias=crc32c"])),
        ("kernel/fs/overlay.ko", module(&["depends="])),
        ("kernel/fs/9p.ko", module(&["depends=9pnet,netfs"])),
        ("kernel/net/9pnet.ko", module(&["depends="])),
        ("kernel/net/9pnet_fd.ko", module(&["depends=9pnet"])),
        (
            "kernel/drivers/net/tun.ko",
            module(&["depends=", "alias=devname:net/tun", "alias=char-major-10-200"]),
        ),
        ("kernel/net/bridge.ko", module(&["depends=stp,llc", "alias=rtnl-link-bridge"])),
        ("kernel/net/stp.ko", module(&["depends=llc"])),
        ("kernel/net/llc.ko", module(&["depends="])),
        ("kernel/drivers/gpu/unwanted.ko", module(&["depends="])),
    ]
}

/// What is built into it.
pub(crate) const BUILTIN: &str = "kernel/fs/fuse/fuse.ko\nkernel/fs/netfs/netfs.ko\n";

/// The files of a package of the made-up kernel.
pub(crate) fn package_files() -> Vec<(String, Vec<u8>)> {
    let mut files = vec![
        (format!("./boot/vmlinuz-{VERSION}"), bzimage(VERSION)),
        (format!("./boot/config-{VERSION}"), b"CONFIG_FUSE_FS=y\n".to_vec()),
        (format!("./lib/modules/{VERSION}/modules.builtin"), BUILTIN.as_bytes().to_vec()),
        ("./usr/share/doc/copyright".into(), b"none".to_vec()),
    ];
    files.extend(
        modules().into_iter().map(|(path, content)| (format!("./lib/modules/{VERSION}/{path}"), content)),
    );
    files
}

/// A tar of regular files.
pub(crate) fn tar(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// An `ar` archive of `members`.
pub(crate) fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = b"!<arch>\n".to_vec();
    for (name, content) in members {
        let header = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, "100644", content.len());
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(2), b'\n');
    }
    archive
}

/// A package with `data` as its compressed tar, in `directory`.
pub(crate) fn deb(directory: &Path, data_name: &str, data: &[u8]) -> PathBuf {
    let path = directory.join("linux-image.deb");
    let members = [("debian-binary", &b"2.0\n"[..]), ("control.tar.gz", b"odd"), (data_name, data)];
    std::fs::write(&path, ar(&members)).unwrap();
    path
}

/// The files of a package as a tree in `directory`.
pub(crate) fn unpack(directory: &Path, files: &[(String, Vec<u8>)]) {
    for (path, content) in files {
        let path = directory.join(path.trim_start_matches("./"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

/// A member of a newc archive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) mode: u32,
    pub(crate) device: (u32, u32),
    pub(crate) content: Vec<u8>,
}

/// Reads a newc archive by its description in the kernel's documentation, not by the code under test.
pub(crate) fn read_cpio(mut archive: &[u8]) -> Vec<Member> {
    let mut members = Vec::new();
    loop {
        assert_eq!(&archive[..6], b"070701");
        let field = |index: usize| {
            let digits = std::str::from_utf8(&archive[6 + 8 * index..14 + 8 * index]).unwrap();
            u32::from_str_radix(digits, 16).unwrap()
        };
        let (name_length, length) = (field(11) as usize, field(6) as usize);
        let name = std::str::from_utf8(&archive[110..110 + name_length - 1]).unwrap().to_owned();
        let begin = (110 + name_length).next_multiple_of(4);
        if name == "TRAILER!!!" {
            return members;
        }
        let content = archive[begin..begin + length].to_vec();
        members.push(Member { name, mode: field(1), device: (field(9), field(10)), content });
        archive = &archive[(begin + length).next_multiple_of(4)..];
    }
}

/// An uncompressed kernel: one segment of `code` and zeros behind it, a note inside of it that tells PVH's entry, and
/// something behind that is in no segment.
pub(crate) fn vmlinux(code: &[u8], pvh: bool) -> Vec<u8> {
    const AT: usize = 0x2000;
    let kind: u32 = if pvh { 18 } else { 6 };
    let mut note = Vec::new();
    for value in [4_u32, 4, kind] {
        note.extend_from_slice(&value.to_le_bytes()); // length of name, length of description, type
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&0x0100_0000_u32.to_le_bytes());
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2_u16.to_le_bytes()); // executable
    elf.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1_u32.to_le_bytes());
    for value in [0x0100_0000_u64, 64, 0] {
        elf.extend_from_slice(&value.to_le_bytes()); // entry, program headers, section headers
    }
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for value in [64_u16, 56, 2, 64, 0, 0] {
        elf.extend_from_slice(&value.to_le_bytes());
    }
    let mut segment = note.clone();
    segment.extend_from_slice(code);
    let zeros = 0x5000;
    for (kind, align, size) in [(1_u32, 0x20_0000_u64, segment.len() + zeros), (4, 4, note.len())] {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&7_u32.to_le_bytes());
        for value in [AT as u64, 0xffff_ffff_8100_0000, 0x0100_0000, size as u64, size as u64, align] {
            elf.extend_from_slice(&value.to_le_bytes());
        }
    }
    elf.resize(AT, 0);
    elf.extend_from_slice(&segment);
    elf.resize(elf.len() + zeros, 0);
    elf.extend_from_slice(b"symbols and the like");
    elf
}

/// A `bzImage` whose payload is `payload`, at a place where the setup header says that it is.
pub(crate) fn bzimage_with(payload: &[u8]) -> Vec<u8> {
    let mut image = bzimage(VERSION);
    image[0x248..0x24c].copy_from_slice(&0x800_u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    image.resize(5 * 512 + 0x800, 0);
    image.extend_from_slice(payload);
    image.extend_from_slice(b"what follows");
    image
}
