//! Every way in which a command fails, and what is said about it.

use std::io;

use kiln_boot::BootError;
use kiln_contract::{BackendError, ErrorKind};
use kiln_instance::archive::ArchiveError;
use kiln_registry::RegistryError;
use kiln_store::StoreError;

use crate::resolve::ResolveError;

/// A command that failed. Shown as `error: …`, a `caused by: …` line for each cause, and a `hint: …` line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// What was typed makes no sense, although each flag by itself does.
    #[error("{what}")]
    Usage {
        /// What is wrong with it.
        what: String,
        /// What to type instead.
        hint: Option<String>,
    },
    /// A flag, or the image's own settings, could not be turned into a specification.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// A back end failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A registry, or an archive of images, failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A file of the host could not be used.
    #[error("{what}")]
    File {
        /// What was being done, to which file.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Files could not be put into an archive, or taken out of one.
    #[error("{what}")]
    Archive {
        /// What was being done, to what.
        what: String,
        /// At which entry, and why, it failed.
        source: ArchiveError,
    },
    /// Standard output could not be written to.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    /// Results could not be written as JSON.
    #[error("cannot write the result as JSON")]
    Json(#[from] serde_json::Error),
    /// Anything else.
    #[error("{what}")]
    Failed {
        /// What was being done, to what, why it failed.
        what: String,
        /// What the user can do about it.
        hint: Option<String>,
    },
    /// Same as another failure, with a further suggestion.
    #[error("{inner}")]
    Hinted {
        /// The failure.
        #[source]
        inner: Flattened,
        /// What the user can do about it.
        hint: String,
    },
    /// Some of several targets failed; each was reported already.
    #[error("some of the targets failed")]
    Reported,
}

/// A failure inside another that adds nothing to its text: its own text is not repeated as a cause.
#[derive(Debug)]
pub(crate) struct Flattened(pub(crate) Box<CliError>);

impl std::fmt::Display for Flattened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Flattened {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.0)
    }
}

impl From<BootError> for CliError {
    fn from(error: BootError) -> Self {
        Self::Backend(error.into())
    }
}

/// What commands return.
pub(crate) type Result<T> = std::result::Result<T, CliError>;

impl CliError {
    /// A combination of flags that makes no sense.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), hint: None }
    }

    /// A failure with nothing below it.
    pub(crate) fn failed(what: impl Into<String>) -> Self {
        Self::Failed { what: what.into(), hint: None }
    }

    /// A failed system call on a file of the host.
    pub(crate) fn file(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::File { what: what.into(), source: source.into() }
    }

    /// A failed archive.
    pub(crate) fn archive(what: impl Into<String>) -> impl FnOnce(ArchiveError) -> Self {
        let what = what.into();
        move |source| Self::Archive { what, source }
    }

    /// Adds, or replaces, what the user can do about it.
    pub(crate) fn with_hint(self, text: impl Into<String>) -> Self {
        let text = text.into();
        match self {
            Self::Usage { what, .. } => Self::Usage { what, hint: Some(text) },
            Self::Failed { what, .. } => Self::Failed { what, hint: Some(text) },
            Self::Backend(error) => Self::Backend(error.hint(text)),
            Self::Hinted { inner, .. } => Self::Hinted { inner, hint: text },
            other => Self::Hinted { inner: Flattened(Box::new(other)), hint: text },
        }
    }

    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. } | Self::Failed { hint, .. } => hint.clone(),
            Self::Resolve(error) => error.hint().map(str::to_owned),
            Self::Store(error) => error.hint(),
            Self::Registry(error) => error.hint(),
            Self::Backend(error) => error.hint_text().map(str::to_owned),
            Self::Hinted { hint, .. } => Some(hint.clone()),
            _ => None,
        }
    }

    /// Which kind of failure a back end said it was.
    pub(crate) fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Backend(error) => Some(error.kind()),
            Self::Hinted { inner, .. } => inner.0.kind(),
            _ => None,
        }
    }

    /// Whether nobody reads our output any more.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        match self {
            Self::Output(error) => error.kind() == io::ErrorKind::BrokenPipe,
            // An archive on standard output, or something in it.
            Self::Registry(RegistryError::Io { path, source, .. }) => {
                path.starts_with("-") && source.kind() == io::ErrorKind::BrokenPipe
            }
            Self::Json(error) => error.io_error_kind() == Some(io::ErrorKind::BrokenPipe),
            _ => false,
        }
    }

    /// All lines that say it, without colours: the error, its causes, the hint.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("error", self.to_string())];
        let mut source = match self {
            // Their text is already in the first line.
            Self::Hinted { inner, .. } => std::error::Error::source(inner),
            other => std::error::Error::source(other),
        };
        while let Some(cause) = source {
            let text = cause.to_string();
            if lines.last().is_none_or(|(_, above)| !above.ends_with(&text)) {
                lines.push(("caused by", text));
            }
            source = cause.source();
        }
        lines.extend(self.hint().map(|hint| ("hint", hint)));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_followed_by_its_causes_and_a_hint() {
        let inner = io::Error::from_raw_os_error(2);
        let error = CliError::file("cannot read the label file `x`", inner).with_hint("make it first");
        let lines = error.lines();
        assert_eq!(lines[0], ("error", "cannot read the label file `x`".to_owned()));
        assert_eq!(lines[1].0, "caused by");
        assert!(lines[1].1.contains("No such file"), "{lines:?}");
        assert_eq!(lines[2], ("hint", "make it first".to_owned()));
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn a_cause_that_its_effect_already_quotes_is_not_repeated() {
        let inner = io::Error::other("disk on fire");
        let error = CliError::file("cannot open x: disk on fire", inner);
        assert_eq!(error.lines().len(), 1);
    }

    #[test]
    fn hints_of_back_ends_are_shown() {
        let error = CliError::from(BackendError::unsupported("no").hint("try yes"));
        assert_eq!(error.hint().as_deref(), Some("try yes"));
        assert_eq!(error.kind(), Some(ErrorKind::Unsupported));
    }
}
