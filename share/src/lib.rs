//! Directories and files of the host, shared with the guest of a machine over 9P2000.L.
//!
//! A [`Share`] is what is shared; [`Share::serve`] and [`Share::serve_async`] speak 9P over one byte stream for one mount. The
//! guest is untrusted: whatever it sends, it reads and changes nothing outside of what is shared, and nothing at
//! all through a share that is read-only. The client is that of Linux (`mount -t 9p -o trans=fd,version=9p2000.L`).
//!
//! ```no_run
//! use std::os::unix::net::UnixStream;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use kiln_share::{Options, Share};
//!
//! let share = Share::directory("/srv/data", Options { read_only: true, ..Options::default() })?;
//! let (ours, guests) = UnixStream::pair()?;
//! std::thread::spawn(move || share.serve(ours.try_clone().expect("a stream has two halves"), ours));
//! # drop(guests);
//! # Ok(())
//! # }
//! ```
//!
//! # How a guest is confined
//!
//! - Every step of a walk is one name, neither `.` nor `..` nor with a slash, looked up by `openat2` with
//!   `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS` in the descriptor of the directory that the step before
//!   gave. Symbolic links are given to the guest as text, and never followed here.
//! - A fid holds an `O_PATH` descriptor. Everything is done to that very file, never to a path that is looked up anew, so that
//!   there is no moment between a check and a use in which something else could take its place.
//! - Nothing but regular files and directories is ever opened. Devices, pipes and sockets are shown; pipes and
//!   sockets can be made, and are the guest's own when it opens them. Devices cannot be made.
//! - Memory is bounded: by the message size for each request in flight, and by the numbers of fids, locks and values of extended
//!   attributes.
//!
//! # What a guest may do
//!
//! All that this process may do below what is shared: there are no other checks here, since the guest's kernel makes those between
//! its own users. [`Ownership`] says whom files belong to.
//!
//! # Why this server is our own
//!
//! The crates that there are were looked at, and none can be the base. `p9` (of crosvm) walks `..` out of its root, opens devices
//! and pipes, refuses symbolic links and extended attributes, grants every lock without taking any, and does one request at
//! a time with 64 KiB at most. `rs9p` knows only names in UTF-8 and copies every message; its file server goes by paths, so it
//! loses races against renames. `jetstream_9p` is a wire format for a protocol of its own. What would remain of any of
//! them are the message definitions, which are the two smallest files here.

#[cfg(target_os = "linux")]
mod attributes;
#[cfg(not(target_os = "linux"))]
mod elsewhere;
mod error;
#[cfg(target_os = "linux")]
mod extended;
#[cfg(target_os = "linux")]
mod fid;
#[cfg(target_os = "linux")]
mod files;
#[cfg(target_os = "linux")]
mod listing;
#[cfg(target_os = "linux")]
mod locks;
#[cfg(target_os = "linux")]
mod message;
#[cfg(target_os = "linux")]
mod names;
#[cfg(target_os = "linux")]
mod node;
mod options;
#[cfg(target_os = "linux")]
mod qid;
#[cfg(target_os = "linux")]
mod requests;
#[cfg(target_os = "linux")]
mod serve;
#[cfg(target_os = "linux")]
mod serve_async;
#[cfg(target_os = "linux")]
mod session;
#[cfg(target_os = "linux")]
mod share;
#[cfg(target_os = "linux")]
mod walk;
#[cfg(target_os = "linux")]
mod wire;

#[cfg(not(target_os = "linux"))]
pub use elsewhere::{Share, raise_descriptor_limit};
pub use error::ShareError;
pub use options::{Options, Ownership};
#[cfg(target_os = "linux")]
pub use share::{Share, raise_descriptor_limit};
