//! Which hypervisor runs a machine: there is no driver for this system yet.

use kiln_contract::{BackendError, Driver, Hypervisor};

/// The hypervisor that is asked for.
///
/// # Errors
/// Always: none of them runs here.
pub fn open(wanted: Option<Driver>) -> Result<Box<dyn Hypervisor>, BackendError> {
    let driver = wanted.unwrap_or_default();
    Err(BackendError::unsupported(format!("machines cannot be run here: {driver} is for Linux")))
}
