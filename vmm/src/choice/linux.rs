//! Which hypervisor runs a machine.

use kiln_contract::{BackendError, Driver, Hypervisor};

use crate::{Firecracker, Qemu};

/// The hypervisor that is asked for; QEMU, which works everywhere, if none is.
///
/// # Errors
/// It is not installed, or this host cannot run it: with what to do.
pub fn open(wanted: Option<Driver>) -> Result<Box<dyn Hypervisor>, BackendError> {
    Ok(match wanted.unwrap_or_default() {
        Driver::Qemu => Box::new(Qemu::find()?),
        Driver::Firecracker => Box::new(Firecracker::find()?),
    })
}
