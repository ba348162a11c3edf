//! The template grows in a real machine: by the kernel of a distribution, under emulation, as a guest would do it.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::print_stderr, reason = "`--nocapture` shows how long growth took")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_contract::Home;
use kiln_disk::{Choice, open, usage_of};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a disk needs besides what kernels have built in. Those that a kernel has built in are not in its package.
const MODULES: &[&str] = &[
    "virtio",
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "crc16",
    "mbcache",
    "jbd2",
    "crc32c_generic",
    "ext4",
];

/// Runs `command` to its end and gives its standard output.
fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed ({}):\n{stdout}\n{stderr}", output.status);
    stdout
}

/// All files below `directory`.
fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => walk(&entry.path(), found),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
}

/// A cpio archive as the kernel unpacks it (`newc`, Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    entries: u32,
}

impl Archive {
    /// Adds what is at `from` as the executable file `path`, with the directories that lead there.
    fn file(&mut self, path: &str, from: &Path) {
        self.directory(Path::new(path).parent().unwrap());
        let content = fs::read(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        self.entry(path, 0o10_0755, &content);
    }

    fn directory(&mut self, path: &Path) {
        if path.parent().is_none() || !self.directories.insert(path.to_owned()) {
            return;
        }
        self.directory(path.parent().unwrap());
        self.entry(path.to_str().unwrap(), 0o4_0755, &[]);
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        let name = path.trim_start_matches('/');
        self.entries += 1;
        let numbers =
            [self.entries, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        let mut head = "070701".to_owned();
        numbers.iter().for_each(|number| write!(head, "{number:08x}").unwrap());
        self.bytes.extend(head.bytes().chain(name.bytes()).chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// An initramfs whose first process is the program of this test, with the libraries that it needs.
fn initramfs(modules: &Path) -> Vec<u8> {
    let mut archive = Archive::default();
    let guest = Path::new(env!("CARGO_BIN_EXE_kiln-disk-guest"));
    archive.file("/init", guest);
    let libraries = run(Command::new("ldd").arg(guest));
    for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        archive.file(path, Path::new(path));
    }
    for directory in ["/dev", "/proc", "/mnt", "/modules"] {
        archive.directory(Path::new(directory));
    }
    for module in fs::read_dir(modules).unwrap().map(Result::unwrap) {
        archive.file(&format!("/modules/{}", module.file_name().to_str().unwrap()), &module.path());
    }
    archive.finish()
}

/// The kernel of a package and the modules of it that are needed, as `vmlinuz` and `modules/`. Unpacked once: it takes longer than
/// the machine.
fn unpacked(package: &Path) -> PathBuf {
    let cache = kiln_fixtures::cache_directory();
    let target = cache.join(format!("disk-kernel-{}", fs::metadata(package).unwrap().len()));
    if target.exists() {
        return target;
    }
    let staging = tempfile::tempdir_in(cache).unwrap();
    let whole = staging.path().join("whole");
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&whole));
    let wanted = staging.path().join("wanted");
    fs::create_dir_all(wanted.join("modules")).unwrap();
    let mut files = Vec::new();
    walk(&whole, &mut files);
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        if name.strip_suffix(".ko").is_some_and(|name| MODULES.contains(&name)) {
            fs::rename(&file, wanted.join("modules").join(name)).unwrap();
        } else if name.starts_with("vmlinuz-") {
            fs::rename(&file, wanted.join("vmlinuz")).unwrap();
        }
    }
    // Another test may have been faster.
    let _ = fs::rename(&wanted, &target);
    assert!(target.join("vmlinuz").exists());
    target
}

/// Boots a machine that grows the disk at `disk` to each of `sizes`. Gives what it says of each: the sizes of the file system in
/// bytes and the number of its inodes.
fn grow_in_a_machine(disk: &Path, sizes: &[u64]) -> Option<Vec<(u64, u64)>> {
    let qemu = kiln_fixtures::require("qemu-system-x86_64")?;
    let package = kiln_fixtures::debian_kernel()?;
    let directory = tempfile::tempdir().unwrap();
    let kernel = unpacked(&package);
    let initrd = directory.path().join("initramfs");
    File::create(&initrd).unwrap().write_all(&initramfs(&kernel.join("modules"))).unwrap();

    let mut arguments = String::from("console=ttyS0 quiet panic=-1 --");
    sizes.iter().for_each(|size| write!(arguments, " {size}").unwrap());
    // Without `discard`, so that zeros which the guest writes take room as they would on a driver that knows no better.
    let drive = format!("file={},format=raw,if=virtio,discard=ignore,cache=unsafe", disk.display());
    let said = run(Command::new("timeout")
        .arg("300")
        .arg(qemu)
        .args(["-machine", "q35,accel=tcg", "-m", "384", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-append", &arguments, "-drive", &drive, "-kernel"])
        .arg(kernel.join("vmlinuz"))
        .arg("-initrd")
        .arg(initrd));
    let lines: Vec<&str> = said.lines().map(str::trim_end).collect();
    assert!(lines.contains(&"whole"), "{said}");
    let mut grown = Vec::new();
    for line in lines {
        let Some(numbers) = line.strip_prefix("grown ") else { continue };
        let numbers: Vec<u64> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
        eprintln!("to {} MiB in {} ms", numbers[0] / MIB, numbers[3] / 1000);
        grown.push((numbers[1], numbers[2]));
    }
    assert_eq!(grown.len(), sizes.len(), "{said}");
    Some(grown)
}

/// Grows a new disk of `size` bytes in steps, and checks it afterwards with the host's own program.
fn grow_and_check(size: u64, sizes: &[u64]) {
    let Some(e2fsck) = kiln_fixtures::require("e2fsck") else { return };
    let directory = tempfile::tempdir().unwrap();
    let disks = open(&Home::at(directory.path()), &Choice::Auto).unwrap().backend;
    let disk = disks.create(&"grown".parse().unwrap(), size).unwrap();
    let Some(grown) = grow_in_a_machine(&disk, sizes) else { return };
    for (wanted, (has, inodes)) in sizes.iter().zip(grown) {
        // Without what the file system needs for itself, and without a last group that would be too small for that.
        assert!(has <= *wanted && has + wanted / 50 + 150 * MIB >= *wanted, "{has} of {wanted}");
        let groups = wanted / (128 * MIB);
        assert!(inodes >= groups.max(1) * 8192 && inodes <= (groups + 1) * 8192, "{inodes} in {wanted}");
    }
    assert_eq!(fs::metadata(&disk).unwrap().size(), size);
    let checked = run(Command::new(e2fsck).arg("-fn").arg(&disk));
    assert!(checked.contains(" files ("), "{checked}");
    // The files, the journal as far as it was used, and some blocks for each 8 GiB; no tables of zeros.
    let taken = usage_of(&[&disk]).unwrap().taken;
    let most = 20 * MIB + 3 * MIB * sizes.len() as u64 + 10 * MIB * (size >> 40);
    assert!(taken < most, "{taken} bytes, and at most {most} were expected");
}

#[test]
fn a_disk_grows_online_over_every_kind_of_boundary_and_stays_whole() {
    let steps = [
        // In the first group, past it, and by one block.
        100 * MIB,
        GIB,
        // Up to the last group before the descriptors need another block, and across.
        8 * GIB - 128 * MIB,
        8 * GIB + 64 * MIB,
        16 * GIB + 4096,
        64 * GIB,
        // The same again.
        64 * GIB,
    ];
    grow_and_check(64 * GIB, &steps);
}

#[test]
fn a_disk_grows_online_to_two_tebibytes() {
    grow_and_check(2048 * GIB, &[64 * GIB, 2048 * GIB]);
}
