//! The flags that `run` and `create` share: what a workload is made from.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ByteSize, CpuLimit, HumanDuration, Platform, RestartPolicy};

use crate::complete;

/// What a workload is made from.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct WorkloadArgs {
    // One argument for both: flags end with its first word, not with the first of the command, which may look like one.
    /// The image (a name, a digest, or the beginning of an id); then a command and its arguments, in place of the
    /// image's own
    #[arg(
        required = true, value_name = "IMAGE", trailing_var_arg = true,
        add = ArgValueCompleter::new(complete::images)
    )]
    words: Vec<String>,

    /// Name it; a readable random name is chosen otherwise
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Remove it, with its anonymous volumes, when it ends
    #[arg(long)]
    pub(crate) rm: bool,
    /// Write its id to this file, which must not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// Add a label
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// Add the labels in this file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) label_file: Vec<PathBuf>,
    /// Start it again when it ends: no, on-failure[:limit], always, unless-stopped
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub(crate) restart: RestartPolicy,
    /// The signal that asks it to stop; the image's own, or SIGTERM, otherwise
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// How long it may take to stop before it is killed
    #[arg(long, value_name = "SECONDS")]
    pub(crate) stop_timeout: Option<HumanDuration>,
    /// What makes the container: `native`, or the program of an OCI runtime such as runc or crun
    #[arg(long, value_name = "RUNTIME", default_value = "native")]
    pub(crate) runtime: String,
    /// The key sequence that detaches from it; empty: none
    #[arg(long, value_name = "KEYS", default_value = super::DETACH_KEYS)]
    pub(crate) detach_keys: String,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    #[command(flatten)]
    pub(crate) pulling: PullingArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) files: FileArgs,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    #[command(flatten)]
    pub(crate) resources: ResourceArgs,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    #[command(flatten)]
    pub(crate) health: HealthArgs,
}

impl WorkloadArgs {
    /// The image, as it was typed.
    pub(crate) fn image(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }

    /// The command; empty if it is to be the image's own.
    pub(crate) fn command(&self) -> &[String] {
        match self.words.get(1..).unwrap_or_default() {
            // Not needed before it, but it does no harm.
            [dashes, command @ ..] if dashes == "--" => command,
            command => command,
        }
    }
}

/// What a machine has.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct MachineArgs {
    /// Run it in a machine of its own: a microVM with its own kernel
    #[arg(long)]
    pub(crate) vm: bool,
    /// Boot this kernel (`kiln kernel ls`); the default one otherwise
    #[arg(long, value_name = "NAME", requires = "vm")]
    pub(crate) kernel: Option<String>,
    /// The size of its writable disk, which takes only the room that is used
    #[arg(long, value_name = "SIZE", requires = "vm")]
    pub(crate) disk: Option<ByteSize>,
    /// Boot the machine's kernel at every start, instead of restoring a template
    #[arg(long, requires = "vm", help_heading = "Machines")]
    pub(crate) cold: bool,
    /// What runs it: qemu, which works everywhere, or firecracker, which needs KVM
    #[arg(long, value_name = "NAME", requires = "vm")]
    pub(crate) hypervisor: Option<kiln_contract::Driver>,
}

/// Where the image comes from.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Image")]
pub(crate) struct PullingArgs {
    /// When to pull the image
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub(crate) pull: Pull,
    /// Run the image made for this platform (os/arch[/variant])
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
    #[command(flatten)]
    pub(crate) limits: super::LayerLimitArgs,
    #[command(flatten)]
    pub(crate) registry: super::RegistryArgs,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pull {
    /// Always ask the registry
    Always,
    /// Only if the image is not in the store
    #[default]
    Missing,
    /// Never
    Never,
    /// If the registry has another one under this name, and can be reached
    Newer,
}

/// What runs.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Process")]
pub(crate) struct ProcessArgs {
    /// Run this in place of the image's entrypoint; empty: no entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Set a variable; without a value, as it is on the host
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Set the variables in this file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// The working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Run as this user, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Add a supplementary group, by name or number
    #[arg(long, value_name = "GROUP")]
    pub(crate) group_add: Vec<String>,
    /// Run a small init as process 1, which reaps and passes signals on; with --vm, the image's own init
    #[arg(long)]
    pub(crate) init: bool,
}

/// What files it sees.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Files")]
pub(crate) struct FileArgs {
    /// Mount a directory or file of the host (`./src:/src`) or a named volume (`data:/data`); options: ro, nocopy
    #[arg(short, long, value_name = "[SOURCE:]TARGET[:OPTIONS]", add = ArgValueCompleter::new(complete::mount_sources))]
    pub(crate) volume: Vec<String>,
    /// Mount something (`type=bind,source=/a,target=/b,readonly`); types: bind, volume, tmpfs
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub(crate) mount: Vec<String>,
    /// Mount memory (`/run:size=64m,mode=755`)
    #[arg(long, value_name = "TARGET[:OPTIONS]")]
    pub(crate) tmpfs: Vec<String>,
    /// Refuse writes to the root
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The size of /dev/shm
    #[arg(long, value_name = "SIZE")]
    pub(crate) shm_size: Option<ByteSize>,
    /// Give it a device of the host
    #[arg(long, value_name = "PATH[:PATH[:rwm]]")]
    pub(crate) device: Vec<String>,
}

/// How it is connected.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct NetworkArgs {
    /// none, host, pasta, container:NAME, or the name of a network; for machines none, usernet, the name of a network, or tap[:NAME]
    #[arg(long, visible_alias = "net", value_name = "NETWORK", add = ArgValueCompleter::new(complete::networks))]
    pub(crate) network: Option<String>,
    /// Let it reach only this, and what other --allow say (`host[:port]`, `*.domain`, `CIDR[:port]`, `host-loopback`); for machines
    #[arg(long, value_name = "RULE", requires = "vm")]
    pub(crate) allow: Vec<String>,
    /// A further name by which others on the network find it
    #[arg(long, visible_alias = "net-alias", value_name = "NAME")]
    pub(crate) network_alias: Vec<String>,
    /// A fixed address
    #[arg(long, visible_alias = "ip6", value_name = "ADDRESS")]
    pub(crate) ip: Option<IpAddr>,
    /// Publish a port on the host; ranges and `/udp` too (of `8000-8010:80`, the first that is free)
    #[arg(short, long, value_name = "[[ADDRESS:]PORT:]PORT")]
    pub(crate) publish: Vec<String>,
    /// Publish all ports that the image exposes, at ports that the host chooses
    #[arg(short = 'P', long)]
    pub(crate) publish_all: bool,
    /// A port that --publish-all publishes too
    #[arg(long, value_name = "PORT[/PROTOCOL]")]
    pub(crate) expose: Vec<String>,
    /// The host name; the beginning of its id otherwise
    #[arg(short = 'h', long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Add a line to /etc/hosts; `host-gateway` stands for the host
    #[arg(long, value_name = "NAME:ADDRESS")]
    pub(crate) add_host: Vec<String>,
    /// Ask this name server
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dns: Vec<IpAddr>,
    /// Search this domain
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) dns_search: Vec<String>,
    /// Set an option of the resolver
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION")]
    pub(crate) dns_option: Vec<String>,
}

/// What it may use.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct ResourceArgs {
    /// Processors, also in part (`1.5`)
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<CpuLimit>,
    /// Relative weight of processor time
    #[arg(short, long, value_name = "WEIGHT", value_parser = clap::value_parser!(u64).range(2..=262_144))]
    pub(crate) cpu_shares: Option<u64>,
    /// Run on these processors only (`0-2,4`)
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory (`512m`)
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,
    /// Memory and swap together; -1: no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) memory_swap: Option<String>,
    /// Processes and threads; -1: no limit
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// A limit of each process (`nofile=1024:2048`)
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub(crate) ulimit: Vec<String>,
}

/// What it may do.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Security")]
pub(crate) struct SecurityArgs {
    /// Add a capability (`NET_ADMIN`, `ALL`)
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_add: Vec<String>,
    /// Take a capability away
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_drop: Vec<String>,
    /// Give it all capabilities and devices, mask nothing, filter no system calls
    #[arg(long)]
    pub(crate) privileged: bool,
    /// no-new-privileges, seccomp=unconfined, seccomp=FILE, systempaths=unconfined
    #[arg(long, value_name = "OPTION")]
    pub(crate) security_opt: Vec<String>,
    /// Set a kernel parameter of its namespaces
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) sysctl: Vec<String>,
}

/// How its health is told.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Health")]
pub(crate) struct HealthArgs {
    /// A command line that ends with 0 when the workload is well
    #[arg(long, value_name = "COMMAND")]
    pub(crate) health_cmd: Option<String>,
    /// The time between checks (`30s`)
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_interval: Option<HumanDuration>,
    /// The time after which a check has failed (`30s`)
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_timeout: Option<HumanDuration>,
    /// How many failures in a row make it unhealthy (3)
    #[arg(long, value_name = "NUMBER")]
    pub(crate) health_retries: Option<u32>,
    /// The time at the start in which failures do not count
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_start_period: Option<HumanDuration>,
    /// The time between checks meanwhile (`5s`)
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_start_interval: Option<HumanDuration>,
    /// Ignore the image's health check
    #[arg(long)]
    pub(crate) no_healthcheck: bool,
}
