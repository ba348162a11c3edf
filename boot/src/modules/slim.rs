//! Modules without what machines have no use for, and what takes longest of loading them under emulation: the
//! signature, whose check hashes the whole module and does arithmetic on 4096-bit numbers, and BTF, which the kernel
//! verifies type by type. Without the two Debian's modules are loaded in half the time.
//!
//! Who could change a module in an initramfs could change the kernel beside it, so nothing is lost with the signature;
//! the kernel notes once that it is «tainted».

use object::LittleEndian as LE;
use object::elf::{FileHeader64, SectionHeader64};
use object::endian::U64;
use object::pod::bytes_of;
use object::read::elf::FileHeader as _;

/// What a signed module ends with (`include/linux/module_signature.h`).
const SIGNED: &[u8] = b"~Module signature appended~\n";

/// `struct module_signature`, before that: five bytes, three of padding, and how long the signature is, big-endian.
const SIGNATURE: usize = 12;

/// Takes both out of `module`. What is not as expected stays as it is.
pub(crate) fn slim(module: &mut Vec<u8>) {
    if let Some(end) = signature(module) {
        module.truncate(end);
    }
    forget_types(module);
}

/// Where the signature of `module` begins.
fn signature(module: &[u8]) -> Option<usize> {
    let (rest, length) = module.strip_suffix(SIGNED)?.split_last_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    (rest.len() + 4).checked_sub(SIGNATURE)?.checked_sub(length)
}

/// Makes the section `.BTF` empty: the kernel then takes the module for one that was built without.
fn forget_types(module: &mut [u8]) {
    let found = || {
        let header = FileHeader64::<LE>::parse(&*module).ok()?;
        let sections = header.sections(LE, &*module).ok()?;
        let (index, section) = sections.section_by_name(LE, b".BTF")?;
        let mut empty = *section;
        empty.sh_size = U64::new(LE, 0);
        let size = size_of::<SectionHeader64<LE>>();
        let begin = usize::try_from(header.e_shoff.get(LE)).ok()?.checked_add(index.0.checked_mul(size)?)?;
        Some((begin..begin.checked_add(size)?, bytes_of(&empty).to_vec()))
    };
    if let Some((place, header)) = found()
        && let Some(place) = module.get_mut(place)
    {
        place.copy_from_slice(&header);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(content: &[u8], length: u32) -> Vec<u8> {
        let mut module = content.to_vec();
        module.extend_from_slice(&[0x55; 300]);
        module.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0]);
        module.extend_from_slice(&length.to_be_bytes());
        module.extend_from_slice(SIGNED);
        module
    }

    #[test]
    fn a_signature_is_cut_off_and_anything_else_is_left_alone() {
        let cases = [
            (signed(b"the module", 300), b"the module".to_vec()),
            (signed(b"the module", 310), Vec::new()),
            (signed(b"the module", 311), signed(b"the module", 311)),
            (signed(b"", u32::MAX), signed(b"", u32::MAX)),
            (b"the module".to_vec(), b"the module".to_vec()),
            (SIGNED.to_vec(), SIGNED.to_vec()),
            (Vec::new(), Vec::new()),
        ];
        for (mut module, expected) in cases {
            let before = module.len();
            slim(&mut module);
            assert_eq!(module, expected, "{before} bytes");
        }
    }
}
