//! What back ends say of themselves, and how they fail.

use std::fmt;

/// Something that not every back end can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Capability {
    /// Suspend all processes of an instance, and let them go on.
    Pause,
    /// Keep memory within a limit.
    MemoryLimit,
    /// Keep processor time within a limit.
    CpuLimit,
    /// Keep the number of processes within a limit.
    PidsLimit,
    /// Measure what an instance uses.
    Stats,
    /// Save an instance's disk.
    SnapshotDisk,
    /// Save an instance's memory too.
    SnapshotMemory,
    /// Copy an instance while it runs.
    ForkLive,
    /// Change the resources of a running instance.
    Resize,
    /// Publish ports below 1024.
    PrivilegedPorts,
}

/// What a back end can do here, on this host, for this user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    missing: Vec<(Capability, String)>,
}

impl Capabilities {
    /// Everything.
    pub fn all() -> Self {
        Self::default()
    }

    /// Takes `capability` away. `reason` completes «not here: …».
    #[must_use]
    pub fn without(mut self, capability: Capability, reason: impl Into<String>) -> Self {
        self.missing.push((capability, reason.into()));
        self
    }

    /// Whether `capability` is here.
    pub fn has(&self, capability: Capability) -> bool {
        self.reason_against(capability).is_none()
    }

    /// Why `capability` is not here, if it is not.
    pub fn reason_against(&self, capability: Capability) -> Option<&str> {
        self.missing.iter().find(|(c, _)| *c == capability).map(|(_, reason)| reason.as_str())
    }

    /// All that is missing, with reasons.
    pub fn missing(&self) -> &[(Capability, String)] {
        &self.missing
    }
}

/// What kind of failure it was: decides exit codes and hints, nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// No such instance, network, volume or image.
    NotFound,
    /// The name or address is taken.
    Conflict,
    /// The instance is in a state in which this cannot be done.
    State,
    /// What was asked for makes no sense.
    Invalid,
    /// The back end, or this host, cannot do it.
    Unsupported,
    /// The command to run is not in the image (exit code 127).
    CommandNotFound,
    /// The command to run cannot be executed (exit code 126).
    CommandNotExecutable,
    /// Everything else.
    Failed,
}

/// A failed operation of a back end: what was being done, to what, why it failed, and what the user can do.
#[derive(Debug)]
pub struct BackendError {
    kind: ErrorKind,
    what: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl BackendError {
    /// A failure of `kind`; `what` is one sentence without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), hint: None, source: None }
    }

    /// A back end's «I do not do that».
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, what)
    }

    /// A failure caused by another error.
    pub fn caused(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { source: Some(source.into()), ..Self::new(ErrorKind::Failed, what) }
    }

    /// Adds what the user can do about it: one sentence, shown on its own line.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same failure, as `kind`.
    #[must_use]
    pub fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// What kind of failure it was.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What it says and what caused it, in one sentence, for where only text can go.
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    }

    /// What the user can do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for BackendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
