//! Drivers of virtual machines.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{BackendError, Capabilities};

/// A program that runs machines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// QEMU, with KVM or without.
    #[default]
    Qemu,
    /// Firecracker, with KVM.
    Firecracker,
}

impl Driver {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Qemu, Self::Firecracker];

    /// Its name, as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Driver {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|driver| driver.name() == name);
        found.ok_or_else(|| format!("there is no hypervisor `{name}`: qemu and firecracker are known"))
    }
}

/// The hardware of a machine. The same devices for every machine, so that one template fits every image; but for a network
/// device, which few have.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Where the driver may put sockets and logs.
    pub directory: PathBuf,
    /// Virtual CPUs, at least 1.
    pub cpus: u32,
    /// Memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// The file that memory is mapped from; of at least `memory` bytes.
    pub memory_file: PathBuf,
    /// What becomes of what the machine writes to its memory.
    pub memory_kind: MemoryKind,
    /// What to boot; `None` for a machine that is restored.
    pub boot: Option<BootConfig>,
    /// The read-only image disk.
    pub image: PathBuf,
    /// The writable disk.
    pub disk: PathBuf,
    /// The host's end of a network device: a TAP device that is open (`IFF_VNET_HDR`, without packet information). The guest's end
    /// has a hardware address of no meaning until the guest is told its own.
    pub network: Option<Arc<OwnedFd>>,
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootConfig {
    /// The kernel.
    pub kernel: PathBuf,
    /// The same kernel as an uncompressed ELF file, where there is one.
    pub vmlinux: Option<PathBuf>,
    /// The initial RAM file system.
    pub initramfs: PathBuf,
    /// Words for the kernel's command line, after those that the driver needs.
    pub command_line: String,
}

/// How a machine's memory relates to the file that it is mapped from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// The file is the memory: for a template that is being made.
    Written,
    /// What is written is the machine's own, the rest is shared with all that map the same file.
    CopyOnWrite,
}

/// What a virtual machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// Made, not started.
    Created,
    /// Executing.
    Running,
    /// Not executing, memory kept.
    Paused,
    /// Gone.
    Stopped,
}

/// A running machine on its way from one process to another, which is going to own it.
#[derive(Debug)]
pub struct VmHandle {
    /// The hypervisor's process.
    pub pid: u32,
    /// Where the machine's memory is in that process.
    pub memory_address: u64,
    /// What belongs to it, in an order that is the driver's own.
    pub descriptors: Vec<OwnedFd>,
}

impl VmHandle {
    /// How many descriptors there are, whatever the driver.
    pub const DESCRIPTORS: usize = 5;
}

/// A hypervisor that can make machines on this host.
pub trait Hypervisor: Send + Sync {
    /// The driver's name: `qemu`, `firecracker`, `vz`.
    fn name(&self) -> &'static str;
    /// All that a saved state depends on besides the configuration: the program's version, the accelerator, the processor.
    /// A state is restored only where this says the same.
    fn fingerprint(&self) -> String;
    /// What it can do here.
    fn capabilities(&self) -> Capabilities;
    /// Makes a machine that boots; it does not run yet. The machine ends with the calling thread.
    fn create(&self, config: &VmConfig) -> Result<Box<dyn Vm>, BackendError>;
    /// Makes a machine from what [`Vm::save`] wrote to the directory `saved`. It goes on as soon as it is restored, without
    /// being asked to: whoever waits for it hears from its guest. It ends with the calling thread.
    fn restore(&self, _config: &VmConfig, _saved: &Path) -> Result<Box<dyn Vm>, BackendError> {
        Err(BackendError::unsupported(format!("{} cannot restore machines", self.name())))
    }
    /// Whether each of its processes translates what its machine executes, and executes what it has translated already much
    /// faster: a machine that has done something before does it sooner.
    fn translates(&self) -> bool {
        false
    }
    /// Takes a machine over that another process gave up with [`Vm::hand_over`]. It ends with that process, which ends it when
    /// the connection `owner` to it is closed.
    fn adopt(
        &self,
        _config: &VmConfig,
        _handle: VmHandle,
        _owner: OwnedFd,
    ) -> Result<Box<dyn Vm>, BackendError> {
        Err(BackendError::unsupported(format!("{} cannot take machines over", self.name())))
    }
}

/// One virtual machine. Dropping it ends it.
pub trait Vm: Send {
    /// The process that it runs in, where it has one of its own.
    fn pid(&self) -> Option<u32>;
    /// Starts it, or lets it go on.
    fn resume(&mut self) -> Result<(), BackendError>;
    /// Ends it at once.
    fn kill(&mut self) -> Result<(), BackendError>;
    /// Stops executing.
    fn pause(&mut self) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor cannot pause machines"))
    }
    /// Writes what is needed to restore a paused machine to the directory `saved`: the state of its devices, and of a machine
    /// whose memory is [`MemoryKind::CopyOnWrite`] what it has written. Its disks are not saved, nor is the memory file.
    fn save(&mut self, _saved: &Path) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor cannot save machines"))
    }
    /// Why it ended, if it did and said so: what to tell when its guest is not heard any more.
    fn last_words(&mut self) -> Option<BackendError> {
        None
    }
    /// What it is doing.
    fn state(&mut self) -> Result<VmState, BackendError>;
    /// The byte stream to the guest's agent. There is one, given once.
    fn link(&mut self) -> Result<OwnedFd, BackendError>;
    /// The writable disk has another size now: tells the guest.
    fn disk_resized(&mut self, _bytes: u64) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor cannot resize disks of running machines"))
    }
    /// What another process needs to use this machine in place of this one, which keeps it only to end it. `link` is the
    /// machine's, of a guest that is parked.
    fn hand_over(&mut self, _link: OwnedFd) -> Result<VmHandle, BackendError> {
        Err(BackendError::unsupported("this hypervisor cannot hand machines over"))
    }
    /// Asks the guest to leave it `bytes` of memory.
    fn balloon(&mut self, _bytes: u64) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor has no balloon"))
    }
}
