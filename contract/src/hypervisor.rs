//! Drivers of virtual machines.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::{BackendError, Capabilities};

/// The hardware of a machine. The same devices for every machine, so that one template fits every image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// Where the driver may put sockets and logs.
    pub directory: PathBuf,
    /// Virtual CPUs, at least 1.
    pub cpus: u32,
    /// Memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// The kernel to boot.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initramfs: PathBuf,
    /// The kernel's command line.
    pub command_line: String,
    /// The read-only image disk.
    pub image: PathBuf,
    /// The writable disk.
    pub disk: PathBuf,
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

/// A hypervisor that can make machines on this host.
pub trait Hypervisor: Send + Sync {
    /// The driver's name: `qemu`, `firecracker`, `vz`.
    fn name(&self) -> &'static str;
    /// What it can do here.
    fn capabilities(&self) -> Capabilities;
    /// Makes a machine; it does not run yet.
    fn create(&self, config: &VmConfig) -> Result<Box<dyn Vm>, BackendError>;
    /// Makes a machine from a state that [`Vm::save`] wrote; it is paused.
    fn restore(&self, _config: &VmConfig, _state: &Path) -> Result<Box<dyn Vm>, BackendError> {
        Err(BackendError::unsupported(format!("{} cannot restore machines", self.name())))
    }
}

/// One virtual machine.
pub trait Vm: Send {
    /// Starts it.
    fn start(&mut self) -> Result<(), BackendError>;
    /// Asks the guest to power off, as a power button does.
    fn stop(&mut self) -> Result<(), BackendError>;
    /// Ends it at once.
    fn kill(&mut self) -> Result<(), BackendError>;
    /// Stops executing.
    fn pause(&mut self) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor cannot pause machines"))
    }
    /// Goes on executing.
    fn resume(&mut self) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor cannot resume machines"))
    }
    /// Writes the state of devices and memory of a paused machine below `directory`.
    fn save(&mut self, _directory: &Path) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor cannot save machines"))
    }
    /// What it is doing.
    fn state(&self) -> Result<VmState, BackendError>;
    /// The byte stream to the guest's agent.
    fn link(&mut self) -> Result<OwnedFd, BackendError>;
    /// Asks the guest to leave it `bytes` of memory.
    fn balloon(&mut self, _bytes: u64) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this hypervisor has no balloon"))
    }
}
