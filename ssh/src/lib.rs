//! SSH as machines speak it: keys, and the server's side of one connection.
//!
//! The host makes [`KeyPair`]s; the guest [`serve`]s connections with them. A connection goes through
//!
//! 1. packets, in the clear and then encrypted, with exchanges of keys in between (RFC 4253, 8731);
//! 2. the client's proof that it has a key that may enter (RFC 4252);
//! 3. channels, each with a window of its own in both directions (RFC 4254): sessions, and connections that are forwarded.
//!
//! What runs in a session is the [`Handler`]'s business; for the subsystem that carries files there is [`sftp`].
//!
//! There is one algorithm of each kind, which every client of the last ten years has: `curve25519-sha256`, `ssh-ed25519`,
//! `chacha20-poly1305@openssh.com`. The primitives are `ring`'s. Users may bring Ed25519 (also on a FIDO token), ECDSA and RSA
//! keys. Every length, number of channels, requests and attempts has a bound, and nothing that a client sends is kept beyond
//! the window that it was granted.

mod auth;
mod channel;
mod error;
mod kex;
mod keys;
mod message;
mod server;
pub mod sftp;
mod transport;
mod wire;

pub use channel::{Channel, Closed, Event, Opener, Opening, Request, Size};
pub use error::SshError;
pub use keys::{KeyPair, PublicKey};
pub use server::{Handler, Identity, serve};
