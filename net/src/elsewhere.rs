//! Systems without network namespaces: containers run in machines there, and machines have no bridges.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ipnet::Ipv4Net;
use kiln_contract::{
    Attachment, BackendError, Home, InstanceId, NetworkBackend, NetworkRequest, NetworkSpec, PublishSpec,
};
use kiln_usernet::Open;
use tokio::sync::watch;

use crate::networks::Locked;
use crate::usernet::{Machine, Neighbours};
use crate::{NetError, Network, NetworkDevice};

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

/// A machine's place on a network that it shares with others. There is none on this system.
#[derive(Debug)]
pub enum MachineNetwork {}

impl MachineNetwork {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn join(_: &Home, _: &NetworkRequest) -> Result<Self, BackendError> {
        Err(NetError::Unsupported("networks that machines share need Linux".into()).into())
    }

    /// There is nothing to leave.
    ///
    /// # Errors
    /// None.
    pub fn leave(_: &Home, _: &InstanceId) -> Result<(), BackendError> {
        Ok(())
    }

    /// Its address.
    pub fn address(&self) -> IpAddr {
        match *self {}
    }

    /// What its device is connected to.
    pub fn device(&self) -> Option<&NetworkDevice> {
        match *self {}
    }

    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn check_device(_: &NetworkSpec) -> Result<(), BackendError> {
        no_devices()
    }

    /// Whether nothing outside of the network can be reached from it.
    pub fn is_internal(&self) -> bool {
        match *self {}
    }

    /// Its neighbours.
    pub fn neighbours(&self, _: impl Fn(&InstanceId) -> Machine + Send + Sync + 'static) -> Neighbours {
        match *self {}
    }

    /// Is never called, for want of a network.
    ///
    /// # Errors
    /// None.
    pub fn serve<O: Open>(&mut self, _: &watch::Receiver<Arc<O>>) -> Result<(), BackendError> {
        match *self {}
    }
}

fn no_devices<T>() -> Result<T, BackendError> {
    Err(NetError::Unsupported("devices of a machine's own (`tap`) need Linux".into()).into())
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn unconnected_tap() -> Result<Arc<OwnedFd>, BackendError> {
    no_devices()
}
