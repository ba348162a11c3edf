//! Why what was typed cannot be turned into a specification.

use std::io;
use std::path::PathBuf;

/// A flag's value, or a setting of the image, that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    /// A value that cannot be read.
    #[error("invalid value `{value}` for {flag}: {why}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What was typed.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// Two flags that exclude each other.
    #[error("{0}")]
    Conflict(String),
    /// A file that a flag names cannot be read.
    #[error("cannot read the {what} `{}`", path.display())]
    File {
        /// What it is.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Nothing says what to run.
    #[error("nothing to run: the image `{image}` names no command, and none was given")]
    NoCommand {
        /// The image.
        image: String,
    },
    /// The image's config cannot be read.
    #[error("cannot read the config of the image `{image}`")]
    Config {
        /// The image.
        image: String,
        /// Why not.
        source: serde_json::Error,
    },
}

impl ResolveError {
    /// A value that cannot be read.
    pub(crate) fn value(flag: &'static str, value: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Value { flag, value: value.into(), why: why.into() }
    }

    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<&str> {
        match self {
            Self::NoCommand { .. } => Some("give the command after the image: kiln run IMAGE COMMAND"),
            // As `-vm` is read.
            Self::Value { flag: "--volume", value, .. } if value == "m" => {
                Some("a machine is asked for with two dashes: `--vm`")
            }
            Self::Value { flag: "--volume", .. } => {
                Some("a bind is `/path:/target` or `./path:/target`, a volume is `name:/target`")
            }
            Self::Value { flag: "--publish", .. } => {
                Some("for example 8080:80, 127.0.0.1:8080:80/tcp, 5353:53/udp")
            }
            _ => None,
        }
    }
}
