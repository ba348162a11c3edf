//! Files that are compressed in one of the ways of kernels, modules and packages: told by their first bytes.

use std::io::{self, Read};

use lz4_flex::block::DecompressError;

/// A way to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    /// RFC 1952.
    Gzip,
    /// The .xz format 1.2.
    Xz,
    /// RFC 8878.
    Zstd,
    /// LZ4's legacy frame, as the kernel's build makes it (`lz4 -l`).
    Lz4,
}

/// The largest block of a legacy LZ4 frame when decompressed (`LZ4_Frame_format.md`, «Legacy frame»).
const LZ4_BLOCK: usize = 8 << 20;

/// What a decoder of xz may allocate, in KiB: the kernel's own build asks for dictionaries of up to 128 MiB.
const XZ_MEMORY: u32 = 160 << 10;

impl Compression {
    /// Told from the first bytes; [`Compression::None`] if they are no magic number.
    pub(crate) fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            _ => Self::None,
        }
    }

    /// A reader of what `packed` decompresses to. LZ4 is only for [`unpack`].
    pub(crate) fn reader<'a>(self, packed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(packed),
            Self::Gzip => Box::new(flate2::read::GzDecoder::new(packed)),
            Self::Xz => Box::new(xz(packed, true)),
            Self::Zstd => Box::new(zstd::Decoder::new(packed)?),
            Self::Lz4 => return Err(io::Error::from(io::ErrorKind::Unsupported)),
        })
    }
}

fn xz<'a>(packed: impl Read + 'a, several_streams: bool) -> impl Read + 'a {
    lzma_rust2::XzReader::new_mem_limit(packed, several_streams, XZ_MEMORY)
}

/// Decompresses `packed`, whatever it is compressed with; bytes that are not compressed are given back as they are.
/// What follows the compressed stream is ignored, as a kernel's payload ends with its decompressed size.
///
/// # Errors
/// If the data is damaged, or decompresses to more than `limit` bytes.
pub(crate) fn unpack(packed: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let kind = Compression::of(packed);
    if kind == Compression::Lz4 {
        return unpack_lz4(&packed[4..], limit);
    }
    let reader: Box<dyn Read> = match kind {
        // One stream only, unlike archives: padding may follow.
        Compression::Xz => Box::new(xz(packed, false)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(packed)?.single_frame()),
        other => other.reader(packed)?,
    };
    read_bounded(reader, limit)
}

/// Reads all of `reader`.
///
/// # Errors
/// [`io::ErrorKind::FileTooLarge`] if there are more than `limit` bytes.
pub(crate) fn read_bounded(reader: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    reader.take(limit.saturating_add(1)).read_to_end(&mut out)?;
    if out.len() as u64 > limit { Err(too_large(limit)) } else { Ok(out) }
}

fn too_large(limit: u64) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes"))
}

/// Blocks, each with its compressed length before it, until the data ends or a length is no block's: in a kernel the
/// last four bytes are the decompressed size.
fn unpack_lz4(mut blocks: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut block = Vec::new();
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        if rest.is_empty() {
            break;
        }
        let Some(packed) = rest.get(..length).filter(|packed| !packed.is_empty()) else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "an LZ4 block is cut short"));
        };
        block.resize(LZ4_BLOCK, 0);
        let written = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error: DecompressError| io::Error::new(io::ErrorKind::InvalidData, error))?;
        out.extend_from_slice(&block[..written]);
        if out.len() as u64 > limit {
            return Err(too_large(limit));
        }
        blocks = &rest[length..];
    }
    Ok(out)
}
