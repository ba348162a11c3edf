//! What happens in the machine: modules, a pool in a file, and the tests on it; first as the kernel alone shows devices,
//! then with udev, which makes links to them, and looks into every new one.
#![allow(clippy::print_stdout, reason = "standard output is where the host listens")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use kiln_contract::{DiskBackend, DiskId, Home, SnapshotName};
use kiln_disk::{Choice, open};

use super::{crash, table};

/// Where the program is in the machine.
pub(crate) const PROGRAM: &str = "/test-of-disks";
/// In its environment there.
pub(crate) const INSIDE: &str = "KILN_TEST_IN_MACHINE=1";

pub(crate) const GIB: u64 = 1 << 30;
pub(crate) const MIB: u64 = 1 << 20;

/// Runs the tests if this is the machine.
pub(crate) fn main() -> Option<ExitCode> {
    if let Some(dataset) = std::env::var_os("KILN_TEST_WORK") {
        crash::work(&Bed::of(dataset.to_str()?));
    }
    std::env::var_os(INSIDE.split_once('=')?.0)?;
    // An emulator translates a program once for each place that it is loaded to.
    fs::write("/proc/sys/kernel/randomize_va_space", "0").unwrap();
    load_modules(Path::new("/modules"));
    let pool = Path::new("/var/pool");
    File::create(pool).unwrap().set_len(4 * GIB).unwrap();
    run("zpool", &["create", "-m", "none", "tank", pool.to_str()?]);
    let mut whole = true;
    for (index, (name, test)) in table::TESTS.iter().chain(table::WITH_UDEV).enumerate() {
        if index == table::TESTS.len() {
            start_udev();
        }
        let dataset = format!("tank/test{index}");
        run("zfs", &["create", "-o", "canmount=off", &dataset]);
        let bed = Bed::of(&dataset);
        let begun = Instant::now();
        let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&bed))).is_ok();
        println!("{}: {name} ({} ms)", if passed { "passed" } else { "FAILED" }, begun.elapsed().as_millis());
        if !passed {
            println!(
                "{}",
                run("zfs", &["list", "-r", "-t", "all", "-o", "name,used,clones,kiln:disk", &dataset])
            );
        }
        whole &= passed;
    }
    Some(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Loads them in whatever order their dependencies allow.
fn load_modules(directory: &Path) {
    let mut waiting: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    while !waiting.is_empty() {
        let before = waiting.len();
        waiting.retain(|module| {
            let file = File::open(module).unwrap();
            rustix::system::finit_module(&file, c"", 0).is_err()
        });
        assert!(waiting.len() < before, "not loaded: {waiting:?}");
    }
}

fn start_udev() {
    run("/usr/lib/systemd/systemd-udevd", &["--daemon"]);
    run("udevadm", &["trigger"]);
    run("udevadm", &["settle"]);
}

/// Runs a program to its end and gives what it said.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} {arguments:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{said}{errors}", output.status);
    said
}

/// A dataset, and the disks in it.
pub(crate) struct Bed {
    pub(crate) dataset: String,
    home: Home,
    pub(crate) disks: Box<dyn DiskBackend>,
}

impl Bed {
    pub(crate) fn of(dataset: &str) -> Self {
        let home = Home::at(Path::new("/var/kiln").join(dataset));
        let disks = open(&home, &Choice::Zfs { dataset: dataset.to_owned() }).unwrap().backend;
        Self { dataset: dataset.to_owned(), home, disks }
    }

    /// The disks as another process would open them.
    pub(crate) fn again(&self) -> Self {
        Self::of(&self.dataset)
    }

    pub(crate) fn in_tmp(&self) -> usize {
        fs::read_dir(self.home.disks().join(".tmp")).unwrap().count()
    }

    /// A disk of 64 MiB with one MiB of noise in it.
    pub(crate) fn with_disk(&self, name: &str, seed: u64) -> DiskId {
        let id = disk(name);
        self.disks.create(&id, 64 * MIB).unwrap();
        self.scribble(&id, 8 * MIB, seed);
        id
    }

    pub(crate) fn scribble(&self, id: &DiskId, at: u64, seed: u64) {
        let file = File::options().write(true).open(self.disks.path(id).unwrap()).unwrap();
        file.write_all_at(&content(seed), at).unwrap();
        file.sync_all().unwrap();
    }

    /// Whether what was scribbled is there.
    pub(crate) fn has(&self, id: &DiskId, at: u64, seed: u64) -> bool {
        self.has_all(id, &[(at, seed)])
    }

    /// The same for several places.
    pub(crate) fn has_all(&self, id: &DiskId, scribbled: &[(u64, u64)]) -> bool {
        let device = File::open(self.disks.path(id).unwrap()).unwrap();
        scribbled.iter().all(|(at, seed)| {
            let mut bytes = vec![0; MIB as usize];
            device.read_exact_at(&mut bytes, *at).unwrap();
            bytes == content(*seed)
        })
    }

    /// The names below the dataset.
    pub(crate) fn names(&self) -> Vec<String> {
        let listed = run("zfs", &["list", "-H", "-r", "-t", "all", "-o", "name", &self.dataset]);
        let names = listed.lines().filter_map(|name| name.strip_prefix(&self.dataset)?.strip_prefix('/'));
        names.map(str::to_owned).collect()
    }

    /// What ZFS charges to all of it, in bytes, when all that was written is.
    pub(crate) fn used(&self) -> u64 {
        run("zpool", &["sync", "tank"]);
        let used = run("zfs", &["get", "-H", "-p", "-o", "value", "usedbychildren", &self.dataset]);
        used.trim().parse().unwrap()
    }

    /// Nothing of ours is left, at the latest when whoever looked into a device has ended.
    pub(crate) fn is_empty(&self) {
        assert_eq!(self.disks.list().unwrap(), []);
        let begun = Instant::now();
        while !self.names().is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(20), "left: {:?}", self.names());
            std::thread::sleep(Duration::from_millis(100));
            let _ = self.again();
        }
    }
}

/// One MiB. Nothing compresses it, in a pool that is made as this one is, and an emulated processor makes it quickly.
fn content(seed: u64) -> Vec<u8> {
    kiln_fixtures::noise(16 << 10, seed).repeat(64)
}

pub(crate) fn disk(name: &str) -> DiskId {
    name.parse().unwrap()
}

pub(crate) fn snapshot(name: &str) -> SnapshotName {
    name.parse().unwrap()
}
