//! The data types of RFC 4251 §5.

use crate::SshError;

/// Reads fields one after the other. No field is longer than what is there.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    left: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, which are called `what` in errors.
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { left: bytes, what }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], SshError> {
        let (taken, left) = self.left.split_at_checked(count).ok_or(SshError::Malformed(self.what))?;
        self.left = left;
        Ok(taken)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, SshError> {
        self.take(1).map(|taken| taken[0])
    }

    pub(crate) fn boolean(&mut self) -> Result<bool, SshError> {
        self.byte().map(|byte| byte != 0)
    }

    pub(crate) fn number(&mut self) -> Result<u32, SshError> {
        let taken = self.take(4)?;
        Ok(u32::from_be_bytes([taken[0], taken[1], taken[2], taken[3]]))
    }

    pub(crate) fn long(&mut self) -> Result<u64, SshError> {
        let (high, low) = (self.number()?, self.number()?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    pub(crate) fn string(&mut self) -> Result<&'a [u8], SshError> {
        let length = self.number()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, SshError> {
        std::str::from_utf8(self.string()?).map_err(|_| SshError::Malformed(self.what))
    }

    /// A positive multiple-precision integer, without the zero that keeps it positive.
    pub(crate) fn integer(&mut self) -> Result<&'a [u8], SshError> {
        let bytes = self.string()?;
        if bytes.first().is_some_and(|first| first & 0x80 != 0) {
            return Err(SshError::Malformed(self.what));
        }
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        Ok(&bytes[zeros..])
    }
}

/// Writes fields.
pub(crate) trait Put {
    fn put_byte(&mut self, value: u8) -> &mut Self;
    fn put_number(&mut self, value: u32) -> &mut Self;
    fn put_long(&mut self, value: u64) -> &mut Self;
    fn put_string(&mut self, value: impl AsRef<[u8]>) -> &mut Self;
    fn put_integer(&mut self, value: &[u8]) -> &mut Self;
}

impl Put for Vec<u8> {
    fn put_byte(&mut self, value: u8) -> &mut Self {
        self.push(value);
        self
    }

    fn put_number(&mut self, value: u32) -> &mut Self {
        self.extend_from_slice(&value.to_be_bytes());
        self
    }

    fn put_long(&mut self, value: u64) -> &mut Self {
        self.extend_from_slice(&value.to_be_bytes());
        self
    }

    fn put_string(&mut self, value: impl AsRef<[u8]>) -> &mut Self {
        let value = value.as_ref();
        // No field of ours comes near the bound.
        self.put_number(u32::try_from(value.len()).unwrap_or(u32::MAX));
        self.extend_from_slice(value);
        self
    }

    fn put_integer(&mut self, value: &[u8]) -> &mut Self {
        let zeros = value.iter().take_while(|byte| **byte == 0).count();
        let value = &value[zeros..];
        let guard = value.first().is_some_and(|first| first & 0x80 != 0);
        self.put_number(u32::try_from(value.len() + usize::from(guard)).unwrap_or(u32::MAX));
        if guard {
            self.push(0);
        }
        self.extend_from_slice(value);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_written_as_the_standard_shows_them() {
        // The examples of RFC 4251 §5.
        let table: [(&[u8], &[u8]); 3] = [
            (&[], &[0, 0, 0, 0]),
            (
                &[0x09, 0xa3, 0x78, 0xf9, 0xb2, 0xe3, 0x32, 0xa7],
                &[0, 0, 0, 8, 0x09, 0xa3, 0x78, 0xf9, 0xb2, 0xe3, 0x32, 0xa7],
            ),
            (&[0x80], &[0, 0, 0, 2, 0, 0x80]),
        ];
        for (value, written) in table {
            let mut bytes = Vec::new();
            bytes.put_integer(value);
            assert_eq!(bytes, written);
            assert_eq!(Reader::new(&bytes, "integer").integer().unwrap(), value);
        }
        assert!(Reader::new(&[0, 0, 0, 1, 0xff], "integer").integer().is_err(), "negative");
    }

    #[test]
    fn a_length_beyond_the_end_is_an_error_and_no_allocation() {
        for bytes in [&[0xff, 0xff, 0xff, 0xff, 1][..], &[0, 0, 0, 2, 1], &[0, 0], &[]] {
            assert!(Reader::new(bytes, "string").string().is_err(), "{bytes:?}");
        }
    }
}
