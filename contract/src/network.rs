//! How workloads reach others.

use std::net::IpAddr;
use std::path::PathBuf;

use crate::{BackendError, InstanceId, NetworkSpec, PublishSpec};

/// A workload that is to be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRequest {
    /// The instance.
    pub id: InstanceId,
    /// The name by which others find it.
    pub name: String,
    /// Its host name.
    pub hostname: String,
    /// What was asked for.
    pub network: NetworkSpec,
    /// Ports to publish.
    pub ports: Vec<PublishSpec>,
    /// Its network namespace (`/proc/<pid>/ns/net`), where it has one.
    pub namespace: Option<PathBuf>,
}

/// A workload that is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The content of its `/etc/hosts`, where the network decides it.
    pub hosts: Option<String>,
    /// The content of its `/etc/resolv.conf`, where the network decides it.
    pub resolv_conf: Option<String>,
    /// Ports as they were published, with the host's port chosen.
    pub ports: Vec<PublishSpec>,
}

/// Connects workloads. One value serves one supervisor; dropping it closes what it listens on.
pub trait NetworkBackend: Send {
    /// Connects a workload.
    fn setup(&mut self, request: &NetworkRequest) -> Result<Attachment, BackendError>;
    /// Takes away all that [`setup`](Self::setup) made for `id`, by whatever process. Taking away what is not
    /// there is no error.
    fn teardown(&mut self, id: &InstanceId) -> Result<(), BackendError>;
    /// Publishes one more port of a connected workload.
    fn publish(&mut self, id: &InstanceId, port: &PublishSpec) -> Result<PublishSpec, BackendError>;
    /// The addresses of a connected workload.
    fn address(&self, id: &InstanceId) -> Result<Vec<IpAddr>, BackendError>;
}
