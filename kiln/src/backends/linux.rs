//! On Linux, instances are containers or machines.

use kiln_container::{ContainerKind, Containers};
use kiln_contract::{BackendError, Digest, Home, RuntimeBackend};
use kiln_instance::Kinds;
use kiln_machine::MachineKind;
use kiln_view::views::Views;

/// What instances of a home may be.
pub(crate) const KINDS: Kinds = &[&ContainerKind, &MachineKind];

/// The containers of a home. Nothing is read or made by this.
pub(super) fn containers(home: &Home) -> Result<Box<dyn RuntimeBackend>, BackendError> {
    Ok(Box::new(Containers::open(home)?))
}

/// Enters the user namespace of an unprivileged user: no thread may run yet.
pub(crate) fn prepare() -> Result<(), BackendError> {
    kiln_container::prepare()
}

/// The images and layers that views of a home show.
pub(crate) fn in_views(home: &Home) -> Result<Vec<Digest>, BackendError> {
    let views = Views::open(home).list()?.into_iter();
    Ok(views
        .flat_map(|record| [vec![record.image], record.base.into_iter().collect(), record.layers].concat())
        .collect())
}
