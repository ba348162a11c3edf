//! What can go wrong with a network, and what the user can do about it.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use kiln_contract::{BackendError, ErrorKind, PublishSpec};
use thiserror::Error;

/// A failure of this room. Crossing into [`BackendError`] keeps the message, the kind and the hint.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NetError {
    /// No network has this name.
    #[error("no network is named `{name}`")]
    NoSuchNetwork {
        /// The name asked for.
        name: String,
    },
    /// The name is in use, or built in.
    #[error("a network named `{name}` exists already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The name cannot be a network's.
    #[error(
        "`{name}` cannot name a network: letters, digits, `_`, `.` and `-` only, at most 64, starting with a letter or digit"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// A built-in network cannot be changed.
    #[error("the network `{name}` is built in and cannot be removed")]
    BuiltIn {
        /// The name.
        name: String,
    },
    /// Instances are connected to the network.
    #[error("the network `{name}` is in use by {instances} instance(s)")]
    InUse {
        /// The network.
        name: String,
        /// How many.
        instances: usize,
    },
    /// A subnet that was asked for cannot be had.
    #[error("the subnet {subnet} cannot be used: {reason}")]
    SubnetUnusable {
        /// The subnet.
        subnet: IpNet,
        /// Why not.
        reason: String,
    },
    /// Every subnet of the pool collides with something.
    #[error(
        "no free subnet is left in {pool}: all collide with routes, addresses or other networks of this host"
    )]
    PoolExhausted {
        /// The pool.
        pool: &'static str,
    },
    /// Every address of the subnet is leased.
    #[error("no free address is left in {subnet} (network `{network}`)")]
    SubnetFull {
        /// The network.
        network: String,
        /// Its subnet.
        subnet: IpNet,
    },
    /// A fixed address that cannot be had.
    #[error("the address {address} cannot be used on the network `{network}`: {reason}")]
    AddressUnusable {
        /// The address.
        address: IpAddr,
        /// The network.
        network: String,
        /// Why not.
        reason: String,
    },
    /// Another process listens on a port to be published.
    #[error("publishing {}: {} in use on this host", show_port(.port), if .port.host_port_last.is_some() { "all are" } else { "the port is" })]
    PortTaken {
        /// The port.
        port: PublishSpec,
    },
    /// A port could not be listened on.
    #[error("publishing {}: {source}", show_port(.port))]
    PortFailed {
        /// The port.
        port: PublishSpec,
        /// What the system said.
        source: io::Error,
    },
    /// Only machines can be on a network without a bridge.
    #[error("the network `{network}` has no bridge: machines can be on it, containers cannot")]
    MachinesOnly {
        /// The network.
        network: String,
    },
    /// Packet rules do not know names.
    #[error("what a machine with a device of its own may reach is known by address, and `{rule}` is none")]
    NeedsAddresses {
        /// The rule.
        rule: String,
    },
    /// The mode cannot do what was asked for.
    #[error("{what} is not possible with the network `{mode}`")]
    NotInMode {
        /// What was asked for.
        what: String,
        /// The mode.
        mode: String,
    },
    /// Bridges need privileges over the host's network namespace.
    #[error(
        "the network `{network}` is a bridge, and making bridges takes root's rights over the host's network"
    )]
    NotPrivileged {
        /// The network.
        network: String,
    },
    /// TAP devices need privileges over the host's network namespace.
    #[error("a device of a machine's own (`tap`) takes root's rights over the host's network")]
    TapNotPrivileged,
    /// A program that does the work is not installed.
    #[error("`{program}` is needed for {purpose}, and it was not found in PATH or the usual places")]
    ProgramMissing {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
        /// What for.
        purpose: &'static str,
    },
    /// A program failed.
    #[error("{doing} with `{program}`: {said}")]
    ProgramFailed {
        /// The program.
        program: &'static str,
        /// What was being done.
        doing: String,
        /// What it wrote to standard error, or how it ended.
        said: String,
    },
    /// The kernel refused.
    #[error("{doing}: {source}")]
    System {
        /// What was being done, and to what.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of Kiln's own does not read as it should.
    #[error("reading {}: {reason}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// This system has no such networks.
    #[error("{0}")]
    Unsupported(String),
}

fn show_port(port: &PublishSpec) -> String {
    let (word, ports) = match port.host_port_last {
        Some(last) => ("ports", format!("{}-{last}/{}", port.host_port, port.protocol)),
        None => ("port", format!("{}/{}", port.host_port, port.protocol)),
    };
    match port.host_address {
        Some(IpAddr::V6(address)) => format!("[{address}]:{ports}"),
        Some(address) => format!("{address}:{ports}"),
        None => format!("{word} {ports}"),
    }
}

impl NetError {
    /// A closure for `map_err` that says what was being done.
    pub(crate) fn doing<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = what.into();
        move |source| Self::System { doing, source: source.into() }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSuchNetwork { .. } => ErrorKind::NotFound,
            Self::NameTaken { .. } | Self::PortTaken { .. } => ErrorKind::Conflict,
            Self::InUse { .. } => ErrorKind::State,
            Self::SubnetUnusable { .. } | Self::AddressUnusable { .. } => ErrorKind::Conflict,
            Self::BadName { .. } | Self::BuiltIn { .. } | Self::Invalid(_) => ErrorKind::Invalid,
            Self::NotInMode { .. }
            | Self::NotPrivileged { .. }
            | Self::TapNotPrivileged
            | Self::NeedsAddresses { .. }
            | Self::MachinesOnly { .. }
            | Self::ProgramMissing { .. }
            | Self::Unsupported(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Failed,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NoSuchNetwork { .. } => Some("`kiln network ls` lists the networks".into()),
            Self::InUse { .. } => Some("stop or remove its instances first".into()),
            Self::PoolExhausted { .. } => Some("give one with --subnet".into()),
            Self::PortTaken { .. } => {
                Some("publish another port, or port 0 to have a free one chosen".into())
            }
            Self::PortFailed { port, source }
                if source.kind() == io::ErrorKind::PermissionDenied && port.host_port < 1024 =>
            {
                Some("ports below 1024 are for root: publish a higher one, or lower net.ipv4.ip_unprivileged_port_start".into())
            }
            Self::NeedsAddresses { .. } => Some(
                "allow an address or a range such as 192.0.2.0/24:443, or use --network usernet, which knows names".into(),
            ),
            Self::TapNotPrivileged => Some("run as root, or use --network usernet, which takes no privilege".into()),
            Self::NotPrivileged { .. } => Some("use --network pasta, run as root, or make a network for machines with --driver usernet".into()),
            Self::ProgramMissing { package, .. } => Some(format!("install the package `{package}`")),
            _ => None,
        }
    }
}

impl From<NetError> for BackendError {
    fn from(error: NetError) -> Self {
        let told = Self::new(error.kind(), error.to_string());
        match error.hint() {
            Some(hint) => told.hint(hint),
            None => told,
        }
    }
}
