//! Numbers, strings and frames as 9P writes them: little-endian, every length in front of what it counts.
//!
//! ```text
//! frame    size[4] kind[1] tag[2] body[size - 7]      size counts itself
//! string   length[2] bytes[length]                    any bytes: no encoding is assumed
//! data     length[4] bytes[length]
//! qid      type[1] version[4] path[8]
//! ```

use rustix::io::Errno;

use crate::message::TFLUSH;

/// `size[4] kind[1] tag[2]`.
pub(crate) const HEADER: usize = 7;

/// What a reply to a read has before the data, and a write before its: the largest that Linux counts with
/// (`P9_IOHDRSZ`).
pub(crate) const IO_HEADER: u32 = 24;

/// A body that is not what its kind says: it ends too early or too late, or holds more than is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Reads a body from front to back; nothing is copied.
#[derive(Debug)]
pub(crate) struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    /// The next `count` bytes.
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    /// Nothing may be left.
    pub(crate) fn finish(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}

/// Something that a body consists of.
pub(crate) trait Field<'a>: Sized {
    fn decode(from: &mut Decoder<'a>) -> Result<Self, Malformed>;
}

macro_rules! numbers {
    ($($number:ty)*) => {$(
        impl Field<'_> for $number {
            fn decode(from: &mut Decoder<'_>) -> Result<Self, Malformed> {
                from.array().map(Self::from_le_bytes)
            }
        }
    )*};
}

numbers!(u8 u16 u32 u64);

/// A string.
impl<'a> Field<'a> for &'a [u8] {
    fn decode(from: &mut Decoder<'a>) -> Result<Self, Malformed> {
        let length = u16::decode(from)?;
        from.take(length.into())
    }
}

/// What is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Data<'a>(pub(crate) &'a [u8]);

impl<'a> Field<'a> for Data<'a> {
    fn decode(from: &mut Decoder<'a>) -> Result<Self, Malformed> {
        let length = u32::decode(from)?;
        from.take(usize::try_from(length).map_err(|_| Malformed)?).map(Self)
    }
}

/// The most names that one walk has (`P9_MAXWELEM`).
pub(crate) const MOST_NAMES: usize = 16;

/// The names of a walk, as they stand in the body; all of them are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Names<'a> {
    count: u16,
    encoded: &'a [u8],
}

impl<'a> Names<'a> {
    /// How many there are: at most [`MOST_NAMES`].
    pub(crate) fn len(&self) -> usize {
        self.count.into()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut from = Decoder::new(self.encoded);
        std::iter::from_fn(move || Field::decode(&mut from).ok())
    }
}

impl<'a> Field<'a> for Names<'a> {
    fn decode(from: &mut Decoder<'a>) -> Result<Self, Malformed> {
        let count = u16::decode(from)?;
        if usize::from(count) > MOST_NAMES {
            return Err(Malformed);
        }
        let all = from.rest;
        for _ in 0..count {
            <&[u8]>::decode(from)?;
        }
        Ok(Self { count, encoded: &all[..all.len() - from.rest.len()] })
    }
}

/// Tells one file from another, and one state of it from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Qid {
    /// [`Qid::DIRECTORY`], [`Qid::SYMLINK`] or [`Qid::FILE`].
    pub(crate) kind: u8,
    /// Changes when the file does; never 0, which tells clients not to cache it.
    pub(crate) version: u32,
    /// No two files have the same.
    pub(crate) path: u64,
}

impl Qid {
    pub(crate) const DIRECTORY: u8 = 0x80;
    pub(crate) const SYMLINK: u8 = 0x02;
    pub(crate) const FILE: u8 = 0x00;
    /// How many bytes it is written in.
    pub(crate) const SIZE: usize = 13;
}

/// A reply under construction. The buffer behind it is used again for the next one and never shrinks, so that
/// it is cleared once only.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    buffer: Vec<u8>,
    end: usize,
}

impl Reply {
    /// Begins anew, behind the header.
    pub(crate) fn clear(&mut self) {
        self.end = HEADER;
    }

    /// The next `count` bytes, to be filled in part or whole and then [kept](Self::keep).
    pub(crate) fn space(&mut self, count: usize) -> &mut [u8] {
        let end = self.end + count;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        &mut self.buffer[self.end..end]
    }

    /// Makes `count` bytes of what [`Self::space`] gave part of the reply.
    pub(crate) fn keep(&mut self, count: usize) {
        self.end = self.buffer.len().min(self.end + count);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.space(bytes.len()).copy_from_slice(bytes);
        self.keep(bytes.len());
        self
    }

    pub(crate) fn u8(&mut self, number: u8) -> &mut Self {
        self.bytes(&[number])
    }

    pub(crate) fn u16(&mut self, number: u16) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, number: u32) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, number: u64) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    /// A string. One that is too long for its length is none that a client could have named or a host could hold.
    pub(crate) fn string(&mut self, bytes: &[u8]) -> Result<&mut Self, Errno> {
        let length = u16::try_from(bytes.len()).map_err(|_| Errno::NAMETOOLONG)?;
        Ok(self.u16(length).bytes(bytes))
    }

    pub(crate) fn qid(&mut self, qid: Qid) -> &mut Self {
        self.u8(qid.kind).u32(qid.version).u64(qid.path)
    }

    /// Data whose length is not known before they are there: room for `count` bytes behind room for their length.
    pub(crate) fn data(
        &mut self,
        count: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let space = self.space(4 + count);
        let filled = fill(&mut space[4..])?.min(count);
        // What fits in a frame fits in its length.
        let length = u32::try_from(filled).map_err(|_| Errno::MSGSIZE)?;
        space[..4].copy_from_slice(&length.to_le_bytes());
        self.keep(4 + filled);
        Ok(())
    }

    /// How long the frame is now.
    pub(crate) fn len(&self) -> usize {
        self.end
    }

    /// Writes the header; the frame is whole.
    pub(crate) fn seal(&mut self, kind: u8, tag: u16) {
        // A reply is never longer than the message size, which fits.
        let size = u32::try_from(self.end).unwrap_or(u32::MAX);
        if self.buffer.len() < HEADER {
            self.buffer.resize(HEADER, 0);
        }
        self.buffer[..4].copy_from_slice(&size.to_le_bytes());
        self.buffer[4] = kind;
        self.buffer[5..HEADER].copy_from_slice(&tag.to_le_bytes());
    }

    /// What was sealed.
    pub(crate) fn frame(&self) -> &[u8] {
        &self.buffer[..self.end]
    }
}

/// The answer to a flush: a header and nothing more.
pub(crate) fn rflush(tag: u16) -> [u8; HEADER] {
    let [low, high] = tag.to_le_bytes();
    [HEADER as u8, 0, 0, 0, TFLUSH + 1, low, high]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_data_and_names_end_where_their_lengths_say_and_not_behind_the_body() {
        let strings: &[(&[u8], Option<&[u8]>)] = &[
            (b"\x00\x00", Some(b"")),
            (b"\x02\x00\xff\x00", Some(b"\xff\x00")),
            (b"\x02\x00a", None),
            (b"\x02", None),
            (b"", None),
        ];
        for (bytes, expected) in strings {
            let found = <&[u8]>::decode(&mut Decoder::new(bytes)).ok();
            assert_eq!(found, *expected, "{bytes:?}");
        }
        let huge = [0xff, 0xff, 0xff, 0xff, 1];
        assert_eq!(Data::decode(&mut Decoder::new(&huge)), Err(Malformed));
        assert_eq!(Data::decode(&mut Decoder::new(&[1, 0, 0, 0, 7])), Ok(Data(&[7])));

        let mut sixteen = vec![16, 0];
        sixteen.extend([1, 0, b'a'].repeat(16));
        let names = Names::decode(&mut Decoder::new(&sixteen)).unwrap();
        assert_eq!(names.iter().collect::<Vec<_>>(), [b"a"; 16]);
        let rest = [1, 0, 1, 0, b'a', b'b'];
        let mut from = Decoder::new(&rest);
        let names = Names::decode(&mut from).unwrap();
        assert_eq!(
            (names.len(), names.iter().collect::<Vec<_>>(), from.rest),
            (1, vec![&b"a"[..]], &b"b"[..])
        );
        let mut seventeen = vec![17, 0];
        seventeen.extend([1, 0, b'a'].repeat(17));
        assert_eq!(Names::decode(&mut Decoder::new(&seventeen)), Err(Malformed));
    }

    #[test]
    fn a_reply_is_written_over_the_one_before() {
        let mut reply = Reply::default();
        reply.clear();
        reply.u64(u64::MAX).u32(7);
        reply.seal(1, 2);
        assert_eq!(reply.frame().len(), HEADER + 12);
        reply.clear();
        reply.u8(3).string(b"ab").unwrap();
        reply.seal(9, 0x0102);
        assert_eq!(reply.frame(), [12, 0, 0, 0, 9, 2, 1, 3, 2, 0, b'a', b'b']);
        reply.clear();
        let fill = |space: &mut [u8]| {
            space[..2].copy_from_slice(b"xy");
            Ok(2)
        };
        reply.data(5, fill).unwrap();
        reply.seal(9, 1);
        assert_eq!(reply.frame(), [13, 0, 0, 0, 9, 1, 0, 2, 0, 0, 0, b'x', b'y']);
        assert_eq!(reply.string(&[0; 65536]).map(|_| ()), Err(Errno::NAMETOOLONG));
    }
}
