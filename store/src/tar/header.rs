//! One 512-byte tar header: V7, ustar (POSIX.1-1988), GNU and star.

use super::number;

/// Headers, and the padding of data, come in blocks of this size.
pub(crate) const BLOCK: usize = 512;

/// A header block whose checksum is right.
#[derive(Debug)]
pub(crate) struct Header<'b> {
    block: &'b [u8; BLOCK],
}

/// Which fields a header has beyond those of V7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<'b> Header<'b> {
    /// Checks the checksum. Some old programs summed signed bytes; both sums are good.
    pub(crate) fn new(block: &'b [u8; BLOCK]) -> Option<Self> {
        let stated = number::parse(&block[148..156])?;
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (index, byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&index) { b' ' } else { *byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte as i8);
        }
        (stated == unsigned || stated == signed).then_some(Self { block })
    }

    fn format(&self) -> Format {
        match (&self.block[257..263], &self.block[263..265]) {
            (b"ustar\0", _) if &self.block[508..512] == b"tar\0" => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", b" \0") => Format::Gnu,
            _ => Format::V7,
        }
    }

    /// The entry's type.
    pub(crate) fn kind(&self) -> u8 {
        self.block[156]
    }

    /// The name with its prefix, if the format has one.
    pub(crate) fn name(&self) -> Vec<u8> {
        let name = text(&self.block[..100]);
        let prefix = match self.format() {
            Format::Ustar => text(&self.block[345..500]),
            Format::Star => text(&self.block[345..476]),
            Format::V7 | Format::Gnu => b"",
        };
        if prefix.is_empty() { name.to_owned() } else { [prefix, b"/", name].concat() }
    }

    /// The target of a link.
    pub(crate) fn link(&self) -> Vec<u8> {
        text(&self.block[157..257]).to_owned()
    }

    pub(crate) fn mode(&self) -> Option<i64> {
        number::parse(&self.block[100..108])
    }

    pub(crate) fn uid(&self) -> Option<i64> {
        number::parse(&self.block[108..116])
    }

    pub(crate) fn gid(&self) -> Option<i64> {
        number::parse(&self.block[116..124])
    }

    pub(crate) fn size(&self) -> Option<i64> {
        number::parse(&self.block[124..136])
    }

    pub(crate) fn mtime(&self) -> Option<i64> {
        number::parse(&self.block[136..148])
    }

    /// Major and minor number of a device.
    pub(crate) fn device(&self) -> Option<(i64, i64)> {
        if self.format() == Format::V7 {
            return Some((0, 0));
        }
        Some((number::parse(&self.block[329..337])?, number::parse(&self.block[337..345])?))
    }

    /// The old GNU sparse fields: four segments, whether more follow in a block of their own, the expanded size.
    pub(crate) fn sparse(&self) -> Option<(&'b [u8], bool, i64)> {
        if self.format() != Format::Gnu {
            return None;
        }
        Some((&self.block[386..482], self.block[482] != 0, number::parse(&self.block[483..495])?))
    }
}

/// A field up to its first NUL.
pub(crate) fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}
