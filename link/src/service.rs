//! The services that a stream may be opened to, with the numbers that vsock users know.
//!
//! A stream begins with its service's number, two bytes, little-endian; the rest is the service's own.

/// TCP connections by SOCKS5 (RFC 1928). The guest opens it to reach others; the host, to reach ports of the guest.
pub const TCP: u16 = 10;
/// UDP datagrams.
pub const UDP: u16 = 11;
/// 9P2000.L. The stream begins with the share's number, two bytes, little-endian.
pub const SHARE: u16 = 12;
/// Control: one [`Request`](crate::message::Request) from the host, one [`Answer`](crate::message::Answer) from the guest,
/// and for some requests more after that.
pub const CONTROL: u16 = 13;
/// A process's streams: [`Input`](crate::message::Input) from the host, [`Output`](crate::message::Output) from the guest.
pub const PROCESS: u16 = 14;
/// The SSH server of the guest. The stream begins with an [`SshServer`](crate::message::SshServer).
pub const SSH: u16 = 22;
