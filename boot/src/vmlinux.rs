//! The uncompressed kernel of x86-64, as an ELF file: what a `bzImage` unpacks itself to, and what Firecracker and
//! (with a PVH note) QEMU start without running that unpacker in the guest.
//!
//! A `vmlinux` of a build has sections that only tools read, and segments that end with megabytes of zeros, for what
//! is not initialised. [`compact`] keeps what is loaded: the ELF header, the program headers and the segments, each
//! without its last zeros, which `p_memsz` implies.

use object::LittleEndian as LE;
use object::elf::{
    EM_X86_64, ET_EXEC, FileHeader64, NoteType, PT_LOAD, PT_NOTE, ProgramHeader64, SymbolSection,
};
use object::endian::{U16, U64};
use object::pod::bytes_of;
use object::read::elf::{FileHeader as _, ProgramHeader as _};

use crate::compression;
use crate::image::MAX_KERNEL;

/// `XEN_ELFNOTE_PHYS32_ENTRY` (`include/xen/interface/elfnote.h`): where PVH enters the kernel.
const PHYS32_ENTRY: NoteType = NoteType(18);

/// Bytes of an ELF header and of a program header.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// More segments than any kernel has: five.
const MAX_SEGMENTS: usize = 32;

/// What segments are aligned to in the file: that of pages.
const ALIGN: u64 = 4096;

/// An uncompressed kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Vmlinux {
    /// The ELF file.
    pub(crate) elf: Vec<u8>,
    /// Whether it says where PVH enters it.
    pub(crate) pvh: bool,
}

/// What the `bzImage` in `image` unpacks itself to (`Documentation/arch/x86/boot.rst`, `payload_offset`).
///
/// # Errors
/// Why there is none, as the end of a sentence.
pub(crate) fn extract(image: &[u8]) -> Result<Vmlinux, String> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.first_chunk()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    let protocol = image.get(0x206..0x208).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    if protocol < 0x0208 {
        return Err("its boot protocol is older than 2.08".into());
    }
    // Zero stands for four, from the days of floppy disks.
    let sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let payload = word(0x248).zip(word(0x24c)).and_then(|(offset, length)| {
        let begin = ((sectors + 1) * 512).checked_add(offset)?;
        image.get(begin..begin.checked_add(length)?)
    });
    let payload = payload.ok_or("its payload lies outside of it")?;
    let elf = compression::unpack(payload, MAX_KERNEL).map_err(|error| format!("its payload: {error}"))?;
    compact(&elf)
}

/// The loadable part of the ELF file `elf`.
///
/// # Errors
/// Why it is no kernel, as the end of a sentence.
pub(crate) fn compact(elf: &[u8]) -> Result<Vmlinux, String> {
    let said = |error: object::read::Error| error.to_string();
    let header = FileHeader64::<LE>::parse(elf).map_err(said)?;
    let endian = header.endian().map_err(said)?;
    if (header.e_type(endian), header.e_machine(endian)) != (ET_EXEC, EM_X86_64) {
        return Err("it is no program for x86-64".into());
    }
    let segments = header.program_headers(endian, elf).map_err(said)?;
    if segments.len() > MAX_SEGMENTS {
        return Err(format!("it has {} segments", segments.len()));
    }
    let mut pvh = false;
    for segment in segments {
        let mut notes = match segment.notes(endian, elf).map_err(said)? {
            Some(notes) => notes,
            None => continue,
        };
        while let Some(note) = notes.next().map_err(said)? {
            pvh |= note.name() == b"Xen" && note.n_type(endian) == PHYS32_ENTRY;
        }
    }

    let mut out = vec![0; HEADER + PROGRAM_HEADER * segments.len()];
    let mut moved = Vec::with_capacity(segments.len());
    // What is loaded first: notes are mostly in it.
    for segment in segments {
        let data = segment.data(endian, elf).map_err(|()| "a segment lies outside of it")?;
        let mut to = *segment;
        if segment.p_type(endian) == PT_LOAD {
            let used = data.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            let phase = segment.p_vaddr(endian) % ALIGN;
            let begin = (out.len() as u64).next_multiple_of(ALIGN) + phase;
            // Segments that overlap could make more of a file than it is.
            if begin + used as u64 > MAX_KERNEL {
                return Err("its segments are too large".into());
            }
            out.resize(begin as usize, 0);
            out.extend_from_slice(&data[..used]);
            to.p_offset = U64::new(LE, begin);
            to.p_filesz = U64::new(LE, used as u64);
            to.p_align = U64::new(LE, ALIGN);
        }
        moved.push(to);
    }
    for (from, to) in segments.iter().zip(&mut moved) {
        if from.p_type(endian) == PT_NOTE {
            let data = from.data(endian, elf).map_err(|()| "a note lies outside of it")?;
            out.resize(out.len().next_multiple_of(8), 0);
            to.p_offset = U64::new(LE, out.len() as u64);
            out.extend_from_slice(data);
        }
    }
    let kept: Vec<ProgramHeader64<LE>> =
        moved.into_iter().filter(|segment| matches!(segment.p_type(endian), PT_LOAD | PT_NOTE)).collect();
    let mut header = *header;
    header.e_phoff = U64::new(LE, HEADER as u64);
    header.e_phnum = U16::new(LE, kept.len() as u16);
    header.e_shoff = U64::new(LE, 0);
    header.e_shnum = U16::new(LE, 0);
    header.e_shstrndx = U16::new(LE, SymbolSection(0));
    header.e_ehsize = U16::new(LE, HEADER as u16);
    header.e_phentsize = U16::new(LE, PROGRAM_HEADER as u16);
    out[..HEADER].copy_from_slice(bytes_of(&header));
    for (index, segment) in kept.iter().enumerate() {
        let at = HEADER + PROGRAM_HEADER * index;
        out[at..at + PROGRAM_HEADER].copy_from_slice(bytes_of(segment));
    }
    Ok(Vmlinux { elf: out, pvh })
}
