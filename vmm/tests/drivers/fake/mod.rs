//! A stand-in for Firecracker: its API as documented, and nothing behind it that executes anything.
//!
//! It follows `src/firecracker/swagger/firecracker.yaml`, `docs/vsock.md` and `docs/snapshotting/snapshot-support.md` of
//! Firecracker 1.14, strictly: methods and paths, required, known and unknown fields and their types, what is allowed before and
//! after the start, what a snapshot needs and holds, error shapes, what becomes of vsock connections. Its guest speaks the link
//! and answers one request. What it cannot show is whether the real program does what its documentation says.

// It is a program, and speaks as one.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod api;
mod guest;
mod server;

use std::path::Path;
use std::process::ExitCode;

/// What it answers for its version.
const VERSION: &str = "1.14.1";

/// Is Firecracker, if this program was started as that.
pub(crate) fn main() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["--version"] => {
            print!("Firecracker v{VERSION}\n\nSupported snapshot data format versions:\nv8.0.0\n");
            Some(ExitCode::SUCCESS)
        }
        ["--api-sock", socket, "--log-path", log, "--level", "Warning"] => {
            assert!(Path::new(log).exists(), "the log's file is not there");
            Some(server::serve(Path::new(socket)))
        }
        [first, ..] if first.starts_with("--api") || first.starts_with("--log") => {
            eprintln!("unknown arguments: {words:?}");
            Some(ExitCode::from(153))
        }
        _ => None,
    }
}
