//! Drivers of hypervisors: one file each, behind [`kiln_contract::Hypervisor`].
//!
//! - [`Qemu`]: with KVM where it can run guests, with TCG (software) elsewhere, so that a machine works everywhere.
//! - [`Firecracker`]: where KVM can run guests.
//!
//! [`open`] gives the one that is asked for. Which [`Accelerator`] is taken, and why, is told by [`Accelerator::choose`].

#[cfg(target_os = "linux")]
mod accelerator;
#[cfg(target_os = "linux")]
mod child;
#[cfg_attr(target_os = "linux", path = "choice/linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "choice/macos.rs")]
mod choice;
mod error;
#[cfg(target_os = "linux")]
mod fingerprint;
#[cfg(target_os = "linux")]
mod firecracker;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod qemu;
#[cfg(target_os = "linux")]
mod qmp;

#[cfg(target_os = "linux")]
pub use accelerator::Accelerator;
pub use choice::open;
pub use error::VmmError;
#[cfg(target_os = "linux")]
pub use firecracker::Firecracker;
#[cfg(target_os = "linux")]
pub use qemu::Qemu;
