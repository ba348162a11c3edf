//! The numbers of tar headers: octal digits, or base 256 for what does not fit (GNU tar, star).

/// Reads a numeric field: octal digits between spaces and NULs, or, with the top bit of the first byte set, a two's
/// complement number of the remaining bits, most significant first. An empty field is 0.
///
/// `None` for anything else, and for what does not fit an `i64`.
pub(crate) fn parse(field: &[u8]) -> Option<i64> {
    match field.first() {
        None => Some(0),
        Some(first) if first & 0x80 != 0 => base256(field),
        Some(_) => octal(field),
    }
}

fn base256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let mut value: i64 = if negative { -1 } else { 0 };
    for (index, byte) in field.iter().enumerate() {
        // The marker bit is no part of the number: it is made a copy of the sign.
        let byte = if index == 0 { (byte & 0x7f) | if negative { 0x80 } else { 0 } } else { *byte };
        if index == 0 {
            value = if negative { i64::from(byte as i8) } else { i64::from(byte) };
        } else {
            value = value.checked_mul(256)?.checked_add(i64::from(byte))?;
        }
    }
    Some(value)
}

fn octal(field: &[u8]) -> Option<i64> {
    let start = field.iter().position(|byte| !matches!(byte, b' ' | 0)).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(|byte| matches!(byte, b' ' | 0)).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

/// Reads a decimal number of a PAX record: digits only.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Writes `value` as octal digits and a NUL; `false` if it does not fit.
pub(crate) fn write_octal(field: &mut [u8], value: u64) -> bool {
    let digits = field.len() - 1;
    let fits = digits * 3 >= 64 || value >> (digits * 3) == 0;
    let mut rest = if fits { value } else { 0 };
    for byte in field[..digits].iter_mut().rev() {
        *byte = b'0' + (rest & 7) as u8;
        rest >>= 3;
    }
    field[digits] = 0;
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_gnu_tar_writes_them() {
        let cases: &[(&[u8], Option<i64>)] = &[
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644\0junk", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"", Some(0)),
            (b"77777777777\0", Some(0o77777777777)),
            (b"777777777777", Some(0o777777777777)),
            (b"0000648\0", None),
            (b"-000001\0", None),
            (b"\x80\0\0\0\0\0\0\x01", Some(1)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(2 << 32)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ];
        for (field, expected) in cases {
            assert_eq!(parse(field), *expected, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn octal_fields_tell_when_a_number_does_not_fit() {
        for (size, value, fits) in
            [(8, 0o7777777, true), (8, 0o10000000, false), (12, 0o77777777777, true), (12, 1 << 33, false)]
        {
            let mut field = vec![0; size];
            assert_eq!(write_octal(&mut field, value), fits, "{value:o}");
            assert_eq!(parse(&field), Some(if fits { value as i64 } else { 0 }));
        }
    }

    #[test]
    fn decimals_are_digits_only() {
        for (text, expected) in [
            ("0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("-1", None),
            ("", None),
            ("1 ", None),
        ] {
            assert_eq!(decimal(text.as_bytes()), expected, "{text}");
        }
    }
}
