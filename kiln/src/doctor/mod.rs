//! `kiln system doctor`: what will work on this host and what will not.
//!
//! Each probe looks at one thing and says four: what it is, whether it is well, why, and what to do about it. Where
//! a kernel feature can be tried without leaving a trace, it is tried; nothing is concluded from version numbers alone.

#[cfg(target_os = "linux")]
mod isolation;
#[cfg(target_os = "linux")]
mod kernel;
#[cfg(target_os = "linux")]
mod machines;
#[cfg(target_os = "linux")]
mod storage;

use kiln_contract::Home;
use serde::Serialize;

/// Whether something is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// It works.
    Ok,
    /// Something works less well, or only part of it.
    Warn,
    /// Containers cannot run.
    Fail,
}

impl Verdict {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at, as the JSON forms write it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Finding {
    /// `ok`, `warn`, `fail`.
    pub(crate) verdict: Verdict,
    /// What was looked at.
    pub(crate) what: String,
    /// What was found.
    pub(crate) why: String,
    /// What the user can do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
}

impl Finding {
    fn new(verdict: Verdict, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { verdict, what: what.into(), why: why.into(), advice: None }
    }

    fn ok(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, what, why)
    }

    fn warn(what: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..Self::new(Verdict::Warn, what, why) }
    }

    fn fail(what: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..Self::new(Verdict::Fail, what, why) }
    }
}

/// Looks at everything.
#[cfg(target_os = "linux")]
pub(crate) fn examine(home: &Home) -> Vec<Finding> {
    let root = rustix::process::geteuid().is_root();
    let mut findings = kernel::examine(root);
    findings.extend(isolation::examine(root));
    findings.extend(storage::examine(home));
    findings.extend(kiln_net::doctor().into_iter().map(|(what, well, why)| {
        // Without one of its ways to connect, a container still has the others.
        let verdict = if well { Verdict::Ok } else { Verdict::Warn };
        Finding::new(verdict, what, why)
    }));
    findings.extend(machines::examine(home));
    findings
}

/// Looks at everything.
#[cfg(not(target_os = "linux"))]
pub(crate) fn examine(_home: &Home) -> Vec<Finding> {
    vec![Finding::fail(
        "containers",
        "containers share the kernel of a Linux host, and this is not one",
        "images can be pulled, pushed and inspected here",
    )]
}
