//! How a connection ends before its time.

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SshError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// The client left in the middle of something.
    #[error("the client went away")]
    Ended,
    /// A field or packet that cannot be read.
    #[error("the client sent a malformed {0}")]
    Malformed(&'static str),
    /// Something that must not come at this point, or more of it than there may be.
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
    /// Both sides have no such algorithm in common.
    #[error("client and server have no {0} in common")]
    NoCommon(&'static str),
    /// A packet, signature or key exchange that does not add up.
    #[error("a cryptographic check failed: {0}")]
    Crypto(&'static str),
    /// Nobody proved to be somebody who may enter.
    #[error("the client offered no key that is authorised")]
    NotAuthorised,
}
