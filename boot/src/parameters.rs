//! Parameters of the kernel that make it boot, and boot fast.

use crate::arch::Arch;
use crate::kernel::Kernel;
use crate::tsc;

impl Kernel {
    /// Parameters for this kernel's command line. A hypervisor's driver adds those that are its own affair: the
    /// console, how to reboot, what to do in a panic. `emulated` is whether processors are emulated (QEMU's TCG); what
    /// is measured for that takes some 20 ms.
    pub fn parameters(&self, emulated: bool) -> Vec<String> {
        let mut parameters = vec![
            // Every character on a serial port is an exit to the hypervisor.
            "quiet".to_owned(),
            // Self-tests of ciphers: a fifth of the boot of a distribution's kernel under emulation.
            "cryptomgr.notests".to_owned(),
        ];
        if let Some(khz) = tsc::frequency().filter(|_| emulated && self.arch() == Arch::X86_64) {
            parameters.push(format!("tsc_early_khz={khz}"));
        }
        parameters
    }
}
