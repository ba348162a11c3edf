//! On macOS, instances are machines: containers share the kernel of a Linux host.

use kiln_contract::{BackendError, Digest, Home, RuntimeBackend};
use kiln_instance::Kinds;
use kiln_machine::{MachineKind, Machines};

/// What instances of a home may be.
pub(crate) const KINDS: Kinds = &[&MachineKind];

/// What stands for the containers of a home: its machines, which refuse what they are not.
pub(super) fn containers(home: &Home) -> Result<Box<dyn RuntimeBackend>, BackendError> {
    Ok(Box::new(Machines::open(home, KINDS, crate::progress::new(false).into())))
}

/// Files of every owner are the user's own here.
pub(crate) fn prepare() -> Result<(), BackendError> {
    Ok(())
}

/// The images and layers that views of a home show: views are made on Linux only.
pub(crate) fn in_views(_: &Home) -> Result<Vec<Digest>, BackendError> {
    Ok(Vec::new())
}
