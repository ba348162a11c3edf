//! What is known of a network: the format of `networks/<name>.json`.
//!
//! The file is replaced atomically while `networks/.lock` is held; readers need no lock. Containers' name
//! responders read it too, which is how a name is known to its neighbours the moment its lease is written.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use kiln_contract::{InstanceId, PublishSpec};
use serde::{Deserialize, Serialize};

/// The built-in bridge network's name.
pub const DEFAULT_NETWORK: &str = "kiln";

/// A network that a user made, or a built-in one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The version of this format, [`Network::FORMAT`].
    pub format: u32,
    /// Its name.
    pub name: String,
    /// `bridge`, `usernet`, `host`, `none` or `pasta`.
    pub driver: String,
    /// Its addresses. `None` for drivers without, and for the built-in bridge before its first use.
    pub subnet: Option<IpNet>,
    /// The host's address on it.
    pub gateway: Option<IpAddr>,
    /// The bridge interface's name on the host, at most 15 bytes; empty for drivers without.
    pub interface: String,
    /// Nothing outside can be reached from it, nor it from outside.
    pub internal: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// When it was made (RFC 3339); empty for built-in ones.
    pub created: String,
    /// The subnet was chosen by Kiln, and may be chosen anew if the host's routes come to collide with it.
    #[serde(default)]
    pub automatic: bool,
    /// The boot (`/proc/sys/kernel/random/boot_id`) in which the leases were given; in another they are void.
    #[serde(default)]
    pub boot: String,
    /// Who is connected.
    pub leases: BTreeMap<InstanceId, Lease>,
}

/// An instance's place on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its address.
    pub address: IpAddr,
    /// The names by which others on the network find it, the container's own first.
    pub names: Vec<String>,
    /// Its published ports, with the host's ports chosen.
    #[serde(default)]
    pub ports: Vec<PublishSpec>,
    /// It is a machine's, which other machines reach over its link.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub machine: bool,
    /// It is that of a machine with a device of its own, and these are the rules of what that may reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<Vec<String>>,
}

impl Lease {
    /// A container's, without a name or a published port.
    pub(crate) fn at(address: impl Into<IpAddr>) -> Self {
        Self { address: address.into(), names: Vec::new(), ports: Vec::new(), machine: false, tap: None }
    }
}

/// What a network is made with.
#[derive(Debug, Clone, Default)]
pub struct NetworkOptions {
    /// An IPv4 subnet of 4 addresses or more; `None` has a free one chosen.
    pub subnet: Option<IpNet>,
    /// The host's address in it; `None` is the first.
    pub gateway: Option<IpAddr>,
    /// No way out, no way in.
    pub internal: bool,
    /// Without a bridge: for machines only, and without any privilege.
    pub usernet: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// The driver of networks without a bridge.
pub(crate) const USERNET: &str = "usernet";

impl Network {
    /// The version that this program writes.
    pub const FORMAT: u32 = 1;

    /// Whether its members speak over an interface of the host's.
    pub(crate) fn is_bridge(&self) -> bool {
        self.driver == "bridge"
    }

    /// A built-in network that has no file.
    pub(crate) fn built_in(name: &str, driver: &str) -> Self {
        Self {
            format: Self::FORMAT,
            name: name.into(),
            driver: driver.into(),
            subnet: None,
            gateway: None,
            interface: String::new(),
            internal: false,
            labels: BTreeMap::new(),
            created: String::new(),
            automatic: false,
            boot: String::new(),
            leases: BTreeMap::new(),
        }
    }
}
