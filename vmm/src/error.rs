//! What can go wrong with a hypervisor.

use std::io;
use std::path::PathBuf;

use kiln_contract::{BackendError, ErrorKind};

/// A hypervisor that did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// Its program is not there.
    #[error("cannot run machines: {program} is not installed")]
    Missing {
        /// What was looked for.
        program: String,
        /// What the user can do to have it: one clause.
        get: String,
    },
    /// It needs KVM.
    #[error("cannot run machines with {hypervisor}, which needs KVM: {because}")]
    NoKvm {
        /// Its name.
        hypervisor: &'static str,
        /// What is wrong with KVM.
        because: String,
    },
    /// It is older than what is asked of it.
    #[error("cannot run machines: {} is version {version}, and {oldest} is the oldest that can be used", program.display())]
    TooOld {
        /// Its path.
        program: PathBuf,
        /// What it is.
        version: String,
        /// What it must be.
        oldest: String,
    },
    /// A path that cannot be said to it.
    #[error("the hypervisor takes only paths in UTF-8, and {} is not", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// It ended, with its last words.
    #[error("{program} ended: {words}")]
    Ended {
        /// Its path.
        program: PathBuf,
        /// The end of what it wrote to standard error.
        words: String,
    },
    /// It refused.
    #[error("the hypervisor refused `{command}`: {words}")]
    Refused {
        /// What it was told.
        command: &'static str,
        /// Its words.
        words: String,
    },
    /// It answered what makes no sense.
    #[error("the hypervisor's answer to `{command}` makes no sense: {words}")]
    Nonsense {
        /// What it was told.
        command: &'static str,
        /// What is wrong with the answer.
        words: String,
    },
    /// A saved state that is none, or is not of this machine.
    #[error("{} is not a saved machine: {why}", path.display())]
    NotASave {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It cannot be given a network device.
    #[error("{hypervisor} cannot use a network device that Kiln made")]
    NoDevice {
        /// Its name.
        hypervisor: &'static str,
    },
    /// A system call failed.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done, to what.
        doing: String,
        /// The kernel's word.
        source: io::Error,
    },
}

impl VmmError {
    #[cfg(target_os = "linux")]
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

impl From<VmmError> for BackendError {
    fn from(error: VmmError) -> Self {
        let kind = match &error {
            VmmError::Missing { .. }
            | VmmError::NoKvm { .. }
            | VmmError::TooOld { .. }
            | VmmError::NoDevice { .. } => ErrorKind::Unsupported,
            VmmError::Path { .. } => ErrorKind::Invalid,
            _ => ErrorKind::Failed,
        };
        let hint = match &error {
            VmmError::Missing { get, .. } => Some(get.clone()),
            VmmError::NoKvm { .. } => Some("--hypervisor qemu works without it".to_owned()),
            VmmError::NoDevice { .. } => {
                Some("choose --hypervisor qemu, or a network that needs no device".to_owned())
            }
            VmmError::Path { .. } => Some("set KILN_HOME to another directory".to_owned()),
            _ => None,
        };
        let error = Self::new(kind, error.to_string());
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}
