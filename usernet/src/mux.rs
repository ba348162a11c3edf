//! What this crate needs of a multiplexer.

use std::io;

use tokio::io::{AsyncRead, AsyncWrite};

/// The service that carries TCP connections: each stream begins with SOCKS5 ([`crate::socks`]).
pub const TCP: u16 = 10;
/// The service that carries UDP and ICMP echo: each stream is one of frames ([`crate::datagram`]).
pub const UDP: u16 = 11;

/// Opens streams to the services of the other end of a link.
///
/// A stream whose writer was shut down (`AsyncWrite::poll_shutdown`) must give its reader at the other end an end of
/// file, and leave the other direction open. One that was dropped without that should give the other end an error, such
/// as `ConnectionReset`: where it gives an end of file instead, a connection that was reset looks as if it had ended.
pub trait Open: Send + Sync + 'static {
    /// A stream.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Opens a stream to a service. It need not wait for the other end to accept: the formats of this crate wait for
    /// an answer where they need one.
    ///
    /// # Errors
    /// Whatever the link says: that it is gone, or that it carries as many streams as it may.
    fn open(&self, service: u16) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}
