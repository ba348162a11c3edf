//! How something fails in the guest: always one sentence for the host, and a kind.

use std::fmt::Display;
use std::io;

pub(crate) use kiln_link::message::{Failure, FailureKind};

/// `cannot {doing}: {error}`.
pub(crate) fn failed(doing: impl Display, error: impl Display) -> Failure {
    Failure { kind: FailureKind::Failed, what: format!("cannot {doing}: {error}") }
}

/// What makes no sense.
pub(crate) fn invalid(what: impl Into<String>) -> Failure {
    Failure { kind: FailureKind::Invalid, what: what.into() }
}

/// A failure on a path: of its own kind if there is nothing at it.
pub(crate) fn on_path(doing: &str, path: &[u8], error: &io::Error) -> Failure {
    let what = format!("cannot {doing} {}: {error}", String::from_utf8_lossy(path));
    let kind = match error.kind() {
        io::ErrorKind::NotFound => FailureKind::NotFound,
        _ => FailureKind::Failed,
    };
    Failure { kind, what }
}

/// Adds what was being done.
pub(crate) trait Doing<T> {
    /// The same, failing with `cannot {doing}: …`.
    fn doing(self, doing: impl Display) -> Result<T, Failure>;
}

impl<T, E: Display> Doing<T> for Result<T, E> {
    fn doing(self, doing: impl Display) -> Result<T, Failure> {
        self.map_err(|error| failed(doing, error))
    }
}

/// A line on the console: where people look when there is no link.
pub(crate) fn say(what: impl Display) {
    use std::io::Write as _;
    let _ = writeln!(io::stderr(), "kiln: {what}");
}
