//! The user-space network, both halves at work: a network namespace is the guest, with a real TUN device; another is the
//! host; a third, at the end of a wire, is the world. Only the link between guest and host is made of socket pairs.

#![cfg(target_os = "linux")]
#![allow(unreachable_pub, reason = "the parts of this program are its own")]

#[path = "../lab/mod.rs"]
mod lab;

mod bulk;
mod datagrams;
mod device;
mod hostile;
mod names;
mod policy;
mod publish;
mod tcp;
mod world;
