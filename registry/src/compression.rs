//! Layers packed and unpacked: gzip (RFC 1952), zstd (RFC 8878) and plain tar.

use std::io::{self, BufReader, Read, Write};

use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use kiln_store::ZSTD_WINDOW_LOG;

/// How a layer is packed when it leaves the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// What every tool can read.
    #[default]
    Gzip,
    /// Smaller and several times faster both ways; needs tools of the last years.
    Zstd,
    /// The plain tar.
    None,
}

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Frames that carry no data may come first (RFC 8878 §3.1.2): 0x184D2A50 to 0x184D2A5F.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];

/// Unpacks by what the stream itself begins with: media types are often wrong, and no tar begins like these.
///
/// # Errors
/// The stream's beginning cannot be read, or there is no memory for a decoder.
pub fn decompress<'a>(
    compressed: impl Read + Send + 'a,
) -> io::Result<(Compression, Box<dyn Read + Send + 'a>)> {
    let mut compressed = BufReader::with_capacity(128 << 10, compressed);
    // A first read may give less than a magic's length.
    let mut head = [0; 4];
    let got = read_full(&mut compressed, &mut head)?;
    let head = &head[..got];
    let kind = detect(head);
    let whole = io::Cursor::new(head.to_vec()).chain(compressed);
    Ok((
        kind,
        match kind {
            Compression::Gzip => Box::new(MultiGzDecoder::new(whole)),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(whole)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(decoder)
            }
            Compression::None => Box::new(whole),
        },
    ))
}

/// What a stream that begins with `head` is packed with.
pub(crate) fn detect(head: &[u8]) -> Compression {
    if head.starts_with(&GZIP_MAGIC) {
        Compression::Gzip
    } else if head.starts_with(&ZSTD_MAGIC)
        || (head.len() >= 4 && head[0] & 0xf0 == 0x50 && head[1..4] == ZSTD_SKIPPABLE)
    {
        Compression::Zstd
    } else {
        Compression::None
    }
}

/// Reads until `into` is full or the end.
pub(crate) fn read_full(from: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match from.read(&mut into[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Packs what is written to it. The same bytes always become the same bytes: no time and no name in the header.
pub(crate) enum Compressor<W: Write> {
    Gzip(GzEncoder<W>),
    Zstd(zstd::Encoder<'static, W>),
    Plain(W),
}

impl<W: Write> Compressor<W> {
    pub(crate) fn new(compression: Compression, out: W) -> io::Result<Self> {
        Ok(match compression {
            Compression::Gzip => {
                // 255: an unknown operating system, the same everywhere.
                Self::Gzip(
                    flate2::GzBuilder::new()
                        .mtime(0)
                        .operating_system(255)
                        .write(out, flate2::Compression::default()),
                )
            }
            Compression::Zstd => Self::Zstd(zstd::Encoder::new(out, zstd::DEFAULT_COMPRESSION_LEVEL)?),
            Compression::None => Self::Plain(out),
        })
    }

    /// Writes what is still held back, and gives the writer back.
    pub(crate) fn finish(self) -> io::Result<W> {
        match self {
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
            Self::Plain(out) => Ok(out),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
            Self::Plain(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
            Self::Plain(out) => out.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(compression: Compression, bytes: &[u8]) -> Vec<u8> {
        let mut out = Compressor::new(compression, Vec::new()).unwrap();
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn unpack(bytes: &[u8]) -> io::Result<Vec<u8>> {
        /// One byte a read: whoever relies on full reads fails.
        struct Slow<'a>(&'a [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                let n = into.len().min(self.0.len()).min(1);
                into[..n].copy_from_slice(&self.0[..n]);
                self.0 = &self.0[n..];
                Ok(n)
            }
        }
        let mut out = Vec::new();
        decompress(Slow(bytes))?.1.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_packing_comes_back_and_is_known_by_its_first_bytes() {
        let text = b"kiln ".repeat(10_000);
        for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
            let packed = pack(compression, &text);
            assert_eq!(detect(&packed), compression);
            assert_eq!(unpack(&packed).unwrap(), text, "{compression:?}");
            assert_eq!(pack(compression, &text), packed, "the same bytes, packed twice");
            for length in [0, 1, 3] {
                assert_eq!(unpack(&pack(compression, &text[..length])).unwrap(), &text[..length]);
            }
        }
    }

    #[test]
    fn several_members_are_one_stream() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let two = [pack(compression, b"one "), pack(compression, b"two")].concat();
            assert_eq!(unpack(&two).unwrap(), b"one two", "{compression:?}");
        }
        let skippable =
            [&[0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9], &pack(Compression::Zstd, b"x")[..]].concat();
        assert_eq!(unpack(&skippable).unwrap(), b"x");
    }

    #[test]
    fn a_stream_that_is_cut_off_is_an_error() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let packed = pack(compression, &b"kiln ".repeat(1000));
            for length in [4, packed.len() / 2, packed.len() - 1] {
                assert!(unpack(&packed[..length]).is_err(), "{compression:?} {length}");
            }
        }
    }

    #[test]
    fn gzip_headers_hold_no_time() {
        assert_eq!(pack(Compression::Gzip, b"x")[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
    }
}
