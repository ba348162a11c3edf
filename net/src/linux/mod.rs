//! Containers' networks on this kernel.

mod backend;
mod bridge;
mod doctor;
mod doors;
mod machine;
mod name_files;
mod namespace;
mod netlink;
mod nft;
mod pasta;
mod program;
mod proxy;
mod responder;
mod tap;
mod walls;
mod worker;
mod zone;

use ipnet::Ipv4Net;

pub use backend::ContainerNetwork;
pub(crate) use bridge::take_down;
pub use doctor::doctor;
pub use machine::MachineNetwork;
pub(crate) use namespace::may_configure as can_bridge;
pub use tap::unconnected as unconnected_tap;

use crate::NetError;

/// All IPv4 subnets that the host has routes to or addresses in.
pub(crate) fn subnets_of_host() -> Result<Vec<Ipv4Net>, NetError> {
    netlink::Netlink::open()
        .and_then(|mut netlink| netlink.subnets())
        .map_err(NetError::doing("listing the host's routes and addresses"))
}
