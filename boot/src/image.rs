//! What the file of a kernel says of itself: which processors it is for, and its version.
//!
//! x86-64's `bzImage` has a setup header at 0x1f1 (`Documentation/arch/x86/boot.rst`); arm64's `Image` has a header
//! of 64 bytes (`Documentation/arch/arm64/booting.rst`), carries its version as text only, and comes compressed too, as
//! it is or in a program for UEFI (`CONFIG_EFI_ZBOOT`); a `vmlinux` is an ELF file.

use std::path::Path;

use memchr::memmem;
use serde::{Deserialize, Serialize};

use crate::arch::Arch;
use crate::compression::{self, Compression};
use crate::config::Config;
use crate::error::{BootError, Result};
use crate::vmlinux::{self, Vmlinux};

/// The largest kernel that is read, packed or not.
pub(crate) const MAX_KERNEL: u64 = 512 << 20;

/// The form of a kernel's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// x86-64: a kernel that unpacks itself, entered by the Linux boot protocol.
    BzImage,
    /// arm64: an uncompressed kernel with a header of its own.
    Image,
    /// An uncompressed kernel in an ELF file.
    Elf,
}

/// A kernel that was read.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) arch: Arch,
    /// `uname -r`.
    pub(crate) version: String,
    pub(crate) form: Form,
    /// The file in that form: as it was given, but for compressed ones of arm64; empty for [`Form::Elf`].
    pub(crate) content: Vec<u8>,
    /// The same kernel as an ELF file, on x86-64.
    pub(crate) vmlinux: Option<Vmlinux>,
}

impl Image {
    /// Reads `kernel`, the content of the file `path`.
    pub(crate) fn read(kernel: Vec<u8>, path: &Path) -> Result<Self> {
        let not = |reason: &str| BootError::NotAKernel { path: path.into(), reason: reason.into() };
        let without = || not("it has no version");
        if kernel.get(0x202..0x206) == Some(b"HdrS") {
            let version = setup_version(&kernel).ok_or_else(without)?;
            let vmlinux = vmlinux::extract(&kernel)
                .inspect_err(|reason| tracing::info!(kernel = %path.display(), "no vmlinux: {reason}"))
                .ok();
            return Ok(Self { arch: Arch::X86_64, version, form: Form::BzImage, content: kernel, vmlinux });
        }
        let kernel = unpacked(kernel).map_err(|error| not(&error.to_string()))?;
        let version = || text_version(&kernel).ok_or_else(without);
        if kernel.get(56..60) == Some(b"ARM\x64") {
            let version = version()?;
            return Ok(Self {
                arch: Arch::Aarch64,
                version,
                form: Form::Image,
                content: kernel,
                vmlinux: None,
            });
        }
        if !kernel.starts_with(b"\x7fELF") {
            return Err(not("it is neither a bzImage, nor an arm64 Image, nor an ELF file"));
        }
        let vmlinux = vmlinux::compact(&kernel).map_err(|reason| not(&reason))?;
        let (version, content) = (version()?, Vec::new());
        Ok(Self { arch: Arch::X86_64, version, form: Form::Elf, content, vmlinux: Some(vmlinux) })
    }
}

impl Image {
    /// The configuration that is kept in it, if it is.
    pub(crate) fn config(&self) -> Option<Config> {
        Config::embedded(self.vmlinux.as_ref().map_or(&self.content, |vmlinux| &vmlinux.elf))
    }
}

/// What `kernel` is when decompressed, if it is compressed.
fn unpacked(kernel: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut packed = &kernel[..];
    // `MZ`, and at 4 `zimg`; then where the compressed kernel begins and how long it is (drivers/firmware/efi/libstub).
    if kernel.starts_with(b"MZ") && kernel.get(4..8) == Some(b"zimg") {
        let word = |at: usize| {
            kernel.get(at..at + 4).and_then(<[u8]>::first_chunk).map_or(0, |word| u32::from_le_bytes(*word))
        };
        let (begin, length) = (word(8) as usize, word(12) as usize);
        packed = begin.checked_add(length).and_then(|end| kernel.get(begin..end)).unwrap_or_default();
    }
    if Compression::of(packed) == Compression::None {
        return Ok(kernel);
    }
    compression::unpack(packed, MAX_KERNEL)
}

/// The version that the setup header of a `bzImage` points to, counted from 0x200.
fn setup_version(kernel: &[u8]) -> Option<String> {
    let at = kernel.get(0x20e..0x210).map(|at| usize::from(u16::from_le_bytes([at[0], at[1]])))?;
    word(kernel.get(at + 0x200..).filter(|_| at != 0)?)
}

/// The version in the text that every kernel greets with. The format string `Linux version %s` is in it too.
fn text_version(kernel: &[u8]) -> Option<String> {
    const GREETING: &[u8] = b"Linux version ";
    let mut greeted = memmem::find_iter(kernel, GREETING).map(|at| &kernel[at + GREETING.len()..]);
    word(greeted.find(|rest| rest.first().is_some_and(u8::is_ascii_digit))?)
}

/// The printable word that `bytes` begin with: a version, so at most 100 characters.
fn word(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().take(101).position(|byte| !byte.is_ascii_graphic())?;
    let word = bytes.get(..end).filter(|word| !word.is_empty())?;
    Some(String::from_utf8_lossy(word).into_owned())
}
