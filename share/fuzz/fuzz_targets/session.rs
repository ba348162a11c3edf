//! A hostile guest gets errors: `cargo +nightly fuzz run session`, as an ordinary user.
//!
//! The bytes are a session: the first says whether what follows is a stream as it is, or bodies, each behind its kind and
//! its length in two bytes, which are put into right frames. Either comes behind a greeting that gives the fids 0 (the root) and 1 (a
//! file). Whatever comes, nothing beside the shared directory may change.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use kiln_share::{Options, Share};

const GREETING: &[u8] = b"\x15\0\0\0\x64\xff\xff\0\0\x01\0\x08\09P2000.L\
    \x17\0\0\0\x68\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0\xff\xff\xff\xff\
    \x17\0\0\0\x6e\0\0\0\0\0\0\x01\0\0\0\x01\0\x04\0file";

/// One for all runs: `shared` in it, and `secret` beside that.
static HOST: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let host = tempfile::tempdir().expect("a directory");
    fs::create_dir(host.path().join("shared")).expect("a directory");
    fs::write(host.path().join("secret"), "secret").expect("a file");
    host
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let host = HOST.path();
    fs::write(host.join("shared/file"), "content").ok();
    let Some((first, mut rest)) = bytes.split_first() else { return };
    let mut stream = GREETING.to_vec();
    if first & 1 == 0 {
        stream.extend(rest);
    } else {
        while let [kind, low, high, behind @ ..] = rest {
            let length = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len());
            let (body, next) = behind.split_at(length);
            stream.extend((length as u32 + 7).to_le_bytes());
            stream.extend([*kind, 1, 0]);
            stream.extend(body);
            rest = next;
        }
    }
    // One thread: a run is the same every time.
    let options = Options { requests: 1, fids: 64, ..Options::default() };
    let share = Share::directory(host.join("shared"), options).expect("a share");
    let _ = share.serve(&stream[..], std::io::sink());
    assert_eq!(fs::read(host.join("secret")).expect("the secret"), b"secret");
    assert_eq!(fs::read_dir(host).expect("the directory").count(), 2);
    // What sessions leave would slow the next ones down.
    for entry in fs::read_dir(host.join("shared")).into_iter().flatten().flatten() {
        if fs::remove_file(entry.path()).is_err() {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
});
