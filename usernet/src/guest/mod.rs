//! The guest's half: a TUN device, and a TCP/IP stack at its other end.
//!
//! [`Tun::create`] makes the device and its routes, before anything runs that wants a network. [`run`] then carries
//! what the kernel sends there, until it is dropped. [`serve_tcp`] and [`serve_udp`] take the streams that the
//! host opens for published ports.
//!
//! # The stack
//!
//! TCP is smoltcp's, one `Interface` with one socket for each connection, so that a packet costs the same whether there is
//! one connection or thousands. Beside it were judged, in the middle of 2026: `ipstack` and `netstack-smoltcp` answer a SYN
//! before their user has seen it, so that every connection seems to be made and a refusal comes as a reset; both also hand
//! each packet through channels, and `netstack-smoltcp` keeps all connections in one socket set behind a lock that every
//! packet walks through. lwIP is C. What smoltcp leaves out does not matter on a device that neither loses nor
//! reorders: its congestion control is off, and it keeps no state after a connection's end.
//!
//! The kernel and this stack hand each other segments of up to 64 KiB with checksums left out
//! (`IFF_VNET_HDR`, `TUN_F_CSUM`, `TUN_F_TSO*`, both directions): under emulation, summing would cost more than all else.
//!
//! Fragments of IPv4 are put together ([`Limits`] says how many); those of IPv6 are dropped, since a device this wide makes
//! none and routers may not.

mod config;
mod device;
mod flows;
mod fragments;
mod inward;
mod netlink;
mod packet;
mod stack;
mod tcp;
mod tun;

pub use config::{GuestError, Limits, Subnet, TunConfig};
pub use device::{DeviceConfig, become_tap, set_up};
pub use inward::{serve_tcp, serve_udp};
pub use stack::run;
pub use tun::Tun;
