//! The host's half of `usernet`: an ordinary process that dials for a guest which has no other way out.
//!
//! A [`Gateway`] is what one guest's packets would meet on their way: its policy, the names it knows, what it may take of the
//! host. Whoever has the link to the guest hands the streams that the guest opens to [`Gateway::serve_tcp`] and
//! [`Gateway::serve_udp`], and gives [`Published`] a way to open streams to the guest:
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use kiln_net::usernet::{Gateway, GatewayOptions};
//! # async fn accept() -> (u16, tokio::io::DuplexStream) { std::future::pending().await }
//! # async fn example() {
//! let gateway = Arc::new(Gateway::new(GatewayOptions { guest: "web".into(), ..GatewayOptions::default() }));
//! loop {
//!     let (service, stream) = accept().await;
//!     let gateway = Arc::clone(&gateway);
//!     match service {
//!         kiln_usernet::TCP => drop(tokio::spawn(async move { gateway.serve_tcp(stream).await })),
//!         kiln_usernet::UDP => drop(tokio::spawn(async move { gateway.serve_udp(stream).await })),
//!         _ => drop(stream),
//!     }
//! }
//! # }
//! ```
//!
//! What the guest sees as its gateway is the host: port 53 there is a resolver ([`Names`] first, then the host's name
//! servers, which are asked the same question and answer with whatever record it was about); the other ports are the
//! ports of the host's loopback, for guests whose policy has `host-loopback`.
//!
//! The guest is not trusted: everything it opens is counted ([`GatewayLimits`]), every frame is bounded by its format,
//! nothing waits for it without a time-out or a place in a bounded queue, and no log line is written more often than a few times
//! a second.

mod counters;
mod dial;
mod echo;
mod errors;
mod forward;
mod gateway;
mod grants;
mod names;
mod neighbours;
mod publish;
mod resolver;
mod udp;

pub use counters::Counters;
pub use forward::Upstreams;
pub use gateway::{Gateway, GatewayLimits, GatewayOptions};
pub use names::{Machine, NameTable, Names, Route};
pub use neighbours::Neighbours;
pub use publish::Published;
