//! PAX extended headers (POSIX.1-2001, `pax` interchange format): records `<length> <key>=<value>\n`.

use std::collections::BTreeMap;

use kiln_erofs::{Time, Xattrs};

use super::number::decimal;

/// The most that one extended header, long name or sparse map may take: as much as Go's `archive/tar` allows.
pub(crate) const LIMIT: u64 = 1 << 20;

/// What an extended header says about the next entry, as far as a layer needs it.
#[derive(Debug, Default)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    pub(crate) mtime: Option<Time>,
    pub(crate) xattrs: Xattrs,
    pub(crate) sparse: PaxSparse,
}

/// The three ways in which GNU tar wrote sparse files into PAX headers.
#[derive(Debug, Default)]
pub(crate) struct PaxSparse {
    /// 1.0: the map stands before the data.
    pub(crate) in_data: bool,
    /// 0.0 and 0.1: the map itself.
    pub(crate) map: Option<Vec<(u64, u64)>>,
    pub(crate) real_size: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
}

/// Reads the records of one extended header. Keys that say nothing to a layer are passed over; an empty value takes
/// an earlier one back.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn parse(mut data: &[u8]) -> Result<Pax, String> {
    let mut records: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    let mut pairs: Vec<(u64, u64)> = Vec::new();
    let mut offset = None;
    while !data.is_empty() {
        let (key, value, rest) = record(data).ok_or("a PAX record is malformed")?;
        data = rest;
        match key {
            b"GNU.sparse.offset" => offset = Some(decimal_of(key, value)?),
            b"GNU.sparse.numbytes" => {
                let start = offset.take().ok_or("GNU.sparse.numbytes without GNU.sparse.offset")?;
                pairs.push((start, decimal_of(key, value)?));
            }
            _ => {
                records.insert(key, value);
            }
        }
    }
    let mut pax = Pax::default();
    let (mut major, mut minor) = (None, None);
    for (key, value) in records {
        if value.is_empty() && !key.starts_with(XATTR) {
            continue;
        }
        match key {
            b"path" => pax.path = Some(name(key, value)?),
            b"linkpath" => pax.link = Some(name(key, value)?),
            b"size" => pax.size = Some(decimal_of(key, value)?),
            b"uid" => pax.uid = Some(decimal_of(key, value)?),
            b"gid" => pax.gid = Some(decimal_of(key, value)?),
            b"mtime" => pax.mtime = Some(time(value).ok_or_else(|| bad(key, value))?),
            b"GNU.sparse.major" => major = Some(decimal_of(key, value)?),
            b"GNU.sparse.minor" => minor = Some(decimal_of(key, value)?),
            b"GNU.sparse.name" => pax.sparse.name = Some(name(key, value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                pax.sparse.real_size = Some(decimal_of(key, value)?);
            }
            b"GNU.sparse.map" => pairs = map(value).ok_or_else(|| bad(key, value))?,
            _ => {
                if let Some(xattr) = key.strip_prefix(XATTR) {
                    if xattr.is_empty() || xattr.len() > 255 || xattr.contains(&0) {
                        return Err(bad(key, value));
                    }
                    pax.xattrs.insert(xattr.to_owned(), value.to_owned());
                }
            }
        }
    }
    match (major, minor) {
        (Some(1), Some(0)) => pax.sparse.in_data = true,
        (None | Some(0), _) if pax.sparse.real_size.is_some() => pax.sparse.map = Some(pairs),
        (None | Some(0), _) => {}
        (Some(major), minor) => {
            return Err(format!("sparse format {major}.{} is not known", minor.unwrap_or(0)));
        }
    }
    Ok(pax)
}

const XATTR: &[u8] = b"SCHILY.xattr.";

fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&data[..space])?).ok()?;
    let body = data.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    if equals == 0 {
        return None;
    }
    Some((&body[..equals], &body[equals + 1..], &data[length..]))
}

fn bad(key: &[u8], value: &[u8]) -> String {
    format!(
        "PAX record `{}` has the value `{}`",
        key.escape_ascii(),
        value[..value.len().min(80)].escape_ascii()
    )
}

fn decimal_of(key: &[u8], value: &[u8]) -> Result<u64, String> {
    decimal(value).ok_or_else(|| bad(key, value))
}

fn name(key: &[u8], value: &[u8]) -> Result<Vec<u8>, String> {
    if value.contains(&0) { Err(bad(key, value)) } else { Ok(value.to_owned()) }
}

fn map(value: &[u8]) -> Option<Vec<(u64, u64)>> {
    let numbers: Vec<u64> = value.split(|byte| *byte == b',').map(decimal).collect::<Option<_>>()?;
    if !numbers.len().is_multiple_of(2) {
        return None;
    }
    Some(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// `[-]seconds[.fraction]`; digits beyond nanoseconds are cut off.
fn time(value: &[u8]) -> Option<Time> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let point = value.iter().position(|byte| *byte == b'.').unwrap_or(value.len());
    let seconds = i64::try_from(decimal(&value[..point])?).ok()?;
    let fraction = value.get(point + 1..).unwrap_or_default();
    let mut nanoseconds = 0_u32;
    for index in 0..9 {
        let digit = fraction.get(index).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return None;
        }
        nanoseconds = nanoseconds * 10 + u32::from(digit - b'0');
    }
    Some(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds },
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

/// Appends one record.
pub(crate) fn write_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // The length counts its own digits.
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_1970_are_read_to_the_nanosecond() {
        for (text, seconds, nanoseconds) in [
            ("0", 0, 0),
            ("1.5", 1, 500_000_000),
            ("1700000000.123456789", 1_700_000_000, 123_456_789),
            ("1.0000000019", 1, 1),
            ("-1", -1, 0),
            ("-0.5", -1, 500_000_000),
            ("-1.25", -2, 750_000_000),
            ("7.", 7, 0),
        ] {
            assert_eq!(time(text.as_bytes()), Some(Time { seconds, nanoseconds }), "{text}");
        }
        for text in ["", "-", ".5", "1,5", "1.x", "--1", "99999999999999999999"] {
            assert_eq!(time(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn records_are_written_with_a_length_that_counts_itself() {
        for length in [0, 1, 85, 86, 87, 88, 980, 981, 990, 9970, 9980, 9990] {
            let (key, value) = (b"path".as_slice(), vec![b'x'; length]);
            let mut out = Vec::new();
            write_record(&mut out, key, &value);
            assert_eq!(record(&out), Some((key, value.as_slice(), b"".as_slice())), "{length}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for data in [
            "5 a=\n",
            "x a=b\n",
            "6 a=b",
            "600 a=b\n",
            "7 =abc\n",
            "6 abc\n",
            "-6 a=b\n",
            "1 a=b\n",
            "0 a=b\n",
        ] {
            assert!(parse(data.as_bytes()).is_err() || data == "5 a=\n", "{data}");
        }
    }
}
