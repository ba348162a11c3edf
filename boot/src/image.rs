//! What the file of a kernel says of itself: which processors it is for, and its version.
//!
//! x86-64's `bzImage` has a setup header at 0x1f1 (`Documentation/arch/x86/boot.rst`); arm64's `Image` has a header
//! of 64 bytes (`Documentation/arch/arm64/booting.rst`) and carries its version as text only; a `vmlinux` is an ELF
//! file.

use std::path::Path;

use crate::arch::Arch;
use crate::compression::{self, Compression};
use crate::error::{BootError, Result};

/// The largest kernel that is read, packed or not.
pub(crate) const MAX_KERNEL: u64 = 512 << 20;

/// What a kernel's file says of itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct About {
    pub(crate) arch: Arch,
    /// `uname -r`.
    pub(crate) version: String,
}

/// Reads `kernel`, which was read from `path`.
pub(crate) fn about(kernel: &[u8], path: &Path) -> Result<About> {
    let not = |reason: &str| BootError::NotAKernel { path: path.into(), reason: reason.into() };
    if kernel.get(0x202..0x206) == Some(b"HdrS") {
        // Where the version is, counted from 0x200; part of the header since protocol 2.00.
        let at = kernel.get(0x20e..0x210).map_or(0, |at| usize::from(u16::from_le_bytes([at[0], at[1]])));
        let version = (at != 0).then(|| word(kernel.get(at + 0x200..)?)).flatten();
        return Ok(About { arch: Arch::X86_64, version: version.ok_or_else(|| not("it has no version"))? });
    }
    let unpacked;
    let mut plain = kernel;
    if Compression::of(kernel) != Compression::None {
        unpacked = compression::unpack(kernel, MAX_KERNEL).map_err(|error| not(&error.to_string()))?;
        plain = &unpacked;
    }
    let arch = if plain.get(56..60) == Some(b"ARM\x64") {
        Arch::Aarch64
    } else if plain.starts_with(b"\x7fELF\x02\x01") {
        match plain.get(18..20) {
            Some([62, 0]) => Arch::X86_64,
            Some([183, 0]) => Arch::Aarch64,
            _ => return Err(not("it is for processors that machines do not have")),
        }
    } else {
        return Err(not("it is neither a bzImage, nor an arm64 Image, nor an ELF file"));
    };
    let version = find(plain, b"Linux version ").and_then(|at| word(&plain[at + 14..]));
    Ok(About { arch, version: version.ok_or_else(|| not("it has no version"))? })
}

/// The printable word that `bytes` begin with: a version, so at most 100 characters.
fn word(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().take(101).position(|byte| !byte.is_ascii_graphic())?;
    let word = bytes.get(..end).filter(|word| !word.is_empty())?;
    Some(String::from_utf8_lossy(word).into_owned())
}

/// Where `needle`, which is followed by a digit, is in `hay`: the format string `Linux version %s` is in kernels too.
fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len() + 1)
        .position(|window| window.starts_with(needle) && window[needle.len()].is_ascii_digit())
}
