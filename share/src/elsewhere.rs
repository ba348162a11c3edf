//! Systems without `openat2`: nothing that a guest names could be kept within what is shared, so nothing is.

use std::path::Path;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::{Options, ShareError};

/// A directory or a file of the host. There is none on this system.
#[derive(Debug, Clone)]
pub enum Share {}

impl Share {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn directory(path: impl AsRef<Path>, _: Options) -> Result<Self, ShareError> {
        Err(ShareError::Unsupported { path: path.as_ref().to_owned() })
    }

    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn file(path: impl AsRef<Path>, options: Options) -> Result<Self, ShareError> {
        Self::directory(path, options)
    }

    /// Is never called, for want of a share.
    ///
    /// # Errors
    /// None.
    pub async fn serve_async(
        &self,
        _: impl AsyncRead + Unpin,
        _: impl AsyncWrite + Unpin,
    ) -> Result<(), ShareError> {
        match *self {}
    }
}

/// Leaves this process's limit of open descriptors as it is.
pub fn raise_descriptor_limit() {}
