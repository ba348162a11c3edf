//! What machines need: a hypervisor, what executes their instructions, a kernel, disks.

use kiln_boot::Kernels;
use kiln_contract::{BackendError, Home};
use kiln_vmm::{Accelerator, Qemu};

use super::Finding;

pub(super) fn examine(home: &Home) -> Vec<Finding> {
    let mut findings = vec![hypervisor(), accelerator(), kernel(home)];
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

fn accelerator() -> Finding {
    let what = "machines: accelerator";
    match Accelerator::choose() {
        chosen @ Accelerator::Kvm => Finding::ok(what, chosen.to_string()),
        chosen @ Accelerator::Tcg { .. } => Finding::warn(
            what,
            chosen.to_string(),
            "machines work, and what they compute takes some ten times as long",
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
