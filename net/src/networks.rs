//! The networks of a home: `networks/<name>.json`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net};
use kiln_contract::{BackendError, Digest, Home, InstanceId};
use rustix::fs::{FlockOperation, flock};

use crate::claims::Claims;
use crate::network::{DEFAULT_NETWORK, USERNET};
use crate::{NetError, Network, NetworkOptions, leaf, pool};

/// Names that mean something else than a network that a user made.
const RESERVED: [&str; 8] = ["none", "host", "pasta", USERNET, "tap", "default", "bridge", DEFAULT_NETWORK];

/// The networks of a home.
#[derive(Debug, Clone)]
pub struct Networks {
    home: PathBuf,
}

impl Networks {
    /// Nothing is read or made by this.
    pub fn open(home: &Home) -> Self {
        Self { home: home.path().to_owned() }
    }

    /// Makes a network. Its interface appears with its first container.
    ///
    /// # Errors
    /// The name is taken or cannot be a name; the subnet collides; this user cannot make bridges.
    pub fn create(&self, name: &str, options: &NetworkOptions) -> Result<Network, BackendError> {
        check_name(name)?;
        if RESERVED.contains(&name) {
            return Err(NetError::NameTaken { name: name.into() }.into());
        }
        if !options.usernet && !leaf::can_bridge() {
            return Err(NetError::NotPrivileged { network: name.into() }.into());
        }
        let locked = self.lock()?;
        if locked.read(name)?.is_some() {
            return Err(NetError::NameTaken { name: name.into() }.into());
        }
        Ok(locked.make(name, options)?)
    }

    /// All networks: the built-in ones (`kiln`, `host`, `none`, `pasta`) come first, then the others by name.
    pub fn list(&self) -> Result<Vec<Network>, BackendError> {
        let mut made = read_all(&self.directory())?;
        let default = match made.iter().position(|network| network.name == DEFAULT_NETWORK) {
            Some(at) => made.remove(at),
            None => self.default_unused(),
        };
        let mut all = vec![default];
        all.extend(["host", "none", "pasta"].map(|name| Network::built_in(name, name)));
        all.append(&mut made);
        Ok(all)
    }

    /// One network. `bridge` and `default` are other names of `kiln`.
    pub fn find(&self, name: &str) -> Result<Network, BackendError> {
        match name {
            "host" | "none" | "pasta" => return Ok(Network::built_in(name, name)),
            DEFAULT_NETWORK | "bridge" | "default" => {
                return Ok(read(&self.directory(), DEFAULT_NETWORK)?.unwrap_or_else(|| self.default_unused()));
            }
            _ => check_name(name)?,
        }
        read(&self.directory(), name)?.ok_or_else(|| NetError::NoSuchNetwork { name: name.into() }.into())
    }

    /// Removes a network, and what is left of its interface.
    ///
    /// # Errors
    /// It is built in, or containers are connected to it.
    pub fn remove(&self, name: &str) -> Result<(), BackendError> {
        if RESERVED.contains(&name) {
            return Err(NetError::BuiltIn { name: name.into() }.into());
        }
        check_name(name)?;
        let locked = self.lock()?;
        let network = locked.read(name)?.ok_or_else(|| NetError::NoSuchNetwork { name: name.into() })?;
        if !network.leases.is_empty() {
            return Err(NetError::InUse { name: name.into(), instances: network.leases.len() }.into());
        }
        leaf::take_down(&locked, &network)?;
        locked.delete(name)?;
        Ok(())
    }

    /// Removes all networks that a user made and no container is connected to. Gives their names.
    pub fn prune(&self) -> Result<Vec<String>, BackendError> {
        if !self.directory().exists() {
            return Ok(Vec::new());
        }
        let locked = self.lock()?;
        let mut removed = Vec::new();
        for network in locked.all()? {
            if network.name != DEFAULT_NETWORK && network.leases.is_empty() {
                leaf::take_down(&locked, &network)?;
                locked.delete(&network.name)?;
                removed.push(network.name);
            }
        }
        Ok(removed)
    }

    fn directory(&self) -> PathBuf {
        self.home.join("networks")
    }

    fn default_unused(&self) -> Network {
        Network {
            interface: interface_name(&self.home, DEFAULT_NETWORK),
            ..Network::built_in(DEFAULT_NETWORK, "bridge")
        }
    }

    /// Networks as they are now, without waiting for whoever changes them.
    pub(crate) fn peek(&self) -> Result<Vec<Network>, NetError> {
        read_all(&self.directory())
    }

    /// Where the network's file is.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        file(&self.directory(), name)
    }

    /// Waits until nobody else changes a network of this home.
    pub(crate) fn lock(&self) -> Result<Locked, NetError> {
        let directory = self.directory();
        fs::create_dir_all(&directory).map_err(NetError::doing(format!("making {}", directory.display())))?;
        let path = directory.join(".lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(NetError::doing(format!("opening {}", path.display())))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(NetError::doing(format!("locking {}", path.display())))?;
        // One name for the home, however it was spelt: interface and table names come from it.
        let home = fs::canonicalize(&self.home).unwrap_or_else(|_| self.home.clone());
        Ok(Locked { home, directory, lock })
    }
}

/// The networks of a home while nobody else changes them.
#[derive(Debug)]
pub(crate) struct Locked {
    home: PathBuf,
    directory: PathBuf,
    lock: File,
}

impl Locked {
    /// The home, with all links resolved.
    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    /// The lock is held until this, too, is closed everywhere.
    pub(crate) fn share(&self) -> io::Result<File> {
        self.lock.try_clone()
    }

    pub(crate) fn read(&self, name: &str) -> Result<Option<Network>, NetError> {
        read(&self.directory, name)
    }

    pub(crate) fn all(&self) -> Result<Vec<Network>, NetError> {
        read_all(&self.directory)
    }

    pub(crate) fn write(&self, network: &Network) -> Result<(), NetError> {
        let path = file(&self.directory, &network.name);
        let bytes =
            serde_json::to_vec_pretty(network).map_err(|error| NetError::Invalid(error.to_string()))?;
        let staged = self.directory.join(format!(".{}.new", network.name));
        fs::write(&staged, bytes)
            .and_then(|()| fs::rename(&staged, &path))
            .map_err(NetError::doing(format!("writing {}", path.display())))
    }

    fn delete(&self, name: &str) -> Result<(), NetError> {
        let path = file(&self.directory, name);
        fs::remove_file(&path).map_err(NetError::doing(format!("removing {}", path.display())))
    }

    /// Makes a network with a subnet that is free on this machine, and writes it.
    pub(crate) fn make(&self, name: &str, options: &NetworkOptions) -> Result<Network, NetError> {
        let (driver, interface) = match options.usernet {
            true => (USERNET, String::new()),
            false => ("bridge", interface_name(&self.home, name)),
        };
        let mut network = Network {
            interface,
            internal: options.internal,
            labels: options.labels.clone(),
            created: jiff::Timestamp::now().to_string(),
            automatic: options.subnet.is_none(),
            boot: boot(),
            ..Network::built_in(name, driver)
        };
        self.choose_subnet(&mut network, options)?;
        Ok(network)
    }

    /// Gives the network another subnet if the one that was chosen for it has come to collide with the host's
    /// routes or addresses. Only to be asked while the network has no interface.
    pub(crate) fn avoid_collision(&self, network: &mut Network) -> Result<(), NetError> {
        let Some(IpNet::V4(subnet)) = network.subnet else { return Ok(()) };
        let taken = leaf::subnets_of_host()?;
        let Some(other) = pool::collision(&subnet, &taken) else { return Ok(()) };
        if !network.automatic || !network.leases.is_empty() {
            return Err(NetError::SubnetUnusable {
                subnet: subnet.into(),
                reason: format!("the host has come to have a route to {other}"),
            });
        }
        self.choose_subnet(network, &NetworkOptions::default())
    }

    fn choose_subnet(&self, network: &mut Network, options: &NetworkOptions) -> Result<(), NetError> {
        let mut taken: Vec<Ipv4Net> = leaf::subnets_of_host()?;
        // Addresses without a bridge are known in this home only: others may have the same.
        let mut claims = if network.is_bridge() { Some(Claims::lock()?) } else { None };
        taken.extend(claims.iter().flat_map(|claims| claims.of_others(&self.home, &network.name)));
        let of_home = self.all()?.into_iter().filter(|other| other.name != network.name);
        taken.extend(of_home.filter_map(|other| match other.subnet {
            Some(IpNet::V4(subnet)) => Some(subnet),
            _ => None,
        }));
        let subnet = match options.subnet {
            None => pool::free_subnet(&taken)?,
            Some(asked) => {
                let subnet = pool::usable(asked)?;
                if let Some(other) = pool::collision(&subnet, &taken) {
                    return Err(NetError::SubnetUnusable {
                        subnet: asked,
                        reason: format!(
                            "it collides with {other}, which this host has or another network took"
                        ),
                    });
                }
                subnet
            }
        };
        network.subnet = Some(subnet.into());
        network.gateway = match options.gateway {
            None => subnet.hosts().next().map(Into::into),
            Some(asked) if subnet.hosts().any(|address| asked == address) => Some(asked),
            Some(asked) => {
                return Err(NetError::AddressUnusable {
                    address: asked,
                    network: network.name.clone(),
                    reason: format!("a gateway must be a host's address in {subnet}"),
                });
            }
        };
        // The claim counts once the network's file is there; both are written under the machine's lock.
        self.write(network)?;
        match &mut claims {
            Some(claims) => claims.claim(&self.home, &network.name, subnet),
            None => Ok(()),
        }
    }
}

/// Whether any network's file speaks of `id`.
pub(crate) fn holder<'a>(networks: &'a [Network], id: &InstanceId) -> Option<&'a Network> {
    networks.iter().find(|network| network.leases.contains_key(id))
}

fn check_name(name: &str) -> Result<(), NetError> {
    let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if name.len() <= 64 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(letters)
    {
        Ok(())
    } else {
        Err(NetError::BadName { name: name.into() })
    }
}

/// `kiln` and 8 hex digits that are the same for the same home and network, and different for all others. The
/// kernel takes at most 15 bytes.
fn interface_name(home: &Path, network: &str) -> String {
    let home = fs::canonicalize(home).unwrap_or_else(|_| home.to_owned());
    let mut text = home.into_os_string().into_encoded_bytes();
    text.push(0);
    text.extend_from_slice(network.as_bytes());
    format!("kiln{}", &Digest::of(&text).hex()[..8])
}

/// Nobody is connected to anything after the host was started anew, whatever the file says.
fn void_old_leases(network: &mut Network, boot: &str) {
    if network.boot != boot {
        network.leases.clear();
        boot.clone_into(&mut network.boot);
    }
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn file(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.json"))
}

fn read(directory: &Path, name: &str) -> Result<Option<Network>, NetError> {
    let mut network = read_file(&file(directory, name))?;
    if let Some(network) = &mut network {
        void_old_leases(network, &boot());
    }
    Ok(network)
}

/// The file as it is.
pub(crate) fn read_file(path: &Path) -> Result<Option<Network>, NetError> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(NetError::doing(format!("reading {}", path.display())))?,
    };
    let network: Network = serde_json::from_slice(&bytes)
        .map_err(|error| NetError::Format { path: path.to_owned(), reason: error.to_string() })?;
    if network.format > Network::FORMAT {
        return Err(NetError::Format {
            path: path.to_owned(),
            reason: format!(
                "it is of version {}, and this program knows up to {}",
                network.format,
                Network::FORMAT
            ),
        });
    }
    Ok(Some(network))
}

fn read_all(directory: &Path) -> Result<Vec<Network>, NetError> {
    let doing = || NetError::doing(format!("listing {}", directory.display()));
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(doing())?,
    };
    let mut networks = Vec::new();
    for entry in entries {
        let path = entry.map_err(doing())?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "json") {
            networks.extend(read_file(&path)?);
        }
    }
    let boot = boot();
    networks.iter_mut().for_each(|network| void_old_leases(network, &boot));
    networks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(networks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_fit_the_kernel_and_differ_by_home_and_network() {
        let a = interface_name(Path::new("/a"), "x");
        assert_eq!(a.len(), 12);
        assert_eq!(a, interface_name(Path::new("/a"), "x"));
        assert_ne!(a, interface_name(Path::new("/b"), "x"));
        assert_ne!(a, interface_name(Path::new("/a"), "y"));
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", "..", ".lock", "a/b", "-x", "a b", "container:x", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("my_net-1.x").is_ok());
    }

    #[test]
    fn a_file_of_this_version_still_reads() {
        let id = "5".repeat(64);
        let sample = format!(
            r#"{{"format":1,"name":"n","driver":"bridge","subnet":"10.89.3.0/24","gateway":"10.89.3.1",
               "interface":"kiln0badcafe","internal":false,"labels":{{"a":"b"}},"created":"2026-01-01T00:00:00Z",
               "automatic":true,"boot":"","leases":{{"{id}":{{"address":"10.89.3.2","names":["web"],
               "ports":[{{"host_address":null,"host_port":80,"container_port":8080,"protocol":"tcp"}}]}}}}}}"#
        );
        let network: Network = serde_json::from_str(&sample).unwrap();
        assert_eq!(network.leases[&id.parse().unwrap()].ports[0].host_port, 80);
        let written = serde_json::to_value(&network).unwrap();
        assert_eq!(written, serde_json::from_str::<serde_json::Value>(&sample).unwrap());
    }

    #[test]
    fn leases_do_not_outlive_the_boot_in_which_they_were_given() {
        let directory = tempfile::tempdir().unwrap();
        for (given_in, count) in [(boot(), 1), ("an earlier boot".to_owned(), 0)] {
            let mut network = Network { boot: given_in, ..Network::built_in("n", "bridge") };
            let lease = crate::Lease::at(std::net::Ipv4Addr::new(10, 1, 0, 2));
            network.leases.insert(InstanceId::random(), lease);
            fs::write(file(directory.path(), "n"), serde_json::to_vec(&network).unwrap()).unwrap();
            assert_eq!(read(directory.path(), "n").unwrap().unwrap().leases.len(), count);
            assert_eq!(read_all(directory.path()).unwrap()[0].leases.len(), count);
        }
    }

    #[test]
    fn a_newer_file_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let mut network = Network::built_in("n", "bridge");
        network.format = Network::FORMAT + 1;
        fs::write(file(directory.path(), "n"), serde_json::to_vec(&network).unwrap()).unwrap();
        let error = read(directory.path(), "n").unwrap_err().to_string();
        assert!(error.contains("n.json") && error.contains("version 2"), "{error}");
    }
}
