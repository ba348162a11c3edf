//! OpenZFS for the kernel that tests boot: compiled once, and kept where their root filesystems are.

use crate::shell::Outcome;

/// `cargo xtask zfs`.
pub(crate) fn make() -> Outcome {
    kiln_fixtures::make_zfs().map(|made| eprintln!("OpenZFS is in {}", made.display()))
}

/// The same, where it can be had: elsewhere its tests are listed as not run.
pub(crate) fn make_if_possible() -> Outcome {
    if let Err(reason) = make() {
        eprintln!("disks are not tested on ZFS: {reason}");
    }
    Ok(())
}
