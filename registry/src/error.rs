//! What can go wrong between a registry, an archive and the store.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kiln_contract::{ByteSize, Digest, HumanDuration, Platform};
use kiln_store::StoreError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, RegistryError>;

/// What failed, where, and why. [`RegistryError::hint`] says what the user can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No connection, or it broke and stayed broken.
    #[error("cannot {doing}: no connection to {registry}: {reason}")]
    Unreachable {
        /// What was being done: `read the manifest of …`.
        doing: String,
        /// Host and port.
        registry: String,
        /// Why, from the innermost cause.
        reason: String,
    },
    /// The peer's certificate is not trusted, or TLS failed otherwise.
    #[error("cannot {doing}: {registry} cannot be trusted: {reason}")]
    Tls {
        /// What was being done.
        doing: String,
        /// Host and port.
        registry: String,
        /// What TLS said.
        reason: String,
    },
    /// Nothing came for too long, on every attempt.
    #[error("cannot {doing}: {registry} sent nothing for {} ({attempts} attempts)", HumanDuration(*.waited))]
    TimedOut {
        /// What was being done.
        doing: String,
        /// Host and port.
        registry: String,
        /// How long nothing came, each time.
        waited: Duration,
        /// How often it was tried.
        attempts: u32,
    },
    /// An answer that is no success.
    #[error("cannot {doing}: {registry} answered {status}{}", colon(.message))]
    Status {
        /// What was being done.
        doing: String,
        /// Host and port.
        registry: String,
        /// HTTP status.
        status: u16,
        /// What the registry said about it; may be empty.
        message: String,
    },
    /// The registry wants fewer requests than were made, even after waiting.
    #[error("cannot {doing}: {registry} limits the rate of requests{}", wait(.retry_after))]
    RateLimited {
        /// What was being done.
        doing: String,
        /// Host and port.
        registry: String,
        /// How long the registry asked to wait, if it did.
        retry_after: Option<Duration>,
    },
    /// Access refused.
    #[error("cannot {doing}: {registry} denies access to `{repository}`{}", colon(.reason))]
    Denied {
        /// What was being done.
        doing: String,
        /// Host and port.
        registry: String,
        /// Repository without the registry; empty for a login.
        repository: String,
        /// What the registry said, and what was wrong with the credentials; may be empty.
        reason: String,
        /// Whether credentials were sent.
        with_credentials: bool,
    },
    /// The registry does not have it.
    #[error("`{name}` was not found in {registry}")]
    NotFound {
        /// The reference that was asked for.
        name: String,
        /// Host and port.
        registry: String,
    },
    /// It is not in the store, and pulling was forbidden.
    #[error("`{name}` is not in the store, and pulling it is not allowed (pull policy `never`)")]
    NotLocal {
        /// The reference.
        name: String,
    },
    /// Only a part of it is in the store, and nobody is known to have the rest.
    #[error("only a part of image {} is in the store, and no registry is known to have it", image.short())]
    NotWhole {
        /// The image.
        image: Digest,
    },
    /// A part of a blob was asked for, and did not come.
    #[error("{registry} gave no part of layer {digest}")]
    NoParts {
        /// The layer.
        digest: Digest,
        /// Host and port.
        registry: String,
    },
    /// Content is not what its name says.
    #[error("{what} of `{name}` has the wrong digest: expected {expected}, got {actual}")]
    WrongDigest {
        /// `layer`, `config`, `manifest`.
        what: &'static str,
        /// The image it belongs to.
        name: String,
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// Content of another length than its descriptor says.
    #[error(
        "{what} {digest} of `{name}` has the wrong size: expected {expected} bytes, {registry} sent {actual}"
    )]
    WrongSize {
        /// `layer`, `config`, `manifest`.
        what: &'static str,
        /// The image it belongs to.
        name: String,
        /// Which one.
        digest: Digest,
        /// Who sent it.
        registry: String,
        /// Bytes according to the descriptor.
        expected: u64,
        /// Bytes that came or were announced.
        actual: u64,
    },
    /// The connection ended before the content did, on every attempt.
    #[error("{what} {digest} of `{name}` ends early: {registry} sent {got} of {expected} bytes")]
    Truncated {
        /// `layer`, `config`.
        what: &'static str,
        /// The image it belongs to.
        name: String,
        /// Which one.
        digest: Digest,
        /// Who sent it.
        registry: String,
        /// Bytes that came.
        got: u64,
        /// Bytes according to the descriptor.
        expected: u64,
    },
    /// Larger than is accepted.
    #[error("{what} of `{name}` is too large: {}, and at most {} are accepted", size_text(.size), ByteSize(*.limit))]
    TooLarge {
        /// `manifest`, `config`.
        what: &'static str,
        /// The image.
        name: String,
        /// Bytes, where they are known.
        size: Option<u64>,
        /// The limit in bytes.
        limit: u64,
    },
    /// No image for this platform.
    #[error("`{name}` has no image for {wanted}; it has {}", platforms(.available))]
    NoPlatform {
        /// The reference.
        name: String,
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        available: Vec<String>,
    },
    /// Config and manifest contradict each other.
    #[error("the manifest of `{name}` has {layers} layers, but its config has {diff_ids} diff_ids")]
    LayerCount {
        /// The image.
        name: String,
        /// Layers in the manifest.
        layers: usize,
        /// Entries of `rootfs.diff_ids`.
        diff_ids: usize,
    },
    /// A document that cannot be read.
    #[error("{what} of `{name}` cannot be read: {reason}")]
    Invalid {
        /// `manifest`, `config`, `index`, …
        what: &'static str,
        /// The image or file.
        name: String,
        /// Why.
        reason: String,
    },
    /// Valid, but nothing that Kiln can take.
    #[error("`{name}` is not supported: {reason}")]
    Unsupported {
        /// The image or file.
        name: String,
        /// Why.
        reason: String,
    },
    /// A layer that cannot be decompressed although its digest is right.
    #[error("layer {digest} of `{name}` cannot be decompressed: {reason}")]
    Decompress {
        /// The image.
        name: String,
        /// Digest of the compressed layer.
        digest: String,
        /// Why.
        reason: String,
    },
    /// `registries.conf` forbids it.
    #[error("`{name}` is blocked by `{prefix}` in registries.conf")]
    Blocked {
        /// The reference.
        name: String,
        /// The entry's prefix.
        prefix: String,
    },
    /// A configuration, certificate or credentials file that cannot be used.
    #[error("cannot use {}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A credential helper that failed.
    #[error("credential helper `{helper}` failed: {reason}")]
    CredentialHelper {
        /// The program.
        helper: String,
        /// What it said.
        reason: String,
    },
    /// A reference that this operation cannot use.
    #[error("cannot {doing} `{name}`: {reason}")]
    BadName {
        /// `push to`, …
        doing: &'static str,
        /// The reference.
        name: String,
        /// Why.
        reason: String,
    },
    /// The store refused or failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the host could not be read or written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// `read`, `write`, …
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl RegistryError {
    /// What the user can do about it, if there is something; a line of its own below the message.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Denied { registry, with_credentials: false, .. } => {
                Some(format!("log in first: kiln login {registry}"))
            }
            Self::Denied { registry, with_credentials: true, .. } => {
                Some(format!("the stored credentials do not suffice; log in again: kiln login {registry}"))
            }
            Self::Tls { registry, .. } => Some(format!(
                "put the registry's CA into /etc/containers/certs.d/{registry}/ca.crt, or use --tls-verify=false"
            )),
            Self::RateLimited { registry, .. } => {
                Some(format!("wait, log in (kiln login {registry}), or set a mirror in registries.conf"))
            }
            Self::TimedOut { .. } => {
                Some("check the network and the registry; what was transferred is used again".into())
            }
            Self::NoPlatform { available, .. } if !available.is_empty() => {
                Some(format!("choose one with --platform, for example --platform {}", available[0]))
            }
            Self::NotWhole { .. } => {
                Some("pull it by a name that a registry knows: kiln image pull NAME".into())
            }
            Self::NotLocal { name } => Some(format!("kiln image pull {name}")),
            Self::WrongDigest { .. } | Self::WrongSize { .. } => {
                Some("the registry, a mirror or a proxy changed the content; nothing of it was kept".into())
            }
            // What of it is told by its size alone is the archive as a whole, which `--max-size` bounds.
            Self::TooLarge { what: "content", .. } => Some(kiln_store::Limit::Size.hint()),
            Self::Store(error) => error.hint(),
            _ => None,
        }
    }

    /// Whether another endpoint (a mirror's upstream) may well have what this one did not give.
    pub(crate) fn other_endpoint_may_help(&self) -> bool {
        !matches!(self, Self::Store(_) | Self::Io { .. } | Self::Blocked { .. } | Self::Config { .. })
    }
}

fn colon(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

fn wait(retry_after: &Option<Duration>) -> String {
    retry_after.map_or_else(String::new, |after| format!(" and asks to wait {}", HumanDuration(after)))
}

fn size_text(size: &Option<u64>) -> String {
    size.map_or_else(|| "it does not end".into(), |size| ByteSize(size).to_string())
}

fn platforms(available: &[String]) -> String {
    if available.is_empty() { "no image at all".into() } else { available.join(", ") }
}
