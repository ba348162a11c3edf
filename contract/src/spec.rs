//! What an instance is made from.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, Digest, Driver};

/// What isolates a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// Namespaces of this kernel.
    #[default]
    Container,
    /// A kernel of its own.
    Machine,
}

/// Which OCI runtime makes a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuntimeChoice {
    /// In this process.
    #[default]
    Native,
    /// An OCI runtime's program, such as runc or crun.
    External(PathBuf),
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// The command and its arguments; never empty.
    pub args: Vec<String>,
    /// `NAME=value`, in order, each name once.
    pub env: Vec<String>,
    /// The working directory in the container, absolute.
    pub cwd: String,
    /// `user[:group]` by name or number, as the image or the user gave it; empty is root.
    pub user: String,
    /// Supplementary groups by name or number.
    #[serde(default)]
    pub groups: Vec<String>,
    /// Give it a terminal.
    pub tty: bool,
    /// Keep its standard input open.
    pub stdin: bool,
}

/// How something is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum MountKind {
    /// A file or directory of the host. `create`: make a missing directory first, as `-v` does and `--mount` does not.
    Bind {
        /// On the host, absolute.
        source: PathBuf,
        /// Make it if it is missing.
        create: bool,
        /// `private`, `rprivate`, `shared`, `rshared`, `slave`, `rslave`.
        propagation: Option<String>,
    },
    /// A named volume, made if it is missing. `None`: an anonymous one, removed with the instance.
    Volume {
        /// Its name.
        name: Option<String>,
        /// Copy what the image has there into a new volume.
        copy: bool,
    },
    /// Memory.
    Tmpfs(TmpfsOptions),
}

/// Options of a tmpfs mount.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TmpfsOptions {
    /// The most it may hold.
    pub size: Option<ByteSize>,
    /// Permission bits, 0o1777 unless told.
    pub mode: Option<u32>,
    /// Further mount options as given: `noexec`, `uid=1000`.
    pub options: Vec<String>,
}

/// Something that is seen at a path in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// What.
    #[serde(flatten)]
    pub kind: MountKind,
    /// Where, absolute.
    pub target: String,
    /// Nothing may be changed through it.
    pub read_only: bool,
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One published port. Ranges of the container's ports are spread out before they come here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishSpec {
    /// The host's address to listen on; `None` is all of them.
    pub host_address: Option<IpAddr>,
    /// The host's port; 0 lets the host choose.
    pub host_port: u16,
    /// Any of the host's ports from `host_port` to this one will do: the first that is free is taken. Never in what
    /// *is* published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_port_last: Option<u16>,
    /// The container's port.
    pub container_port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// How the workload is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// `none`, `host`, `pasta`, `container:<name or id>`, or the name of a bridge network. `default` is the
    /// built-in bridge for root, and pasta for others.
    pub mode: String,
    /// Further names by which others on the network find it.
    pub aliases: Vec<String>,
    /// A fixed address.
    pub address: Option<IpAddr>,
    /// `name:address` lines for `/etc/hosts`; `host-gateway` is a valid address.
    pub add_hosts: Vec<String>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Search domains.
    pub dns_search: Vec<String>,
    /// Resolver options.
    pub dns_options: Vec<String>,
    /// What may be reached: rules of a policy; empty is all that is not closed.
    #[serde(default)]
    pub allow: Vec<String>,
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            mode: "default".into(),
            aliases: Vec::new(),
            address: None,
            add_hosts: Vec::new(),
            dns: Vec::new(),
            dns_search: Vec::new(),
            dns_options: Vec::new(),
            allow: Vec::new(),
        }
    }
}

/// Processor time in thousandths of a processor: `--cpus 1.5` is 1500.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuLimit {
    /// Thousandths of a processor, at least 10.
    pub millis: u32,
}

impl FromStr for CpuLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<f64>() {
            Ok(cpus) if (0.01..=100_000.0).contains(&cpus) => {
                Ok(Self { millis: (cpus * 1000.0).round() as u32 })
            }
            _ => Err(format!("`{text}` is not a number of processors (0.01 or more, for example 1.5)")),
        }
    }
}

/// A resource limit of processes (`getrlimit(2)`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// `nofile`, `core`, … without `RLIMIT_`.
    pub name: String,
    /// `u64::MAX` is unlimited.
    pub soft: u64,
    /// `u64::MAX` is unlimited.
    pub hard: u64,
}

/// What a workload may use. `None` is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    /// Processor time.
    pub cpus: Option<CpuLimit>,
    /// Relative weight of processor time, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// Processors it may run on, such as `0-1`.
    pub cpuset: Option<String>,
    /// Memory in bytes.
    pub memory: Option<ByteSize>,
    /// Memory and swap together in bytes; `None` is twice `memory`.
    pub memory_swap: Option<ByteSize>,
    /// Processes and threads.
    pub pids: Option<i64>,
    /// Limits of every process.
    pub ulimits: Vec<Ulimit>,
    /// `/dev/shm` in bytes, 64 MiB unless told.
    pub shm_size: Option<ByteSize>,
}

/// What a workload may do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SecuritySpec {
    /// Capabilities to add to the default set, `NET_ADMIN` or `CAP_NET_ADMIN`; `ALL` is all.
    pub cap_add: Vec<String>,
    /// Capabilities to take away; `ALL` is all.
    pub cap_drop: Vec<String>,
    /// All capabilities, all devices, no seccomp, nothing masked.
    pub privileged: bool,
    /// As given: `no-new-privileges[=false]`, `seccomp=unconfined`, `seccomp=<file>`, `systempaths=unconfined`.
    pub options: Vec<String>,
    /// `net.*` and IPC sysctls.
    pub sysctls: BTreeMap<String, String>,
    /// Devices of the host: `path[:path-in-container[:rwm]]`.
    pub devices: Vec<String>,
    /// The root may not be written to.
    pub read_only: bool,
}

/// What is done when the workload ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Nothing.
    #[default]
    No,
    /// Start it again if it failed, so many times in a row (`None`: for ever).
    OnFailure {
        /// The most restarts in a row.
        limit: Option<u32>,
    },
    /// Start it again.
    Always,
    /// Start it again unless a user stopped it.
    UnlessStopped,
}

impl FromStr for RestartPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None => match text {
                "no" | "" => Ok(Self::No),
                "always" => Ok(Self::Always),
                "unless-stopped" => Ok(Self::UnlessStopped),
                "on-failure" => Ok(Self::OnFailure { limit: None }),
                _ => Err(()),
            },
            Some(("on-failure", limit)) => {
                limit.parse().map(|limit| Self::OnFailure { limit: Some(limit) }).map_err(|_| ())
            }
            Some(_) => Err(()),
        }
        .map_err(|()| {
            format!("`{text}` is not a restart policy (no, on-failure[:limit], always, unless-stopped)")
        })
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.write_str("no"),
            Self::OnFailure { limit: None } => f.write_str("on-failure"),
            Self::OnFailure { limit: Some(limit) } => write!(f, "on-failure:{limit}"),
            Self::Always => f.write_str("always"),
            Self::UnlessStopped => f.write_str("unless-stopped"),
        }
    }
}

/// How a workload is asked to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopSpec {
    /// The signal: a name with or without `SIG`, or a number.
    pub signal: String,
    /// How long it has before it is killed.
    pub timeout: Duration,
}

impl Default for StopSpec {
    fn default() -> Self {
        Self { signal: "SIGTERM".into(), timeout: Duration::from_secs(10) }
    }
}

/// How to tell whether a workload is well (OCI image config's `Healthcheck`, as Docker has it).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// The command; exit code 0 is well.
    pub command: Vec<String>,
    /// Between checks.
    pub interval: Duration,
    /// After which a check has failed.
    pub timeout: Duration,
    /// In which failures do not count.
    pub start_period: Duration,
    /// Between checks during the start period.
    pub start_interval: Duration,
    /// Failures in a row that make it unwell.
    pub retries: u32,
}

/// What only machines have.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The kernel to boot, by its name; `None` is the default one at each start.
    #[serde(default)]
    pub kernel: Option<String>,
    /// The writable disk in bytes; `None` is [`MachineSpec::DISK`].
    #[serde(default)]
    pub disk: Option<ByteSize>,
    /// The command is a system's init and becomes process 1.
    #[serde(default)]
    pub system: bool,
    /// Every start boots the kernel, instead of restoring a template.
    #[serde(default)]
    pub cold: bool,
    /// What runs it; `None` is QEMU, and in a record it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<Driver>,
}

impl MachineSpec {
    /// The writable disk if nothing is said: sparse, so that only what is written takes room.
    pub const DISK: ByteSize = ByteSize(16 << 30);
    /// Memory if nothing is said.
    pub const MEMORY: ByteSize = ByteSize(512 << 20);
}

/// Everything that a workload is made from: complete, with the image's own settings already taken in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Its name, unique in this home: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`.
    pub name: String,
    /// Container or machine.
    pub isolation: Isolation,
    /// The image as the user named it.
    pub image: String,
    /// The image's id (the digest of its config).
    pub image_id: Digest,
    /// The layers of its root, bottom first.
    pub layers: Vec<Digest>,
    /// What to run.
    pub process: ProcessSpec,
    /// The host name; `None` is the short id.
    pub hostname: Option<String>,
    /// What else is mounted.
    pub mounts: Vec<MountSpec>,
    /// How it is connected.
    pub network: NetworkSpec,
    /// Published ports.
    pub ports: Vec<PublishSpec>,
    /// What it may use.
    pub resources: Resources,
    /// What it may do.
    pub security: SecuritySpec,
    /// What happens when it ends.
    pub restart: RestartPolicy,
    /// How it is stopped.
    pub stop: StopSpec,
    /// How its health is told.
    pub health: Option<HealthCheck>,
    /// Labels, the image's and the user's.
    pub labels: BTreeMap<String, String>,
    /// Run a small init as process 1 that reaps and forwards signals.
    pub init: bool,
    /// Remove it when it ends.
    pub remove: bool,
    /// It is of no use without the process that makes it, which starts it at once (`kiln run --rm`): if that dies before
    /// it has, the instance is removed.
    #[serde(default)]
    pub transient: bool,
    /// What makes it.
    pub runtime: RuntimeChoice,
    /// What it has if it is a machine.
    #[serde(default)]
    pub machine: MachineSpec,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_policies_read_back_what_they_show() {
        for text in ["no", "on-failure", "on-failure:3", "always", "unless-stopped"] {
            assert_eq!(text.parse::<RestartPolicy>().unwrap().to_string(), text);
        }
        for text in ["never", "always:3", "on-failure:", "on-failure:-1", "on-failure:x"] {
            assert!(text.parse::<RestartPolicy>().is_err(), "{text}");
        }
    }

    #[test]
    fn cpus_are_thousandths_of_a_processor() {
        assert_eq!("1.5".parse(), Ok(CpuLimit { millis: 1500 }));
        for text in ["0", "-1", "", "x", "inf", "nan"] {
            assert!(text.parse::<CpuLimit>().is_err(), "{text}");
        }
    }
}
