//! The host-guest protocol of machines.
//!
//! Host and guest have one ordered byte stream between them: a virtio-serial port, a vsock connection, a framework's
//! socket. On it lie, from the bottom up:
//!
//! 1. [`frame`]s, which mark the points at which a machine may be saved. How a link goes from one life of a machine to
//!    the next (boot, restore, fork) is told in [`carrier`].
//! 2. A multiplexer (yamux), anew for every life: a [`Session`] with [`Stream`]s, each of which is opened to one of the
//!    numbered [`service`]s.
//! 3. On services 13 and 14, length-prefixed CBOR [`message`]s.
//!
//! Neither end trusts the other with a length: every frame, message, number of streams and window has a bound.
//!
//! ```
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
//! # runtime.block_on(async {
//! use kiln_link::{GuestLink, HostLink, message::Hello, service};
//! use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
//!
//! let (host, guest) = tokio::io::duplex(4096);
//! let guest = tokio::spawn(async move {
//!     let mut link = GuestLink::new(guest, Hello::default());
//!     let mut session = link.next_session().await.unwrap();
//!     let (service, mut stream) = session.accept().await.unwrap();
//!     assert_eq!(service, service::CONTROL);
//!     stream.write_all(b"hi").await.unwrap();
//!     stream.shutdown().await.unwrap();
//!     assert!(session.accept().await.is_none(), "until the host has gone");
//! });
//! let link = HostLink::greet(host).await.unwrap();
//! let session = link.begin().await.unwrap();
//! let mut stream = session.open(service::CONTROL).await.unwrap();
//! let mut answer = String::new();
//! stream.read_to_string(&mut answer).await.unwrap();
//! assert_eq!(answer, "hi");
//! drop(session);
//! # guest.await.unwrap();
//! # });
//! ```

pub mod carrier;
mod error;
pub mod frame;
#[doc(hidden)]
pub mod fuzzing;
pub mod message;
mod mux;
pub mod service;
mod wire;

pub use carrier::{GuestLink, Hold, HostLink, HostSession, Parked, Parker};
pub use error::LinkError;
pub use mux::{Inbound, Opener, Session, Stream};

/// The version of this protocol. Both ends must have the same: a guest is built together with its host, and a template
/// made by another version is rebuilt.
pub const VERSION: u32 = 1;
