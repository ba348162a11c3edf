//! How making a container process fails.

use std::path::PathBuf;

use kiln_accounts::AccountError;
use kiln_contract::{BackendError, ErrorKind};

/// A container process that could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    /// Exit code 127.
    #[error("cannot run `{command}`: no such command in the container")]
    CommandNotFound {
        /// As it was given.
        command: String,
    },
    /// Exit code 126.
    #[error("cannot run `{command}`: {reason}")]
    CommandNotExecutable {
        /// As it was given.
        command: String,
        /// Why the kernel refused.
        reason: String,
    },
    /// Something in the instance's settings makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// This host, or this user, cannot have it.
    #[error("{0}")]
    Unsupported(String),
    /// A system call on a file failed.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// A verb: «read», «write».
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The kernel's word.
        source: std::io::Error,
    },
    /// A system call on something that is not a file failed.
    #[error("cannot {doing}: {source}")]
    System {
        /// A verb and its object.
        doing: &'static str,
        /// The kernel's word.
        source: std::io::Error,
    },
    /// The runtime, in this process or not, said no.
    #[error("{runtime} cannot {doing} the container: {reason}")]
    Runtime {
        /// `Kiln` itself, or the program's path.
        runtime: String,
        /// A verb.
        doing: &'static str,
        /// Its own words.
        reason: String,
    },
}

impl From<AccountError> for RuntimeError {
    fn from(error: AccountError) -> Self {
        match error {
            AccountError::Io { path, source } => Self::Io { doing: "read", path, source },
            other => Self::Invalid(other.to_string()),
        }
    }
}

impl From<RuntimeError> for BackendError {
    fn from(error: RuntimeError) -> Self {
        let kind = match &error {
            RuntimeError::CommandNotFound { .. } => ErrorKind::CommandNotFound,
            RuntimeError::CommandNotExecutable { .. } => ErrorKind::CommandNotExecutable,
            RuntimeError::Invalid(_) => ErrorKind::Invalid,
            RuntimeError::Unsupported(_) => ErrorKind::Unsupported,
            RuntimeError::Io { .. } | RuntimeError::System { .. } | RuntimeError::Runtime { .. } => {
                ErrorKind::Failed
            }
        };
        Self::new(kind, error.to_string())
    }
}
