//! What a kernel begins with: the guest as `/init`, and the modules.
//!
//! ```text
//! /init                  the static guest binary
//! /dev/console           for its standard streams; /dev /proc /sys /run /tmp are empty
//! /modules/<name>.ko
//! /modules/load          what is loaded at boot, in this order: `/modules/<name>.ko`, and parameters after a space
//! /modules/later         what is loaded when it is asked for: `/modules/<name>.ko`, and after spaces the names of the
//!                        modules that must be loaded before
//! /modules/alias         what else modules are asked for by: `<alias> <name>`
//! ```
//!
//! It is not compressed: under emulation the kernel takes as long to inflate a byte as to do anything else with it, and
//! where the processor is the host's own, copying a few megabytes takes a few milliseconds.

use std::fmt::Write as _;

use crate::cpio::Cpio;
use crate::error::{BootError, Result};
use crate::kernel::Kernel;

/// The largest guest binary; the archive's format would allow 4 GiB.
const MAX_GUEST: usize = 256 << 20;

/// The initramfs for machines that boot `kernel` and run `guest`, a static program. The same two give the same bytes.
///
/// # Errors
/// If one of the kernel's modules cannot be read, or `guest` is larger than 256 MiB.
pub fn initramfs(kernel: &Kernel, guest: &[u8]) -> Result<Vec<u8>> {
    if guest.len() > MAX_GUEST {
        let source = std::io::Error::from(std::io::ErrorKind::FileTooLarge);
        return Err(BootError::System { doing: "put into an initramfs", path: "/init".into(), source });
    }
    let mut cpio = Cpio::with_capacity(guest.len() + (16 << 20));
    for (name, permissions) in
        [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777), ("modules", 0o755)]
    {
        cpio.directory(name, permissions);
    }
    cpio.device("dev/console", 0o600, (5, 1));
    cpio.file("init", 0o755, guest);
    let (mut load, mut later, mut alias) = (String::new(), String::new(), String::new());
    for module in &kernel.record().modules {
        let name = &module.name;
        cpio.file(&format!("modules/{name}.ko"), 0o644, &kernel.read_module(name)?);
        // Writing to a string does not fail.
        let _ = if module.at_boot {
            writeln!(load, "/modules/{name}.ko")
        } else {
            let needs: String = module.needs.iter().map(|need| format!(" {need}")).collect();
            for other in &module.aliases {
                let _ = writeln!(alias, "{other} {name}");
            }
            writeln!(later, "/modules/{name}.ko{needs}")
        };
    }
    cpio.file("modules/load", 0o644, load.as_bytes());
    cpio.file("modules/later", 0o644, later.as_bytes());
    cpio.file("modules/alias", 0o644, alias.as_bytes());
    Ok(cpio.finish())
}
