//! The tar format, read and written.
//!
//! The parser is our own. A layer has to come back byte for byte, its times to the nanosecond and also before 1970,
//! and what container engines accept must be accepted (repeated extended headers, long names beside PAX paths):
//! `tar-core` 0.1 cuts times to whole positive seconds and refuses the latter. It follows Go's `archive/tar`, with
//! which images are made and unpacked nearly everywhere, where tar programs differ.

pub(crate) mod entry;
pub(crate) mod header;
pub(crate) mod number;
pub(crate) mod pax;
pub(crate) mod write;
