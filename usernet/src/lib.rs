//! Network for machines without an interface or a privilege on the host: the guest's half, and the formats both halves
//! speak.
//!
//! ```text
//!            the guest                                                 the host
//!  ┌──────────────────────────────┐                       ┌────────────────────────────────┐
//!  │ programs ── kernel ── TUN    │   streams of a mux    │  kiln-net: policy, resolver    │
//!  │                        │     │   over one link       │      │                         │
//!  │  guest::run: TCP/IP ───┴─────┼─ 10: SOCKS5 ─────────▶│  a TCP socket for each         │
//!  │                              │─ 11: datagrams ──────▶│  UDP and ping sockets          │
//!  │  guest::serve_tcp, serve_udp │◀ 10, 11 ──────────────│  published ports               │
//!  └──────────────────────────────┘                       └────────────────────────────────┘
//! ```
//!
//! 1. A program in the guest connects. The kernel routes the SYN into the TUN device.
//! 2. The guest's half opens a stream of service [`TCP`] and asks for the address with SOCKS5 `CONNECT` ([`socks`]).
//! 3. The host's half decides by its policy, dials, and says how that ended. Only then is the SYN answered: by a
//!    SYN-ACK, by RST where the other end or the policy refused, by ICMP where there is no way.
//! 4. From then on the stream carries the bytes of the connection and nothing else. The end of either direction is
//!    the stream's end of that direction; a reset is a stream that ends without one.
//!
//! UDP and echo requests (ping) travel as frames on a stream of service [`UDP`], one stream for each source port or
//! identifier ([`datagram`]). The name server that the guest sees at its gateway's port 53 is the host's: queries go to
//! the name [`RESOLVER`].
//!
//! The multiplexer is not this crate's: whoever has one implements [`Open`].
//!
//! The two formats:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use kiln_usernet::{Target, socks};
//!
//! let (mut guest, mut host) = tokio::io::duplex(4096);
//! let asking = tokio::spawn(async move { socks::connect(&mut guest, &"192.0.2.7:80".parse()?).await });
//! let target = socks::accept(&mut host).await?;
//! assert_eq!(target, Target::Address("192.0.2.7:80".parse()?));
//! socks::answer(&mut host, socks::Reply::Refused).await?;
//! assert_eq!(asking.await?.unwrap_err().reply(), Some(socks::Reply::Refused));
//! # Ok(()) }
//! ```

pub mod datagram;
#[cfg(target_os = "linux")]
pub mod guest;
mod mux;
pub mod socks;
mod splice;
mod target;

pub use mux::{Open, TCP, UDP};
pub use splice::{Carried, splice};
pub use target::{Target, WireError};

/// The name under which the guest's half asks for the host's resolver, at port 53, on either service.
pub const RESOLVER: &str = "dns.kiln.internal";
