//! What the guest asks of its host: ways out, and the files that it was given.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Seek as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kiln_contract::{
    BackendError, Driver, Home, InstanceDir, InstanceId, InstanceRecord, InstanceSpec, MountKind, MountSpec,
    NetworkRequest, PublishSpec,
};
use kiln_instance::{Instances, Volume, Volumes};
use kiln_link::message::Device;
use kiln_link::{Inbound, Opener, Stream, service};
use kiln_net::usernet::{Gateway, GatewayOptions, Machine, Neighbours, Published, Upstreams};
use kiln_net::{MachineNetwork, Policy};
use kiln_share::{Options, Share};
use kiln_store::Store;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::{door, plan};

/// Opens streams to the guest.
#[derive(Debug)]
struct ToGuest(Opener);

impl kiln_usernet::Open for ToGuest {
    type Stream = Stream;

    async fn open(&self, service: u16) -> io::Result<Stream> {
        self.0.open(service).await.map_err(io::Error::other)
    }
}

/// Whether a machine has a network.
pub(crate) fn is_connected(spec: &InstanceSpec) -> bool {
    spec.network.mode != "none"
}

/// The rules of a machine's network.
///
/// # Errors
/// The first that cannot be understood.
pub(crate) fn policy(spec: &InstanceSpec) -> Result<Policy, BackendError> {
    Policy::parse(&spec.network.allow).map_err(|error| {
        BackendError::new(kiln_contract::ErrorKind::Invalid, error.to_string())
            .hint("rules are host[:port], *.domain[:port], CIDR[:port] and host-loopback[:port]")
    })
}

/// Refuses a device of its own that the machine could not have, before anything is made.
///
/// # Errors
/// This user may not make one; its hypervisor takes none; its policy has rules of names.
pub(crate) fn check_device(spec: &InstanceSpec) -> Result<(), BackendError> {
    if kiln_net::tap_network(&spec.network.mode).is_none() {
        return Ok(());
    }
    if spec.machine.hypervisor == Some(Driver::Firecracker) {
        return Err(BackendError::unsupported("a machine of Firecracker's cannot have a network device")
            .hint("choose --hypervisor qemu, or a network that needs no device"));
    }
    MachineNetwork::check_device(&spec.network)
}

/// What serves one machine. Dropping it frees its ports.
#[derive(Debug)]
pub(crate) struct Services {
    gateway: Option<Arc<Gateway>>,
    /// Its place among others.
    network: Option<MachineNetwork>,
    shares: Vec<Arc<Share>>,
    published: Published,
    /// Kept, so that those who watch it go on.
    sessions: Option<watch::Sender<Arc<ToGuest>>>,
}

impl Services {
    /// Takes ports and a place on the network, and opens what is shared. Nothing is served yet.
    ///
    /// # Errors
    /// A port is taken; a directory of the host is not there; a rule makes no sense; there is no such network.
    pub(crate) fn prepare(home: &Home, record: &InstanceRecord) -> Result<Self, BackendError> {
        let spec = &record.spec;
        let policy = policy(spec)?;
        let network = match plan::network_of(spec) {
            None => None,
            Some(_) => Some(MachineNetwork::join(home, &request(record))?),
        };
        let neighbours = neighbours(home, network.as_ref());
        let upstreams = match spec.network.dns.as_slice() {
            _ if network.as_ref().is_some_and(MachineNetwork::is_internal) => Upstreams::Nobody,
            [] => Upstreams::Host,
            asked => Upstreams::These(asked.iter().map(|server| SocketAddr::new(*server, 53)).collect()),
        };
        let gateway = is_connected(spec).then(|| {
            Arc::new(Gateway::new(GatewayOptions {
                guest: spec.name.clone(),
                policy,
                names: Arc::new(neighbours),
                upstreams,
                internal: network.as_ref().is_some_and(MachineNetwork::is_internal),
                ..GatewayOptions::default()
            }))
        });
        kiln_share::raise_descriptor_limit();
        let shares =
            plan::in_order(spec).into_iter().filter_map(|mount| shared(home, spec, mount).transpose());
        let published = Published::bind(&spec.ports)?;
        let shares = shares.collect::<Result<_, _>>()?;
        Ok(Self { gateway, network, shares, published, sessions: None })
    }

    /// The ports as they were published, with the host's chosen.
    pub(crate) fn ports(&self) -> &[PublishSpec] {
        self.published.ports()
    }

    /// Its addresses on a network that it shares with others.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        self.network.iter().map(MachineNetwork::address).collect()
    }

    /// The host's end of its network device.
    pub(crate) fn device(&self) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.network.as_ref()?.device()?.host))
    }

    /// Who its guest is on that device.
    pub(crate) fn place(&self) -> Option<Device> {
        let device = self.network.as_ref()?.device()?;
        let (address, gateway) = (device.address.octets(), device.gateway.octets());
        Some(Device { mac: device.mac, address, gateway, mtu: device.mtu })
    }

    /// Serves a guest from now on, in tasks of the runtime that the caller is in.
    ///
    /// # Errors
    /// If a port cannot be waited for.
    pub(crate) fn serve(&mut self, opener: Opener, inbound: Inbound) -> Result<(), BackendError> {
        let (sessions, watched) = watch::channel(Arc::new(ToGuest(opener)));
        self.published.serve(&watched)?;
        if let Some(network) = &mut self.network {
            network.serve(&watched)?;
        }
        self.sessions = Some(sessions);
        tokio::spawn(accept(inbound, self.gateway.clone(), self.shares.clone()));
        Ok(())
    }
}

/// How it asks for its place on a network.
fn request(record: &InstanceRecord) -> NetworkRequest {
    NetworkRequest {
        id: record.id.clone(),
        name: record.spec.name.clone(),
        hostname: plan::hostname(record),
        network: record.spec.network.clone(),
        ports: record.spec.ports.clone(),
        namespace: None,
    }
}

/// Who is on its network. Other machines are reached through their monitors' doors.
fn neighbours(home: &Home, network: Option<&MachineNetwork>) -> Neighbours {
    let instances = Instances::of(home);
    let machine = move |id: &InstanceId| Machine::new(Arc::new(NextDoor(instances.dir(id))));
    match network {
        Some(network) => network.neighbours(machine),
        None => Neighbours::of(home, None, machine),
    }
}

/// Opens streams to another machine of this home.
struct NextDoor(InstanceDir);

impl kiln_usernet::Open for NextDoor {
    type Stream = UnixStream;

    async fn open(&self, service: u16) -> io::Result<UnixStream> {
        door::dial(&self.0, service).await.map_err(io::Error::other)
    }
}

/// What is shared at a mount; nothing, where the guest needs nothing of the host's.
fn shared(home: &Home, spec: &InstanceSpec, mount: &MountSpec) -> Result<Option<Arc<Share>>, BackendError> {
    let options = Options { read_only: mount.read_only, ..Options::default() };
    let (path, is_directory) = match &mount.kind {
        MountKind::Tmpfs(_) => return Ok(None),
        MountKind::Bind { source, create, .. } => {
            if *create && !source.exists() {
                std::fs::create_dir_all(source).map_err(|error| {
                    BackendError::caused(format!("cannot make {}", source.display()), error)
                })?;
            }
            (source.clone(), source.is_dir())
        }
        MountKind::Volume { name, copy } => {
            let volume = Volumes::open(home).create(name.as_deref(), &BTreeMap::new())?;
            if *copy && volume.is_empty() {
                fill(home, spec, &volume, &mount.target)?;
            }
            (volume.path, true)
        }
    };
    let share = if is_directory { Share::directory(&path, options) } else { Share::file(&path, options) };
    share
        .map(|share| Some(Arc::new(share)))
        .map_err(|error| BackendError::caused(format!("cannot share {}", path.display()), error))
}

/// Copies what the image has at `target` into a new volume. The host does it, from the store: nothing of the guest's is needed.
fn fill(home: &Home, spec: &InstanceSpec, volume: &Volume, target: &str) -> Result<(), BackendError> {
    let what = || format!("cannot fill the volume {} from the image's {target}", volume.name);
    let store = Store::open(home).map_err(|error| BackendError::caused(what(), error))?;
    let mut spool = tempfile::tempfile().map_err(|error| BackendError::caused(what(), error))?;
    let found = store.export_directory(&spec.layers, target, BufWriter::new(&mut spool));
    if found.map_err(|error| BackendError::caused(what(), error))? {
        spool.rewind().map_err(|error| BackendError::caused(what(), error))?;
        volume.fill(&mut spool)?;
    }
    Ok(())
}

async fn accept(mut inbound: Inbound, gateway: Option<Arc<Gateway>>, shares: Vec<Arc<Share>>) {
    while let Some((number, stream)) = inbound.accept().await {
        match (number, &gateway) {
            (service::TCP, Some(gateway)) => {
                let gateway = Arc::clone(gateway);
                tokio::spawn(async move { gateway.serve_tcp(stream).await });
            }
            (service::UDP, Some(gateway)) => {
                let gateway = Arc::clone(gateway);
                tokio::spawn(async move { gateway.serve_udp(stream).await });
            }
            (service::SHARE, _) => {
                let shares = shares.clone();
                tokio::spawn(async move {
                    if let Err(error) = share(stream, &shares).await {
                        tracing::debug!("a share has ended: {error}");
                    }
                });
            }
            // Dropped: the guest sees that nobody is there.
            _ => tracing::debug!("the guest asks for service {number}"),
        }
    }
}

async fn share(mut stream: Stream, shares: &[Arc<Share>]) -> io::Result<()> {
    let number = stream.read_u16_le().await?;
    let share = shares.get(usize::from(number)).ok_or(io::ErrorKind::NotFound)?;
    let (reader, writer) = tokio::io::split(stream);
    share.serve_async(reader, writer).await.map_err(io::Error::other)
}
