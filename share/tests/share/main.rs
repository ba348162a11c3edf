//! Shares as a guest sees them: a client that writes its own messages, and Linux's.
#![cfg(target_os = "linux")]

mod client;
mod confinement;
mod hostile;
mod linux;
mod locks;
mod messages;
mod names;
mod ownership;
mod streams;
