//! Files that are looked at now and then.

use std::os::fd::OwnedFd;
use std::path::Path;

/// No handle: who follows a log looks again by himself.
pub(super) fn watch(_: &Path) -> Option<OwnedFd> {
    None
}
