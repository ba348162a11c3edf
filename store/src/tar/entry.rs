//! Entries: headers and all that extends them.

use kiln_erofs::{Device, Time, Xattrs};

use super::header::{BLOCK, Header, text};
use super::number;
use super::pax::{self, LIMIT, Pax};
use crate::{Result, StoreError};

/// Where a tar comes from. Everything that is read here, as opposed to the data of files, is no file's content and
/// has to be kept so that the archive can be made again.
pub(crate) trait TarSource {
    /// The next block; `false` at the end of the stream if that comes between blocks.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool>;
    /// The next `length` bytes, which the caller has bounded.
    fn bytes(&mut self, length: usize) -> Result<Vec<u8>>;
    /// Passes over `length` bytes.
    fn skip(&mut self, length: u64) -> Result<()>;
    /// Bytes read so far.
    fn offset(&self) -> u64;
}

/// What a tar, or a table of contents of one, says of one name. Its data, if any, come next in a tar, then padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// As the tar has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When it was changed.
    pub mtime: Time,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// What a name is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A file.
    Regular {
        /// Bytes of data in the tar.
        size: u64,
        /// Where they belong, if the tar has only a part of the file.
        sparse: Option<Sparse>,
    },
    /// A directory.
    Directory,
    /// A link to this path.
    Symlink(Vec<u8>),
    /// A further name of what has this name.
    HardLink(Vec<u8>),
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
}

/// A file of which the tar has only a part; the rest is zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sparse {
    pub(crate) real_size: u64,
    /// Offset and length of what the archive has: ascending, not overlapping, of the entry's size in sum.
    pub(crate) segments: Vec<(u64, u64)>,
}

/// Bytes between the end of `size` bytes of data and the next block.
pub(crate) fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// Reads up to and including the next entry's headers. `None` at the end marker (two blocks of zeros), which is then
/// consumed, or where the stream ends between entries.
pub(crate) fn next(source: &mut impl TarSource) -> Result<Option<LayerEntry>> {
    let mut block = [0; BLOCK];
    let mut long = Long::default();
    loop {
        let offset = source.offset();
        let fail = |what: String| StoreError::Tar { offset, what };
        if !source.block(&mut block)? {
            return if long.any { Err(fail("it ends after an extended header".into())) } else { Ok(None) };
        }
        if block == [0; BLOCK] {
            if source.block(&mut block)? && block != [0; BLOCK] {
                // Programs do not agree on what follows here: an archive that means two things is refused.
                return Err(fail("a lone block of zeros".into()));
            }
            return if long.any { Err(fail("it ends after an extended header".into())) } else { Ok(None) };
        }
        let header = Header::new(&block).ok_or_else(|| fail("a header has a wrong checksum".into()))?;
        let size = header.size().ok_or_else(|| fail("a header's size is no number".into()))?;
        let size = u64::try_from(size).map_err(|_| fail(format!("an entry has the size {size}")))?;
        match header.kind() {
            b'L' => long.name = Some(text(&extension(source, offset, size)?).to_owned()),
            b'K' => long.link = Some(text(&extension(source, offset, size)?).to_owned()),
            b'x' | b'X' => long.pax = pax::parse(&extension(source, offset, size)?).map_err(fail)?,
            // Defaults for all that follows, comments in practice: container tools do not apply them either.
            // Volume labels and the like say nothing about files.
            b'g' | b'V' | b'M' | b'N' => {
                source.skip(size)?;
                source.skip(padding(size))?;
                continue;
            }
            _ => return entry(source, &header, size, long).map(Some),
        }
        long.any = true;
    }
}

#[derive(Default)]
struct Long {
    any: bool,
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Pax,
}

fn extension(source: &mut impl TarSource, offset: u64, size: u64) -> Result<Vec<u8>> {
    if size > LIMIT {
        let what = format!("an extended header of {size} bytes (at most {LIMIT} are read)");
        return Err(StoreError::Tar { offset, what });
    }
    let bytes = source.bytes(size as usize)?;
    source.skip(padding(size))?;
    Ok(bytes)
}

fn entry(source: &mut impl TarSource, header: &Header<'_>, size: u64, long: Long) -> Result<LayerEntry> {
    let Long { name, link, pax, .. } = long;
    let sparse_name = pax.sparse.name.clone();
    let path = name.or(sparse_name).or_else(|| pax.path.clone()).unwrap_or_else(|| header.name());
    let fail = |what: String| StoreError::Entry { path: path.clone(), what };
    let field =
        |name: &str, value: Option<i64>| value.ok_or_else(|| fail(format!("its {name} is no number")));
    let id = |name: &str, pax: Option<u64>, value: Option<i64>| {
        let value = match pax {
            Some(value) => i128::from(value),
            None => i128::from(field(name, value)?),
        };
        u32::try_from(value).map_err(|_| fail(format!("its {name} is {value}")))
    };
    let size = pax.size.unwrap_or(size);
    if size > i64::MAX as u64 {
        return Err(fail(format!("its size is {size}")));
    }
    let link = || link.or(pax.link.clone()).unwrap_or_else(|| header.link());
    let device = || {
        let number =
            |value: i64| u32::try_from(value).map_err(|_| fail(format!("its device number is {value}")));
        let (major, minor) = header.device().ok_or_else(|| fail("its device number is no number".into()))?;
        Ok::<_, StoreError>(Device { major: number(major)?, minor: number(minor)? })
    };
    let kind = match header.kind() {
        0 if path.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' | b'7' => pax_regular(source, &path, size, &pax)?,
        b'S' => gnu_sparse(source, header, &path, size)?,
        b'1' => EntryKind::HardLink(link()),
        b'2' => EntryKind::Symlink(link()),
        b'3' => EntryKind::CharDevice(device()?),
        b'4' => EntryKind::BlockDevice(device()?),
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        other => return Err(fail(format!("its type is `{}`, which is not known", other.escape_ascii()))),
    };
    let mtime = match pax.mtime {
        Some(time) => time,
        None => Time { seconds: field("modification time", header.mtime())?, nanoseconds: 0 },
    };
    Ok(LayerEntry {
        mode: (field("mode", header.mode())? & 0o7777) as u32,
        uid: id("owner", pax.uid, header.uid())?,
        gid: id("group", pax.gid, header.gid())?,
        path,
        kind,
        mtime,
        xattrs: pax.xattrs,
    })
}

fn pax_regular(source: &mut impl TarSource, path: &[u8], size: u64, pax: &Pax) -> Result<EntryKind> {
    let fail = |what: &'static str| StoreError::Entry { path: path.to_owned(), what: what.to_owned() };
    let (size, segments) = match (&pax.sparse.map, pax.sparse.in_data) {
        (_, true) => map_in_data(source, path, size)?,
        (Some(map), false) => (size, map.clone()),
        (None, false) => return Ok(EntryKind::Regular { size, sparse: None }),
    };
    let real_size = pax.sparse.real_size.ok_or_else(|| fail("a sparse file without its size"))?;
    let sparse = Sparse { real_size, segments }.checked(size).map_err(fail)?;
    Ok(EntryKind::Regular { size, sparse: Some(sparse) })
}

/// The map of format 1.0: decimal numbers, a line each (how many pairs; offset, length; …), padded to a block.
fn map_in_data(source: &mut impl TarSource, path: &[u8], size: u64) -> Result<(u64, Vec<(u64, u64)>)> {
    let fail = || StoreError::Entry { path: path.to_owned(), what: "its sparse map is malformed".to_owned() };
    let mut text = Vec::new();
    let (mut at, mut count, mut numbers) = (0, None, Vec::new());
    loop {
        while let Some(end) = text[at..].iter().position(|byte| *byte == b'\n') {
            let value = number::decimal(&text[at..at + end]).ok_or_else(fail)?;
            at += end + 1;
            match count {
                None => count = Some(value.checked_mul(2).filter(|count| *count < LIMIT).ok_or_else(fail)?),
                Some(_) => numbers.push(value),
            }
            if count == Some(numbers.len() as u64) {
                let pairs = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                return Ok((size.checked_sub(text.len() as u64).ok_or_else(fail)?, pairs));
            }
        }
        if text.len() as u64 >= LIMIT.min(size) {
            return Err(fail());
        }
        text.extend_from_slice(&source.bytes(BLOCK)?);
    }
}

fn gnu_sparse(source: &mut impl TarSource, header: &Header<'_>, path: &[u8], size: u64) -> Result<EntryKind> {
    let fail = |what: &'static str| StoreError::Entry { path: path.to_owned(), what: what.to_owned() };
    let malformed = || fail("its sparse map is malformed");
    let (inline, mut more, real_size) = header.sparse().ok_or_else(malformed)?;
    let mut segments = Vec::new();
    let mut read = |fields: &[u8]| {
        for pair in fields.chunks_exact(24).take_while(|pair| pair[0] != 0) {
            let number = |field: &[u8]| number::parse(field).and_then(|value| u64::try_from(value).ok());
            segments.push((number(&pair[..12])?, number(&pair[12..])?));
        }
        (segments.len() as u64 * 24 < LIMIT * 16).then_some(())
    };
    read(inline).ok_or_else(malformed)?;
    while more {
        let block = source.bytes(BLOCK)?;
        read(&block[..504]).ok_or_else(malformed)?;
        more = block[504] != 0;
    }
    let real_size = u64::try_from(real_size).map_err(|_| malformed())?;
    let sparse = Sparse { real_size, segments }.checked(size).map_err(fail)?;
    Ok(EntryKind::Regular { size, sparse: Some(sparse) })
}

impl Sparse {
    fn checked(mut self, size: u64) -> std::result::Result<Self, &'static str> {
        // The last pair of a map may be empty and only mark the end.
        self.segments.retain(|(_, length)| *length > 0);
        let (mut end, mut sum) = (0_u64, 0_u64);
        for (offset, length) in &self.segments {
            if *offset < end {
                return Err("its sparse map is not in order");
            }
            end = offset.checked_add(*length).ok_or("its sparse map overflows")?;
            sum += length;
        }
        if end > self.real_size || self.real_size > i64::MAX as u64 {
            return Err("its sparse map goes beyond its size");
        }
        if sum != size {
            return Err("its sparse map does not fit its data");
        }
        Ok(self)
    }
}
