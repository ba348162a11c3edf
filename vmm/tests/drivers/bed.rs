//! What the tests of one driver share: a kernel, a guest, a machine that was saved when its guest was ready.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as Blocking;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use kiln_boot::{Kernels, Source};
use kiln_contract::{BootConfig, Home, Hypervisor, MemoryKind, Silent, Vm, VmConfig};
use kiln_link::message::{self, Answer, Request};
use kiln_link::{HostLink, HostSession, service};
use kiln_vmm::{Accelerator, Firecracker, Qemu};
use tokio::net::UnixStream;

/// Memory of a machine. Software emulation is slow, so it is little.
pub(crate) const MEMORY: u64 = 192 << 20;
/// How long a guest may take to boot.
const TO_BOOT: Duration = Duration::from_secs(180);
/// How long a guest that runs may take to answer.
const TO_ANSWER: Duration = Duration::from_secs(30);

/// A driver under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driver {
    Qemu(Board, By),
    Firecracker,
    /// Firecracker's driver over a stand-in for Firecracker.
    Fake,
}

/// QEMU's machines: one for each architecture of hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Board {
    Microvm,
    Virt,
}

/// What executes the instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    Kvm,
    Tcg,
}

impl Driver {
    pub(crate) const ALL: [Self; 6] = [
        Self::Qemu(Board::Microvm, By::Kvm),
        Self::Qemu(Board::Microvm, By::Tcg),
        Self::Qemu(Board::Virt, By::Kvm),
        Self::Qemu(Board::Virt, By::Tcg),
        Self::Firecracker,
        Self::Fake,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qemu(Board::Microvm, By::Kvm) => "qemu, microvm by KVM",
            Self::Qemu(Board::Microvm, By::Tcg) => "qemu, microvm by TCG",
            Self::Qemu(Board::Virt, By::Kvm) => "qemu, virt by KVM",
            Self::Qemu(Board::Virt, By::Tcg) => "qemu, virt by TCG",
            Self::Firecracker => "firecracker",
            Self::Fake => "firecracker's documented API",
        }
    }

    /// What keeps it from being run, if it is nothing that could be installed.
    pub(crate) fn missing(self) -> Option<String> {
        match self {
            Self::Qemu(board, by) => board.missing().or_else(|| by.missing()),
            Self::Firecracker => Firecracker::find().err().map(|error| error.to_string()),
            Self::Fake => None,
        }
    }

    fn open(self) -> Option<Box<dyn Hypervisor>> {
        match self {
            Self::Qemu(board, _) => {
                kiln_fixtures::require(board.program())?;
                Some(Box::new(Qemu::find().unwrap()))
            }
            Self::Firecracker => Some(Box::new(Firecracker::find().unwrap())),
            Self::Fake => Some(Box::new(Firecracker::at(std::env::current_exe().unwrap()).unwrap())),
        }
    }
}

impl Board {
    fn program(self) -> &'static str {
        match self {
            Self::Microvm => "qemu-system-x86_64",
            Self::Virt => "qemu-system-aarch64",
        }
    }

    fn missing(self) -> Option<String> {
        let (host, board) =
            (std::env::consts::ARCH, if self == Self::Microvm { "x86_64" } else { "aarch64" });
        (host != board).then(|| format!("its host is {board}, and this one is {host}"))
    }
}

impl By {
    fn missing(self) -> Option<String> {
        match (self, Accelerator::choose()) {
            (Self::Kvm, Accelerator::Tcg { because }) => Some(because),
            (Self::Tcg, Accelerator::Kvm) => Some("this host has KVM, and KVM is chosen".to_owned()),
            _ => None,
        }
    }
}

/// What one driver's tests share.
pub(crate) struct Bed {
    pub(crate) hypervisor: Box<dyn Hypervisor>,
    directory: tempfile::TempDir,
    boot: BootConfig,
    count: AtomicU32,
}

/// The bed of a driver, made once; `None` after a skip.
pub(crate) fn of(driver: Driver) -> Option<&'static Bed> {
    // At most one of QEMU's is run on a host.
    static QEMU: OnceLock<Option<Bed>> = OnceLock::new();
    static FIRECRACKER: LazyLock<Option<Bed>> = LazyLock::new(|| Bed::make(Driver::Firecracker));
    static FAKE: LazyLock<Option<Bed>> = LazyLock::new(|| Bed::make(Driver::Fake));
    match driver {
        Driver::Qemu(..) => QEMU.get_or_init(|| Bed::make(driver)),
        Driver::Firecracker => &FIRECRACKER,
        Driver::Fake => &FAKE,
    }
    .as_ref()
}

impl Bed {
    fn make(driver: Driver) -> Option<Self> {
        let hypervisor = driver.open()?;
        let directory = tempfile::tempdir().unwrap();
        kiln_fixtures::at_the_end("rm -rf \"$1\"", &[directory.path().as_os_str()]);
        let boot = boot(driver, directory.path())?;
        let bed = Self { hypervisor, directory, boot, count: AtomicU32::new(0) };
        bed.save_template();
        Some(bed)
    }

    /// Where the saved machine is.
    pub(crate) fn template(&self) -> PathBuf {
        self.directory.path().join("template")
    }

    fn save_template(&self) {
        let directory = self.template();
        let config = self.config_in(&directory, true);
        let mut vm = self.hypervisor.create(&config).unwrap();
        let link = vm.link().unwrap();
        vm.resume().unwrap();
        run(async { greet(link).await });
        vm.pause().unwrap();
        vm.save(&directory).unwrap();
        drop(vm);
        assert!(fs::metadata(directory.join("memory")).unwrap().len() >= MEMORY);
    }

    /// A machine of its own: one that boots, or one that is restored over the template's memory.
    pub(crate) fn config(&self, boots: bool) -> VmConfig {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        self.config_in(&self.directory.path().join(format!("machine-{number}")), boots)
    }

    fn config_in(&self, directory: &Path, boots: bool) -> VmConfig {
        fs::create_dir(directory).unwrap();
        let sparse = |name: &str, size: u64| {
            let path = directory.join(name);
            File::create(&path).unwrap().set_len(size).unwrap();
            path
        };
        VmConfig {
            directory: directory.to_owned(),
            cpus: 1,
            memory: MEMORY,
            memory_file: if boots { sparse("memory", MEMORY) } else { self.template().join("memory") },
            memory_kind: if boots { MemoryKind::Written } else { MemoryKind::CopyOnWrite },
            boot: boots.then(|| self.boot.clone()),
            image: sparse("image", 64 << 20),
            disk: sparse("disk", 64 << 20),
            network: None,
        }
    }

    /// A machine that was restored from the template, and its link, on which nothing was said yet.
    pub(crate) fn restored(&self) -> (Box<dyn Vm>, OwnedFd) {
        let mut vm = self.hypervisor.restore(&self.config(false), &self.template()).unwrap();
        let link = vm.link().unwrap();
        (vm, link)
    }
}

/// What is booted: a kernel of Debian's and the guest; or, where nothing is executed, files that look like them.
fn boot(driver: Driver, directory: &Path) -> Option<BootConfig> {
    let initramfs = directory.join("initramfs");
    let command_line = "quiet loglevel=3 random.trust_cpu=on cgroup_no_v1=all".to_owned();
    if driver == Driver::Fake {
        let (kernel, vmlinux) = (directory.join("kernel"), directory.join("vmlinux"));
        fs::write(&kernel, [0; 1024]).unwrap();
        fs::write(&vmlinux, b"\x7fELF\x02").unwrap();
        fs::write(&initramfs, "070701").unwrap();
        return Some(BootConfig { kernel, vmlinux: Some(vmlinux), initramfs, command_line });
    }
    let package = kiln_fixtures::debian_kernel()?;
    let home = Home::at(directory.join("home"));
    let kernel = Kernels::open(&home).install(&Source::Packages(vec![package]), None, &Silent).unwrap();
    let guest = fs::read(kiln_fixtures::guest()).unwrap();
    fs::write(&initramfs, kiln_boot::initramfs(&kernel, &guest).unwrap()).unwrap();
    Some(BootConfig { kernel: kernel.image(), vmlinux: kernel.vmlinux(), initramfs, command_line })
}

pub(crate) fn run<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let output = runtime.block_on(future);
    runtime.shutdown_background();
    output
}

pub(crate) fn stream(link: OwnedFd) -> UnixStream {
    let stream = Blocking::from(link);
    stream.set_nonblocking(true).unwrap();
    UnixStream::from_std(stream).unwrap()
}

/// Waits for a guest that boots.
pub(crate) async fn greet(link: OwnedFd) -> HostLink<UnixStream> {
    let greeted = tokio::time::timeout(TO_BOOT, HostLink::greet(stream(link))).await;
    let link = greeted.expect("the guest says hello in time").unwrap();
    assert!(link.hello().is_some_and(|hello| !hello.kernel.is_empty()));
    link
}

/// Begins a life of a guest that is parked.
pub(crate) async fn begin(link: HostLink<UnixStream>) -> HostSession {
    tokio::time::timeout(TO_ANSWER, link.begin()).await.expect("the guest begins in time").unwrap()
}

/// A request and its answer, end to end.
pub(crate) async fn ask(session: &HostSession) -> Answer {
    let exchange = async {
        let mut stream = session.open(service::CONTROL).await.unwrap();
        message::send(&mut stream, &Request::Stats).await.unwrap();
        message::receive(&mut stream).await.unwrap().expect("an answer")
    };
    tokio::time::timeout(TO_ANSWER, exchange).await.expect("the guest answers in time")
}
