//! What can go wrong with a share as a whole; what goes wrong with one request is told to the guest only.

use std::io;
use std::path::PathBuf;

/// A share cannot be made, or its session with a guest ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The path that is to be shared is not there, or this process may not see it.
    #[error("cannot share {}: {source}", path.display())]
    Open {
        /// As it was asked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is there is not what was to be shared.
    #[error("cannot share {}: it is not a {wanted}", path.display())]
    WrongKind {
        /// As it was asked for.
        path: PathBuf,
        /// `directory` or `regular file`.
        wanted: &'static str,
    },
    /// Files are opened through this process's own directory of descriptors.
    #[error("cannot share {}: /proc is not that of this process; mount procfs at /proc", path.display())]
    NoProc {
        /// What was to be shared.
        path: PathBuf,
    },
    /// This system cannot confine what a guest asks for.
    #[error("cannot share {}: files are shared with machines on Linux only", path.display())]
    Unsupported {
        /// What was to be shared.
        path: PathBuf,
    },
    /// A limit in the options is outside of its range.
    #[error("cannot share with {name} = {value}: it must be {range}")]
    Limit {
        /// The option.
        name: &'static str,
        /// What it was set to.
        value: usize,
        /// What it may be.
        range: &'static str,
    },
    /// The stream broke, or the guest left in the middle of a message.
    #[error("the stream of the share {share} broke while {action}: {source}")]
    Stream {
        /// The share's path.
        share: String,
        /// What was being done with it.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What came is not 9P, so that nothing behind it can be read either.
    #[error(
        "the guest does not speak 9P on the share {share}: a message of {size} bytes, where {limit} are the most and 7 the least"
    )]
    Framing {
        /// The share's path.
        share: String,
        /// What the message says of its size.
        size: u32,
        /// The message size that was agreed on.
        limit: u32,
    },
}
