//! Which subnets the homes of this machine have taken: `/run/kiln/subnets.json`.
//!
//! Two homes know nothing of each other's networks, and a network without running containers has no
//! interface that would show its subnet. So whoever makes a network holds `/run/kiln/subnets.lock` and writes
//! its subnet down here. A claim counts only as long as its network's file exists, so that deleting a home
//! frees its subnets.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::NetError;

const DIRECTORY: &str = "/run/kiln";

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Claim {
    home: PathBuf,
    network: String,
    subnet: Ipv4Net,
}

/// The claims, while the lock is held.
#[derive(Debug)]
pub(crate) struct Claims {
    claims: Vec<Claim>,
    _lock: File,
}

impl Claims {
    /// Waits for the lock.
    pub(crate) fn lock() -> Result<Self, NetError> {
        let directory = Path::new(DIRECTORY);
        fs::create_dir_all(directory).map_err(NetError::doing(format!("making {DIRECTORY}")))?;
        let path = directory.join("subnets.lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(NetError::doing(format!("opening {}", path.display())))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(NetError::doing(format!("locking {}", path.display())))?;
        // A file that does not read costs nothing but the knowledge of unused subnets: it is written anew.
        let mut claims: Vec<Claim> = fs::read(directory.join("subnets.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        claims.retain(|claim| claim.home.join("networks").join(format!("{}.json", claim.network)).exists());
        Ok(Self { claims, _lock: lock })
    }

    /// All claimed subnets but that of `network` in `home`.
    pub(crate) fn of_others<'a>(
        &'a self,
        home: &'a Path,
        network: &'a str,
    ) -> impl Iterator<Item = Ipv4Net> + 'a {
        self.claims
            .iter()
            .filter(move |claim| claim.home != home || claim.network != network)
            .map(|claim| claim.subnet)
    }

    /// Writes a claim down, in place of an earlier one for the same network.
    pub(crate) fn claim(&mut self, home: &Path, network: &str, subnet: Ipv4Net) -> Result<(), NetError> {
        self.claims.retain(|claim| claim.home != home || claim.network != network);
        self.claims.push(Claim { home: home.into(), network: network.into(), subnet });
        let directory = Path::new(DIRECTORY);
        let (staged, path) = (directory.join("subnets.json.new"), directory.join("subnets.json"));
        let bytes = serde_json::to_vec(&self.claims).map_err(|error| NetError::Invalid(error.to_string()))?;
        fs::write(&staged, bytes)
            .and_then(|()| fs::rename(&staged, &path))
            .map_err(NetError::doing(format!("writing {}", path.display())))
    }
}
