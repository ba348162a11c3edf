//! Connecting containers, by whatever network they asked for.

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;

use kiln_contract::{
    Attachment, BackendError, Home, InstanceId, NetworkBackend, NetworkRequest, PublishSpec,
};

use super::namespace::Namespace;
use super::pasta::{self, Pasta};
use super::{bridge, can_bridge, name_files};
use crate::NetError;
use crate::dns::host_name_servers;
use crate::network::DEFAULT_NETWORK;
use crate::networks::{Networks, holder};

/// Connects the containers of one supervisor, and serves their names and ports until it is dropped.
///
/// Rules, interfaces and addresses stay when it is dropped: [`teardown`](NetworkBackend::teardown) takes them away,
/// in this process or any other.
#[derive(Debug)]
pub struct ContainerNetwork {
    home: Home,
    connected: HashMap<InstanceId, Connected>,
}

#[derive(Debug)]
enum Connected {
    /// `none`, `host`, `container:…`: there is nothing to take away.
    Nothing,
    Bridge(bridge::Served),
    Pasta(Pasta),
}

impl ContainerNetwork {
    /// Nothing is started or opened by this.
    pub fn new(home: &Home) -> Self {
        Self { home: home.clone(), connected: HashMap::new() }
    }

    fn connect(&self, request: &NetworkRequest) -> Result<(Attachment, Connected), NetError> {
        let mode = request.network.mode.as_str();
        match mode {
            "none" => none(request).map(|attachment| (attachment, Connected::Nothing)),
            "host" => host(request).map(|attachment| (attachment, Connected::Nothing)),
            "pasta" => self.pasta(request),
            "default" if !can_bridge() => self.pasta(request),
            _ if mode.starts_with("container:") => {
                no_ports(request)?;
                Ok((Attachment::default(), Connected::Nothing))
            }
            _ if crate::tap_network(mode).is_some() => {
                let what = "connecting a container".into();
                Err(NetError::NotInMode { what, mode: mode.into() })
            }
            _ => {
                let name = if matches!(mode, "default" | "bridge") { DEFAULT_NETWORK } else { mode };
                if !can_bridge() {
                    let network = name.to_owned();
                    let found = Networks::open(&self.home).find(name);
                    return Err(match found.is_ok_and(|found| !found.is_bridge()) {
                        true => NetError::MachinesOnly { network },
                        false => NetError::NotPrivileged { network },
                    });
                }
                let (attachment, served) = bridge::attach(&self.home, request, name)?;
                Ok((attachment, Connected::Bridge(served)))
            }
        }
    }

    fn pasta(&self, request: &NetworkRequest) -> Result<(Attachment, Connected), NetError> {
        let (attachment, pasta) = pasta::attach(&self.home, request)?;
        Ok((attachment, Connected::Pasta(pasta)))
    }
}

impl NetworkBackend for ContainerNetwork {
    fn setup(&mut self, request: &NetworkRequest) -> Result<Attachment, BackendError> {
        if self.connected.contains_key(&request.id) {
            self.teardown(&request.id)?;
        }
        let (attachment, connected) = self.connect(request)?;
        self.connected.insert(request.id.clone(), connected);
        Ok(attachment)
    }

    fn teardown(&mut self, id: &InstanceId) -> Result<(), BackendError> {
        match self.connected.remove(id) {
            // A pasta ends by being dropped.
            Some(Connected::Nothing | Connected::Pasta(_)) => {}
            Some(Connected::Bridge(served)) => {
                // Ports are let go before their rules: nobody is sent to a container that has gone.
                drop(served);
                bridge::detach(&self.home, id)?;
            }
            None => {
                pasta::end_of(&self.home, id);
                bridge::detach(&self.home, id)?;
            }
        }
        Ok(())
    }

    fn publish(&mut self, id: &InstanceId, port: &PublishSpec) -> Result<PublishSpec, BackendError> {
        match self.connected.get_mut(id) {
            Some(Connected::Bridge(served)) => Ok(bridge::publish(&self.home, served, id, port)?),
            Some(Connected::Pasta(_)) => {
                let (what, mode) = ("publishing a port of a running container".into(), "pasta".into());
                Err(NetError::NotInMode { what, mode }.into())
            }
            Some(Connected::Nothing) => {
                Err(NetError::NotInMode { what: "publishing ports".into(), mode: "none` or `host".into() }
                    .into())
            }
            None => {
                let what = format!("the container {} is not connected by this process", id.short());
                Err(NetError::Invalid(what).into())
            }
        }
    }

    fn address(&self, id: &InstanceId) -> Result<Vec<IpAddr>, BackendError> {
        if let Some(Connected::Pasta(pasta)) = self.connected.get(id) {
            return Ok(pasta.addresses().to_vec());
        }
        let networks = Networks::open(&self.home).peek()?;
        match holder(&networks, id).and_then(|network| network.leases.get(id)) {
            Some(lease) => Ok(vec![lease.address]),
            None => Ok(pasta::addresses_of(&self.home, id)),
        }
    }
}

/// `lo`, and nothing else.
fn none(request: &NetworkRequest) -> Result<Attachment, NetError> {
    no_ports(request)?;
    if let Some(path) = &request.namespace {
        bridge::loopback(&Namespace::open(path)?)?;
    }
    let own = Some(IpAddr::from([127, 0, 0, 1]));
    let dns = &request.network.dns;
    Ok(Attachment {
        addresses: Vec::new(),
        hosts: Some(name_files::hosts(request, own, None)?),
        resolv_conf: (!dns.is_empty()).then(|| name_files::resolv_conf(&request.network, dns)),
        ports: Vec::new(),
    })
}

/// Everything as the host has it. Ports need no publishing: they are the host's.
fn host(request: &NetworkRequest) -> Result<Attachment, NetError> {
    let loopback = Some(IpAddr::from([127, 0, 0, 1]));
    let mut hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    if !hosts.is_empty() && !hosts.ends_with('\n') {
        hosts.push('\n');
    }
    hosts.push_str(&name_files::added(request, loopback)?);
    let servers = match request.network.dns.as_slice() {
        [] => host_name_servers(),
        asked => asked.to_vec(),
    };
    Ok(Attachment {
        addresses: Vec::new(),
        hosts: Some(hosts),
        resolv_conf: Some(name_files::resolv_conf(&request.network, &servers)),
        ports: Vec::new(),
    })
}

fn no_ports(request: &NetworkRequest) -> Result<(), NetError> {
    if request.ports.is_empty() {
        return Ok(());
    }
    let mode = request.network.mode.clone();
    Err(NetError::NotInMode { what: "publishing ports".into(), mode })
}
