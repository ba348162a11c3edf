//! An installed kernel, and `kernel.json`, in which it is recorded.
//!
//! ```text
//! kernels/<name>/
//!   kernel.json          the record below, format 1
//!   kernel               a bzImage as it was given, or an uncompressed Image (arm64)
//!   vmlinux              the same kernel as an ELF file (x86-64), if it could be unpacked
//!   config               its configuration, if it is known
//!   modules/<name>.ko    the modules that machines need, decompressed
//! ```

use std::fs::File;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_contract::Digest;
use serde::{Deserialize, Serialize};

use crate::arch::Arch;
use crate::compression::read_bounded;
use crate::error::{BootError, Result};
use crate::image::Form;
use crate::modules::{MAX_MODULE, is_module_name};

/// The version of `kernel.json`. A newer one is refused; new fields that older programs may ignore do not change it.
pub const FORMAT: u32 = 1;

/// The largest record that is read: some 130 modules with their aliases have 20 kB.
const MAX_RECORD: u64 = 8 << 20;

/// Where a kernel came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "from", rename_all = "snake_case")]
pub enum Source {
    /// The one that this host runs, else the newest in `/boot`; the path is `/`, or where another host's root is.
    Host(PathBuf),
    /// Debian packages that have the kernel and its modules: one of Debian's, or several of Ubuntu's.
    Packages(Vec<PathBuf>),
    /// What the user named: a package, a kernel's file, or a directory with `boot/vmlinuz-*` and `lib/modules`.
    Path(PathBuf),
    /// The newest that this host's Debian or Ubuntu has, downloaded by its apt.
    Distribution,
    /// Built for machines.
    Build {
        /// The source of Linux: a directory, a tar, or a package that has one; without one Debian's.
        source: Option<PathBuf>,
        /// How many compilers run at a time; without a number as many as there are processors.
        #[serde(skip)]
        jobs: Option<NonZeroUsize>,
    },
}

/// A module that was installed with a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleRecord {
    /// Its name as the kernel has it, with `_` and never `-`.
    pub name: String,
    /// Installed modules that must be loaded before it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<String>,
    /// Names that the kernel asks for it by: `fs-ext4`, `rtnl-link-veth`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Whether it is loaded at boot; the others are loaded when they are asked for.
    pub at_boot: bool,
}

/// What is known of an installed kernel: `kernel.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// Its name among the installed ones.
    pub name: String,
    /// What `uname -r` says in it.
    pub version: String,
    /// The processors that it is for.
    pub arch: Arch,
    /// Where it came from.
    pub source: Source,
    /// Of the kernel's file and of all its modules: two kernels with the same digest boot the same.
    pub digest: Digest,
    /// When it was installed.
    pub created: Timestamp,
    /// The form in which it was given.
    pub form: Form,
    /// Bytes of all its files.
    pub size: u64,
    /// Whether there is a `vmlinux`.
    pub vmlinux: bool,
    /// Whether the `vmlinux` says where PVH enters it, so that QEMU can start it.
    pub pvh: bool,
    /// Its modules in the order of loading: those of the boot first, each after what it needs.
    pub modules: Vec<ModuleRecord>,
    /// Names of wanted modules that it has built in.
    #[serde(default)]
    pub builtin: Vec<String>,
    /// Options of the kernel's configuration whose parts machines with it do without.
    #[serde(default)]
    pub absent: Vec<String>,
}

/// An installed kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    directory: PathBuf,
    record: KernelRecord,
}

impl Kernel {
    /// The kernel in `directory`, a directory as [`crate::Kernels`] makes them.
    ///
    /// # Errors
    /// If its record cannot be read, or was written by a newer version.
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join("kernel.json");
        let bytes = read_file(&path, MAX_RECORD)?;
        let format = |reason: String| BootError::Format { path: path.clone(), reason };
        let record: KernelRecord =
            serde_json::from_slice(&bytes).map_err(|error| format(error.to_string()))?;
        if record.format != FORMAT {
            return Err(format(format!(
                "it has the format {}, and this version knows {FORMAT}",
                record.format
            )));
        }
        // They become names of files below.
        if let Some(bad) = record.modules.iter().find(|module| !is_module_name(&module.name)) {
            return Err(format(format!("{:?} cannot name a module", bad.name)));
        }
        Ok(Self { directory: directory.into(), record })
    }

    /// Its name among the installed ones.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// What `uname -r` says in it.
    pub fn version(&self) -> &str {
        &self.record.version
    }

    /// The processors that it is for.
    pub fn arch(&self) -> Arch {
        self.record.arch
    }

    /// Of all that machines boot of it.
    pub fn digest(&self) -> Digest {
        self.record.digest
    }

    /// All that is known of it.
    pub fn record(&self) -> &KernelRecord {
        &self.record
    }

    /// The directory that it is in.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The kernel's file in the form ([`KernelRecord::form`]) in which it was given: a bzImage, an arm64 Image, or the
    /// same as [`Self::vmlinux`].
    pub fn image(&self) -> PathBuf {
        self.directory.join(if self.record.form == Form::Elf { VMLINUX } else { IMAGE })
    }

    /// The kernel as an ELF file. It starts much faster than a bzImage where processors are emulated, since nothing
    /// is decompressed in the guest. Always `None` on arm64, whose Image is not compressed.
    pub fn vmlinux(&self) -> Option<PathBuf> {
        self.record.vmlinux.then(|| self.directory.join(VMLINUX))
    }

    /// What QEMU's `-kernel` starts fastest: [`Self::vmlinux`] if PVH can enter it, else [`Self::image`].
    pub fn for_qemu(&self) -> PathBuf {
        self.vmlinux().filter(|_| self.record.pvh).unwrap_or_else(|| self.image())
    }

    /// A module's file, read.
    pub(crate) fn read_module(&self, name: &str) -> Result<Vec<u8>> {
        read_file(&module_file(&self.directory, name), MAX_MODULE)
    }
}

/// The kernel's file in a form that was not ELF.
pub(crate) const IMAGE: &str = "kernel";

/// The kernel's file as ELF.
pub(crate) const VMLINUX: &str = "vmlinux";

/// Where the module `name` of the kernel in `directory` is.
pub(crate) fn module_file(directory: &Path, name: &str) -> PathBuf {
    directory.join("modules").join(format!("{name}.ko"))
}

pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(BootError::doing("read", path))?;
    read_bounded(file, limit).map_err(BootError::doing("read", path))
}
