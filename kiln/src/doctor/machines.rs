//! What machines need: a hypervisor, what executes their instructions, a kernel, disks.

use kiln_boot::Kernels;
use kiln_contract::{BackendError, Home};
use kiln_vmm::{Accelerator, Firecracker, Qemu, VmmError};

use super::Finding;

pub(super) fn examine(home: &Home) -> Vec<Finding> {
    let mut findings = vec![hypervisor(), firecracker(), accelerator(), kernel(home)];
    findings.extend(kiln_disk::doctor(home).into_iter().map(|(what, well, why)| {
        let what = format!("machines: {what}");
        if well {
            Finding::ok(what, why)
        } else {
            Finding::warn(what, why, "another back end keeps the disks")
        }
    }));
    findings
}

fn hypervisor() -> Finding {
    match Qemu::find() {
        Ok(qemu) => Finding::ok("machines: QEMU", qemu.program().display().to_string()),
        Err(error) => {
            let error = BackendError::from(error);
            Finding::warn("machines: QEMU", error.to_string(), error.hint_text().unwrap_or("install QEMU"))
        }
    }
}

/// Nobody needs it, so that it is not there is well.
fn firecracker() -> Finding {
    let what = "machines: Firecracker";
    match Firecracker::find() {
        Ok(found) => Finding::ok(
            what,
            format!("{} {}, with --hypervisor firecracker", found.program().display(), found.version()),
        ),
        Err(VmmError::NoKvm { because, .. }) => Finding::ok(what, format!("not used: {because}")),
        Err(VmmError::Missing { .. }) => Finding::ok(what, "not used: it is not installed"),
        Err(error) => Finding::warn(what, error.to_string(), "machines run with QEMU"),
    }
}

fn accelerator() -> Finding {
    let what = "machines: accelerator";
    match Accelerator::choose() {
        chosen @ Accelerator::Kvm => Finding::ok(what, chosen.to_string()),
        chosen @ Accelerator::Tcg { .. } => Finding::warn(
            what,
            chosen.to_string(),
            "machines work, and what they compute takes some ten times as long; after a start one is kept ready for the next \
             (`kiln template ls`), unless KILN_SPARE=off says otherwise",
        ),
    }
}

fn kernel(home: &Home) -> Finding {
    match Kernels::open(home).default() {
        Ok(kernel) => Finding::ok("machines: kernel", kernel.name()),
        Err(error) => {
            Finding::warn("machines: kernel", error.to_string(), "`kiln kernel install` installs one")
        }
    }
}
