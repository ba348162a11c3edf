//! What a workload wrote, kept as JSON lines.
//!
//! ```text
//! {"time":"2026-11-21T02:35:20.123456789Z","stream":"stdout","log":"hello\n"}
//! {"time":"2026-11-21T02:35:20.223456789Z","stream":"stderr","base64":"/wAK"}
//! ```
//!
//! One entry a line, with its newline; a line longer than 16 KiB is several entries, of which only the last has one.
//! Bytes that are not UTF-8 are kept in `base64`. A file that has grown to 10 MiB becomes `log.jsonl.1`, that one
//! `log.jsonl.2`, and that one goes. Nothing but appending is ever done to a file, so that readers can follow.

mod reader;
#[cfg_attr(target_os = "linux", path = "watch/linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "watch/macos.rs")]
mod watch;
mod writer;

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use kiln_contract::{LogLine, LogStream};
use serde::{Deserialize, Serialize};

pub(crate) use reader::read;
pub(crate) use writer::LogWriter;

/// A file that has this size is not appended to any more.
const MAX_FILE: u64 = 10 << 20;
/// So many files are kept, the newest included.
const FILES: u32 = 3;
/// A longer line is several entries.
const MAX_LINE: usize = 16 << 10;

/// The `n`th oldest but the newest: 0 is the log itself.
fn rotated(log: &Path, n: u32) -> PathBuf {
    if n == 0 {
        return log.to_owned();
    }
    let mut name = log.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Entry<'a> {
    time: Timestamp,
    stream: LogStream,
    #[serde(skip_serializing_if = "Option::is_none", default, borrow)]
    log: Option<std::borrow::Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    base64: Option<String>,
}

fn encode(out: &mut Vec<u8>, time: Timestamp, stream: LogStream, bytes: &[u8]) {
    let entry = match std::str::from_utf8(bytes) {
        Ok(text) => Entry { time, stream, log: Some(text.into()), base64: None },
        Err(_) => Entry { time, stream, log: None, base64: Some(STANDARD.encode(bytes)) },
    };
    // Writing an entry to memory cannot fail.
    let _ = serde_json::to_writer(&mut *out, &entry);
    out.push(b'\n');
}

/// `None` for what a killed writer left of a line, and for what is no entry at all.
fn decode(line: &[u8]) -> Option<LogLine> {
    let entry: Entry<'_> = serde_json::from_slice(line).ok()?;
    let bytes = match (entry.log, entry.base64) {
        (Some(text), None) => text.into_owned().into_bytes(),
        (None, Some(text)) => STANDARD.decode(text).ok()?,
        _ => return None,
    };
    Some(LogLine { time: entry.time, stream: entry.stream, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_every_byte() {
        for bytes in [&b"hello\n"[..], b"", b"\xff\x00\n", "gr\u{fc}n \u{1}\"\\\n".as_bytes()] {
            let mut line = Vec::new();
            let time = Timestamp::now();
            encode(&mut line, time, LogStream::Stderr, bytes);
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            let back = decode(&line).unwrap();
            assert_eq!((back.bytes.as_slice(), back.time, back.stream), (bytes, time, LogStream::Stderr));
            assert_eq!(decode(&line[..line.len() / 2]), None, "a torn line is no entry");
        }
    }

    #[test]
    fn the_format_of_version_1_can_still_be_read() {
        let text = br#"{"time":"2026-11-21T02:35:20.123456789Z","stream":"stdout","log":"hello\n"}"#;
        let binary = br#"{"time":"2026-11-21T02:35:20.1Z","stream":"stderr","base64":"/wAK"}"#;
        assert_eq!(decode(text).unwrap().bytes, b"hello\n");
        assert_eq!(decode(binary).unwrap().bytes, b"\xff\0\n");
    }
}
