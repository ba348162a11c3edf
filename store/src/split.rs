//! Split streams: a tar without the contents of its files.
//!
//! A layer's tree is what matters, but a registry knows the tar that it came from, by its digest. So everything in
//! a tar that is not the content of an object is kept, compressed, and the tar comes back byte for byte.
//! A layer that did not come from a tar has a split stream of the other kind: its tar is written from the tree
//! ([`crate::tar::write`]), and the stream only says which digest that has.
//!
//! ```text
//!  0   8  "KILNSPLT"
//!  8   4  version, 1                         (numbers are little-endian)
//! 12   4  kind: 0 recorded, 1 written from the tree (the header is all there is)
//! 16  32  diff_id: the SHA-256 of the tar
//! 48   8  length of the tar
//! 56   8  offset of the table
//! 64      literal bytes: one zstd frame with a checksum
//!  …      table: one zstd frame with a checksum, to the end of the file
//! ```
//!
//! The table is a sequence of records: so many literal bytes, then so many bytes of an object from an offset on.
//!
//! ```text
//! varint  literal bytes before
//! 32      digest of the object
//! varint  offset in the object
//! varint  length
//! ```
//!
//! What remains of the literal bytes follows the last record. varints are LEB128: seven bits a byte, lowest first.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use kiln_contract::Digest;

use crate::error::Context as _;
use crate::{Result, StoreError};

const MAGIC: &[u8; 8] = b"KILNSPLT";
/// Readers refuse a greater one.
pub(crate) const VERSION: u32 = 1;
const HEADER: u64 = 64;
const RECORDED: u32 = 0;
const FROM_TREE: u32 = 1;

/// Headers and padding compress by 50 with the fastest levels already; this one costs some 10 ms for 11,000 files.
const LEVEL: i32 = 1;

/// A piece of an object in a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Literal bytes before it, since the piece before.
    pub(crate) literal: u64,
    /// Which object: a number that the digest is known by later.
    pub(crate) slot: u32,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SplitInfo {
    pub(crate) diff_id: Digest,
    pub(crate) tar_size: u64,
    /// Whether the tar is written from the tree.
    pub(crate) from_tree: bool,
    table: u64,
}

/// Writes literals as they come.
pub(crate) struct SplitWriter {
    literals: zstd::Encoder<'static, BufWriter<File>>,
}

impl std::fmt::Debug for SplitWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SplitWriter")
    }
}

impl SplitWriter {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut file = File::create_new(path)?;
        file.seek(SeekFrom::Start(HEADER))?;
        let mut literals = zstd::Encoder::new(BufWriter::new(file), LEVEL)?;
        literals.include_checksum(true)?;
        Ok(Self { literals })
    }

    pub(crate) fn literals(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.literals.write_all(bytes)
    }

    /// Writes the table and, last, the header.
    pub(crate) fn finish(
        self,
        diff_id: &Digest,
        tar_size: u64,
        segments: &[Segment],
        digests: &[Digest],
    ) -> io::Result<()> {
        let mut file = self.literals.finish()?;
        let table = file.stream_position()?;
        let mut encoder = zstd::Encoder::new(file, LEVEL)?;
        encoder.include_checksum(true)?;
        let mut record = Vec::with_capacity(64);
        for segment in segments {
            record.clear();
            varint(&mut record, segment.literal);
            record.extend_from_slice(digests[segment.slot as usize].as_bytes());
            varint(&mut record, segment.offset);
            varint(&mut record, segment.length);
            encoder.write_all(&record)?;
        }
        let mut file = encoder.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header(RECORDED, diff_id, tar_size, table))
    }
}

/// The whole stream of a layer whose tar is written from its tree.
pub(crate) fn from_tree(diff_id: &Digest, tar_size: u64) -> [u8; HEADER as usize] {
    header(FROM_TREE, diff_id, tar_size, HEADER)
}

fn header(kind: u32, diff_id: &Digest, tar_size: u64, table: u64) -> [u8; HEADER as usize] {
    let mut header = [0; HEADER as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&kind.to_le_bytes());
    header[16..48].copy_from_slice(diff_id.as_bytes());
    header[48..56].copy_from_slice(&tar_size.to_le_bytes());
    header[56..64].copy_from_slice(&table.to_le_bytes());
    header
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A split stream in a file.
#[derive(Debug)]
pub(crate) struct Split<'p> {
    path: &'p Path,
    info: SplitInfo,
}

impl<'p> Split<'p> {
    /// Reads the header. `None` if there is no such file.
    pub(crate) fn open(path: &'p Path) -> Result<Option<Self>> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).doing("open", path),
        };
        let mut header = [0; HEADER as usize];
        match file.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(damaged(path, "it is too short".to_owned()));
            }
            Err(error) => return Err(error).doing("read", path),
        }
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        if header[..8] != *MAGIC {
            return Err(damaged(path, "it is no split stream".to_owned()));
        }
        if number(8) > VERSION {
            let (path, found) = (path.to_owned(), number(8));
            return Err(StoreError::NewerFormat { path, found, known: VERSION });
        }
        if number(12) > FROM_TREE {
            return Err(damaged(path, format!("its kind is {}", number(12))));
        }
        let diff_id = Digest::from_bytes(header[16..48].try_into().expect("32 bytes"));
        let info =
            SplitInfo { diff_id, tar_size: long(48), from_tree: number(12) == FROM_TREE, table: long(56) };
        Ok(Some(Self { path, info }))
    }

    pub(crate) fn info(&self) -> SplitInfo {
        self.info
    }

    /// The objects that the tar needs, in order; one may come several times.
    pub(crate) fn objects(&self) -> Result<Vec<Digest>> {
        let mut objects = Vec::new();
        if !self.info.from_tree {
            let mut table = self.table()?;
            while let Some((_, digest, _, _)) = self.record(&mut table)? {
                objects.push(digest);
            }
        }
        Ok(objects)
    }

    /// Writes a recorded tar. `open` gives an object.
    pub(crate) fn write(&self, out: &mut impl Write, open: impl Fn(&Digest) -> Result<File>) -> Result<()> {
        let mut table = self.table()?;
        let mut literals = self.literals()?;
        let mut buffer = vec![0; 256 << 10];
        let mut left = self.info.tar_size;
        let fail = |source| StoreError::Stream { doing: "write the tar of a layer", source };
        let mut count = |length: u64| {
            left = left.checked_sub(length).ok_or_else(|| damaged(self.path, "it is too long".to_owned()))?;
            Ok::<_, StoreError>(())
        };
        while let Some((literal, digest, offset, length)) = self.record(&mut table)? {
            count(literal)?;
            self.copy_literals(&mut literals, literal, &mut buffer, out)?;
            count(length)?;
            let mut object = open(&digest)?;
            if offset > 0 {
                object.seek(SeekFrom::Start(offset)).doing("read an object of", self.path)?;
            }
            let mut rest = length;
            while rest > 0 {
                let part = rest.min(buffer.len() as u64) as usize;
                let read = object.read(&mut buffer[..part]).doing("read an object of", self.path)?;
                if read == 0 {
                    return Err(damaged(
                        self.path,
                        format!("object {digest} is shorter than the layer says"),
                    ));
                }
                out.write_all(&buffer[..read]).map_err(fail)?;
                rest -= read as u64;
            }
        }
        let rest = left;
        self.copy_literals(&mut literals, rest, &mut buffer, out)?;
        match literals.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(damaged(self.path, "it has more literals than the tar".to_owned())),
            Err(error) => Err(damaged(self.path, format!("its literals cannot be read: {error}"))),
        }
    }

    fn copy_literals(
        &self,
        literals: &mut impl Read,
        mut length: u64,
        buffer: &mut [u8],
        out: &mut impl Write,
    ) -> Result<()> {
        while length > 0 {
            let part = length.min(buffer.len() as u64) as usize;
            let read = literals
                .read(&mut buffer[..part])
                .map_err(|error| damaged(self.path, format!("its literals cannot be read: {error}")))?;
            if read == 0 {
                return Err(damaged(self.path, "its literals end too early".to_owned()));
            }
            out.write_all(&buffer[..read])
                .map_err(|source| StoreError::Stream { doing: "write the tar of a layer", source })?;
            length -= read as u64;
        }
        Ok(())
    }

    fn frame(&self, at: u64, what: &'static str) -> Result<zstd::Decoder<'static, BufReader<File>>> {
        // A handle of its own: two frames are read by turns.
        let mut file = File::open(self.path).doing("open", self.path)?;
        file.seek(SeekFrom::Start(at)).doing("read", self.path)?;
        let decoder = zstd::Decoder::new(file).and_then(|mut decoder| {
            decoder.window_log_max(27)?;
            Ok(decoder.single_frame())
        });
        decoder.map_err(|error| damaged(self.path, format!("its {what} cannot be read: {error}")))
    }

    fn literals(&self) -> Result<impl Read> {
        self.frame(HEADER, "literals")
    }

    fn table(&self) -> Result<BufReader<impl Read + use<>>> {
        Ok(BufReader::new(self.frame(self.info.table, "table")?))
    }

    fn record(&self, table: &mut impl io::BufRead) -> Result<Option<(u64, Digest, u64, u64)>> {
        let wrap = |error: io::Error| damaged(self.path, format!("its table cannot be read: {error}"));
        if table.fill_buf().map_err(wrap)?.is_empty() {
            return Ok(None);
        }
        let literal = read_varint(table).map_err(wrap)?;
        let mut digest = [0; 32];
        table.read_exact(&mut digest).map_err(wrap)?;
        let (offset, length) = (read_varint(table).map_err(wrap)?, read_varint(table).map_err(wrap)?);
        Ok(Some((literal, Digest::from_bytes(digest), offset, length)))
    }
}

fn read_varint(input: &mut impl Read) -> io::Result<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let mut byte = [0];
        input.read_exact(&mut byte)?;
        value |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "a number is too long"))
}

fn damaged(path: &Path, what: String) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), what }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(path: &Path) -> (Digest, Digest, Vec<u8>) {
        let object = Digest::of(b"0123456789");
        let tar = b"headMORE234567tail".to_vec();
        let diff_id = Digest::of(&tar);
        let mut writer = SplitWriter::create(path).unwrap();
        writer.literals(b"headMO").unwrap();
        writer.literals(b"REtail").unwrap();
        let segments = [
            Segment { literal: 8, slot: 1, offset: 2, length: 3 },
            Segment { literal: 0, slot: 1, offset: 5, length: 3 },
        ];
        let digests = [Digest::of(b"other"), object];
        writer.finish(&diff_id, tar.len() as u64, &segments, &digests).unwrap();
        (object, diff_id, tar)
    }

    fn object_file() -> Result<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        file.rewind().unwrap();
        Ok(file)
    }

    #[test]
    fn a_split_stream_gives_back_the_tar() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.split");
        let (object, diff_id, tar) = sample(&path);
        let split = Split::open(&path).unwrap().unwrap();
        assert_eq!((split.info().diff_id, split.info().tar_size), (diff_id, tar.len() as u64));
        assert_eq!(split.objects().unwrap(), [object, object]);
        let mut out = Vec::new();
        split.write(&mut out, |_| object_file()).unwrap();
        assert_eq!(out, tar);
    }

    #[test]
    fn the_format_is_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.split");
        let (object, diff_id, _) = sample(&path);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[..16], b"KILNSPLT\x01\0\0\0\0\0\0\0");
        assert_eq!(&bytes[16..48], diff_id.as_bytes());
        assert_eq!(&bytes[48..56], 18_u64.to_le_bytes());
        let table = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize;
        assert_eq!(zstd::decode_all(&bytes[64..table]).unwrap(), b"headMOREtail");
        let record = |literal: u8, offset: u8| [&[literal][..], object.as_bytes(), &[offset, 3]].concat();
        assert_eq!(zstd::decode_all(&bytes[table..]).unwrap(), [record(8, 2), record(0, 5)].concat());
        assert_eq!(from_tree(&diff_id, 7)[12..16], 1_u32.to_le_bytes());
    }

    fn export(path: &Path) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        Split::open(path)?.expect("there is a file").write(&mut out, |_| object_file())?;
        Ok(out)
    }

    #[test]
    fn damage_never_gives_another_tar() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.split");
        let (_, _, tar) = sample(&path);
        let bytes = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x41;
            std::fs::write(&path, &bad).unwrap();
            match export(&path) {
                Ok(out) => assert_eq!(out, tar, "{at}"),
                Err(_) => refused += 1,
            }
            std::fs::write(&path, &bytes[..at]).unwrap();
            assert!(export(&path).is_err(), "cut at {at}");
        }
        // Harmless are the recorded digest and kind, which others look at, and hints of zstd.
        assert!(refused >= bytes.len() - 48, "{refused} of {}", bytes.len());
    }

    #[test]
    fn numbers_survive() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            varint(&mut bytes, value);
            assert_eq!(read_varint(&mut bytes.as_slice()).unwrap(), value);
        }
    }
}
