//! What a machine boots that is not restored: a kernel, the guest in an initramfs, and words for the kernel.

use std::fs;
use std::path::Path;

use kiln_boot::Kernel;
use kiln_contract::{BackendError, BootConfig};

use crate::guest;
use crate::template::failed;

/// The initramfs of a machine that boots.
pub(crate) const INITRAMFS: &str = "initramfs";

/// Words for the kernel besides those that the machine's kind needs. Nobody but the workload is in a machine: of the security
/// modules it has those that a program applies to itself. And it is alone, so that what waits for all processors to have seen
/// a change (a mount, a device) may hurry them.
pub(crate) const COMMAND_LINE: &str = "quiet loglevel=3 random.trust_cpu=on cgroup_no_v1=all \
                            systemd.unified_cgroup_hierarchy=1 lsm=landlock,yama rcupdate.rcu_expedited=1";

/// What a machine of a kernel boots; its initramfs is put into `directory`.
pub(crate) fn booting(kernel: &Kernel, directory: &Path) -> Result<BootConfig, BackendError> {
    if guest::PROGRAM.is_empty() {
        return Err(BackendError::unsupported(
            "this program was built without a guest and cannot make machines",
        ));
    }
    let initramfs = directory.join(INITRAMFS);
    let bytes = kiln_boot::initramfs(kernel, guest::PROGRAM)?;
    fs::write(&initramfs, bytes).map_err(failed("write", &initramfs))?;
    Ok(BootConfig {
        kernel: kernel.image(),
        vmlinux: kernel.vmlinux(),
        initramfs,
        command_line: COMMAND_LINE.to_owned(),
    })
}
