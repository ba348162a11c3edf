//! The guest's program, which every machine runs as its first process.

use std::sync::LazyLock;

use kiln_contract::Digest;

/// A static Linux executable. Empty in a program that was built on another system without one.
#[cfg(not(kiln_no_guest))]
pub(crate) static PROGRAM: &[u8] = include_bytes!(env!("KILN_GUEST_PROGRAM"));
/// A static Linux executable. Empty in a program that was built on another system without one.
#[cfg(kiln_no_guest)]
pub(crate) static PROGRAM: &[u8] = &[];

/// Its digest: a template is of one guest.
pub(crate) static DIGEST: LazyLock<Digest> = LazyLock::new(|| Digest::of(PROGRAM));
