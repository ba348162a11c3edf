//! One mount in which every process sees the view of its nearest ancestor that has one.
//!
//! Where a process cannot have a mount namespace of its own, all see the same mounts. What they are shown in one of them
//! can still be different: a FUSE request tells which process asks.
//!
//! 1. [`connect_or_start`] finds the service of a home, or starts it: a process that mounts and serves, and answers gRPC on
//!    `$KILN_HOME/router/socket`, to its owner only (`proto/router.proto`).
//! 2. [`Client::mount`] shows a recorded view to a process. The first view at a path mounts the router there.
//! 3. Whoever asks for the root of that mount, or a name in it, is looked up ([`Processes`]), and gets the answer of its view's
//!    server. What lies below has numbers of one view only, and is not asked for again.
//! 4. A view whose last process has ended is taken away, the mount with its last view, and a service without views ends.
//!
//! To whom a view is shown is in its record, so that the next service shows it again when one was killed.

pub mod ancestry;
pub mod api;
mod client;
mod processes;
#[cfg(target_os = "linux")]
mod routes;
#[cfg(target_os = "linux")]
mod service;
#[cfg(target_os = "linux")]
pub(crate) mod stale;

pub use self::ancestry::{Ancestry, Host, Process};
pub use self::client::Client;
pub use self::processes::Processes;
#[cfg(target_os = "linux")]
pub use self::service::{IDLE, Launch, connect_or_start, serve, start, this_program};

/// The name of the socket in the router's directory.
const SOCKET: &str = "socket";
