//! Sockets in a runtime of one thread.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as Blocking;

use kiln_contract::BackendError;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

/// A runtime of the calling thread.
pub(crate) fn runtime() -> Result<Runtime, BackendError> {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| BackendError::caused("cannot start an event loop", error))
}

/// Gives an open Unix socket to the runtime that the caller is in.
pub(crate) fn adopt(socket: OwnedFd) -> Result<UnixStream, BackendError> {
    let socket = Blocking::from(socket);
    socket
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(socket))
        .map_err(|error| BackendError::caused("cannot use a socket", error))
}
