//! Systems without network namespaces: containers run in machines there, and machines have no bridges.

use std::net::IpAddr;

use ipnet::Ipv4Net;
use kiln_contract::{
    Attachment, BackendError, Home, InstanceId, NetworkBackend, NetworkRequest, PublishSpec,
};

use crate::networks::Locked;
use crate::{NetError, Network};

pub(crate) fn can_bridge() -> bool {
    false
}

pub(crate) fn subnets_of_host() -> Result<Vec<Ipv4Net>, NetError> {
    Ok(Vec::new())
}

pub(crate) fn take_down(_: &Locked, _: &Network) -> Result<(), NetError> {
    Ok(())
}

/// Nothing here can be checked.
pub fn doctor() -> Vec<(String, bool, String)> {
    Vec::new()
}

/// Refuses everything: there are no network namespaces on this system.
#[derive(Debug)]
pub struct ContainerNetwork {}

impl ContainerNetwork {
    /// Nothing is started or opened by this.
    pub fn new(_: &Home) -> Self {
        Self {}
    }
}

fn unsupported<T>() -> Result<T, BackendError> {
    Err(NetError::Unsupported("containers' networks need Linux".into()).into())
}

impl NetworkBackend for ContainerNetwork {
    fn setup(&mut self, _: &NetworkRequest) -> Result<Attachment, BackendError> {
        unsupported()
    }

    fn teardown(&mut self, _: &InstanceId) -> Result<(), BackendError> {
        Ok(())
    }

    fn publish(&mut self, _: &InstanceId, _: &PublishSpec) -> Result<PublishSpec, BackendError> {
        unsupported()
    }

    fn address(&self, _: &InstanceId) -> Result<Vec<IpAddr>, BackendError> {
        Ok(Vec::new())
    }
}
