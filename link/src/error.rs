//! What can go wrong on a link.

use std::io;
use std::time::Duration;

/// A failed exchange with the other end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The stream broke.
    #[error("the link broke: {0}")]
    Io(#[from] io::Error),
    /// The other end closed the stream.
    #[error("the other end closed the link")]
    Closed,
    /// A frame or a message is longer than it may be.
    #[error("the other end announced {length} bytes for {what}, which has at most {most}")]
    TooLong {
        /// `a frame`, `a message`.
        what: &'static str,
        /// What was announced, in bytes.
        length: u64,
        /// The bound, in bytes.
        most: u64,
    },
    /// A frame of a kind that nobody sends at this point.
    #[error("the other end sent {got} where {expected} was due")]
    Unexpected {
        /// What came.
        got: String,
        /// What should have come.
        expected: &'static str,
    },
    /// A message that cannot be read.
    #[error("the other end sent a message that cannot be read: {0}")]
    Message(String),
    /// The two ends speak different versions.
    #[error("the guest speaks version {theirs} of the link, this program version {ours}")]
    Version {
        /// This end's.
        ours: u32,
        /// The other end's.
        theirs: u32,
    },
    /// Nothing came in time.
    #[error("the guest did not {what} within {} s", .after.as_secs_f32())]
    TimedOut {
        /// What it should have done: `say hello`, `park`.
        what: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// The multiplexer gave up.
    #[error("the link's multiplexer gave up: {0}")]
    Mux(String),
}
