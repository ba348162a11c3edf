//! The guest's program, which every machine runs as its first process.

/// A static Linux executable. Empty in a program that was built on another system without one.
#[cfg(not(kiln_no_guest))]
pub(crate) static PROGRAM: &[u8] = include_bytes!(env!("KILN_GUEST_PROGRAM"));
/// A static Linux executable. Empty in a program that was built on another system without one.
#[cfg(kiln_no_guest)]
pub(crate) static PROGRAM: &[u8] = &[];

/// Its SHA-256, in hexadecimal digits: a template is of one guest. Every start asks for it, so the build has counted it.
#[cfg(not(kiln_no_guest))]
pub(crate) const DIGEST: &str = env!("KILN_GUEST_DIGEST");
/// The digest of no program.
#[cfg(kiln_no_guest)]
pub(crate) const DIGEST: &str = "";
