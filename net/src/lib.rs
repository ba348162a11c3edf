//! Networks of containers: none, host, bridge and pasta, published ports, names.
//!
//! - [`Networks`] are the networks of a home, as `kiln network` shows and changes them.
//! - [`ContainerNetwork`] connects the containers of one supervisor: it is the
//!   [`NetworkBackend`](kiln_contract::NetworkBackend) of this room.
//! - [`Policy`] is what a workload may reach.
//! - [`usernet`] is the host's half of the network of machines.
//! - [`traffic`] counts bytes; [`doctor`] tells what works on this host.
//!
//! A *bridge* is an interface of the host's to which the containers of a network are wired. It needs root's rights
//! over the host's network, and `nft` for its packet rules: a table of Kiln's own, `inet kiln_<hash of the home>`;
//! nothing outside it is ever touched. *pasta* gives an unprivileged container the host's own connections through an
//! ordinary process.
//!
//! Other programs' rules still count: a packet that Kiln's table accepts can be dropped by another table, as by
//! Docker's `FORWARD` policy. Where nothing passes, look there (`nft list ruleset`, `iptables -S FORWARD`).
//!
//! Names: every container on a bridge has a responder at `127.0.0.11` that knows its neighbours' names. One that
//! publishes its own port 53 is a name server itself and has none, because two cannot listen on one port; one that
//! listens on port 53 of all its addresses without publishing it finds the port in use.
//!
//! ```
//! use kiln_contract::Home;
//! use kiln_net::Networks;
//!
//! let home = tempfile::tempdir().unwrap();
//! let names: Vec<_> =
//!     Networks::open(&Home::at(home.path())).list().unwrap().into_iter().map(|network| network.name).collect();
//! assert_eq!(names, ["kiln", "host", "none", "pasta"]);
//! ```

#![cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, reason = "networks can be listed everywhere, but only Linux connects anything to them")
)]

mod claims;
mod device;
mod dns;
mod error;
mod network;
mod networks;
mod policy;
mod pool;
mod ports;
mod traffic;
pub mod usernet;

#[cfg(not(target_os = "linux"))]
mod elsewhere;
#[cfg(target_os = "linux")]
mod linux;

#[cfg(not(target_os = "linux"))]
use elsewhere as leaf;
#[cfg(target_os = "linux")]
use linux as leaf;

pub use device::NetworkDevice;
pub use error::NetError;
pub use leaf::{ContainerNetwork, MachineNetwork, doctor, unconnected_tap};
pub use network::{DEFAULT_NETWORK, Lease, Network, NetworkOptions};
pub use networks::Networks;
pub use policy::{Denied, Policy, Rule, RuleError};
pub use traffic::traffic;

/// The network that a machine with a device of its own is on, if that is what this mode says: `tap`, which is on the built-in
/// bridge, and `tap:NAME`.
pub fn tap_network(mode: &str) -> Option<&str> {
    match mode {
        "tap" => Some(DEFAULT_NETWORK),
        _ => mode.strip_prefix("tap:").filter(|name| !name.is_empty()),
    }
}

/// Whether a container of this network mode has a network namespace of its own: `host` and `container:…` do not.
pub fn needs_namespace(mode: &str) -> bool {
    mode != "host" && !mode.starts_with("container:")
}
