//! An instance: who it is, and what is known of it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Digest, InstanceSpec, PublishSpec};

/// An instance's id: 64 lower-case hex digits, random.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(String);

impl InstanceId {
    /// A new random id.
    ///
    /// # Panics
    /// If the operating system gives no random bytes.
    pub fn random() -> Self {
        let mut bytes = [0; 32];
        #[expect(clippy::expect_used, reason = "nothing works on a system without random bytes")]
        getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
        Self(Digest::from_bytes(bytes).hex())
    }

    /// All 64 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 digits, as tables show them.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl FromStr for InstanceId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for InstanceId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if Digest::from_hex(&text).is_ok() {
            Ok(Self(text))
        } else {
            Err(format!("`{text}` is not an instance id (64 lower-case hex digits)"))
        }
    }
}

impl From<InstanceId> for String {
    fn from(id: InstanceId) -> Self {
        id.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A process, told from any later process with the same number by when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks after boot.
    pub start: u64,
}

/// How a workload ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// 0 to 255; 128 + n for signal n, as shells have it.
    pub code: u8,
    /// It was killed because it took more memory than allowed.
    pub out_of_memory: bool,
    /// When.
    pub at: Timestamp,
    /// Why it could not be started, if it could not.
    #[serde(default)]
    pub error: Option<String>,
}

/// What an instance is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceStatus {
    /// Made, never started.
    Created,
    /// Its process runs.
    Running,
    /// Its processes are suspended.
    Paused,
    /// It ended, and waits to be started again by its restart policy.
    Restarting,
    /// It ended.
    Exited,
}

impl fmt::Display for InstanceStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
        })
    }
}

/// Whether a workload is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthState {
    /// Not known yet.
    Starting,
    /// Yes.
    Healthy,
    /// No.
    Unhealthy,
}

/// What the health check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthStatus {
    /// The verdict.
    pub state: HealthState,
    /// Failures in a row.
    pub failing: u32,
    /// The last check's output, cut to 4 KiB.
    pub last_output: String,
}

/// What is known of an instance: `instance.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// The version of this format, [`InstanceRecord::FORMAT`].
    pub format: u32,
    /// Its id.
    pub id: InstanceId,
    /// What it is made from.
    pub spec: InstanceSpec,
    /// What it is doing, as far as its supervisor wrote it: after a crash the truth may be another.
    pub status: InstanceStatus,
    /// When it was made.
    pub created: Timestamp,
    /// When it was last started.
    pub started: Option<Timestamp>,
    /// How it last ended.
    pub exit: Option<ExitStatus>,
    /// Its first process, while it runs.
    pub process: Option<ProcessId>,
    /// Its supervisor, while it has one.
    pub supervisor: Option<ProcessId>,
    /// Who made it, if it is transient and was never started.
    #[serde(default)]
    pub maker: Option<ProcessId>,
    /// The boot of the host (`/proc/sys/kernel/random/boot_id`) in which these processes live.
    pub boot: Option<String>,
    /// Its addresses, while it runs.
    pub addresses: Vec<IpAddr>,
    /// Its published ports with the host's ports chosen, while it runs.
    pub ports: Vec<PublishSpec>,
    /// Its cgroup, relative to each hierarchy's root, while it has one.
    pub cgroup: Option<String>,
    /// How often its restart policy has started it.
    pub restarts: u32,
    /// What its health check found.
    pub health: Option<HealthStatus>,
    /// Anonymous volumes that it owns.
    pub volumes: Vec<String>,
    /// A user asked it to stop: its restart policy does not start it again.
    pub stopped_by_user: bool,
    /// The instance that it began as a copy of.
    #[serde(default)]
    pub parent: Option<InstanceId>,
}

impl InstanceRecord {
    /// The version that this program writes.
    pub const FORMAT: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_random_and_checked() {
        assert_ne!(InstanceId::random(), InstanceId::random());
        assert!("../../etc".parse::<InstanceId>().is_err());
        assert!(serde_json::from_str::<InstanceId>("\"..\"").is_err());
    }
}
