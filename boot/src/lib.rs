//! Kernels that machines boot, and the initramfs that they begin with.
//!
//! A kernel comes from the host, from a Debian package or from a file, and is kept in `$KILN_HOME/kernels/<name>/`
//! with the few of its modules that machines need ([`Kernels`]). With a guest's binary it becomes an [`initramfs`].
//!
//! ```no_run
//! use kiln_boot::{Kernels, Source, initramfs};
//! use kiln_contract::{Home, Silent};
//!
//! # fn main() -> kiln_boot::Result<()> {
//! let kernels = Kernels::open(&Home::at("/var/lib/kiln"));
//! kernels.install(&Source::Host("/".into()), None, &Silent)?;
//! let kernel = kernels.default()?;
//! let initramfs = initramfs(&kernel, b"a static program for Linux")?;
//! println!("{} boots with {} bytes", kernel.for_qemu().display(), initramfs.len());
//! # Ok(())
//! # }
//! ```

mod apt;
mod arch;
mod build;
mod compression;
mod config;
mod counted;
mod cpio;
mod deb;
mod error;
mod found;
mod image;
mod initramfs;
mod kernel;
mod kernels;
mod linux_source;
mod modules;
mod staging;
mod tools;
mod version;
mod vmlinux;

pub use arch::Arch;
pub use error::{BootError, Missing, Result, Tool};
pub use image::Form;
pub use initramfs::initramfs;
pub use kernel::{FORMAT, Kernel, KernelRecord, ModuleRecord, Source};
pub use kernels::Kernels;
