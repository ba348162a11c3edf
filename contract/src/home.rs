//! `KILN_HOME`: the one place that computes a path in it.
//!
//! ```text
//! store/                 objects, layers, blobs, tags, renders (the store's own business)
//! instances/<id>/        one created workload
//!   instance.json        its record, replaced atomically
//!   upper/  work/        its overlay's writable half
//!   root/                where its root is mounted (in its supervisor's mount namespace or the host's)
//!   bundle/              the OCI bundle
//!   log.jsonl            what it wrote
//!   ctl.sock             its supervisor
//!   ssh_host_key         the private key of its SSH server
//!   known_hosts          that server, as SSH clients know it
//! names/<name>           a name taken: holds the instance's id
//! networks/<name>.json   networks and their leases
//! templates/<key>/       machines saved when their guest was ready
//! volumes/<name>/        named volumes: data/ and volume.json
//! views/<name>/          a view: view.json, lock, upper/, work/
//! router/                the service of the router's views: socket, lock, log
//! kernels/<name>/        kernels that machines boot: kernel.json, the kernel and its modules
//! kernels/default        a symbolic link to the one that is booted if none is named
//! ssh/id_ed25519         the private key that may log in to machines; the public one beside it
//! disks/                 writable disks of machines (the disk room's own business), or where their pool is mounted
//! disks.btrfs            the pool, if there is one: a file with a file system
//! disks.json             which back end keeps the disks, if one was chosen
//! disks.lock             held by whoever mounts or changes what keeps the disks
//! ```

use std::env;
use std::path::{Path, PathBuf};

use crate::InstanceId;

/// The directory below which Kiln keeps everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home(PathBuf);

impl Home {
    /// A home at an explicit, absolute path.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// `$KILN_HOME`; else `/var/lib/kiln` for root, `$XDG_DATA_HOME/kiln` or `~/.local/share/kiln` for others,
    /// and `~/Library/Application Support/kiln` on macOS. `None` if no home directory is known.
    pub fn from_env(is_root: bool) -> Option<Self> {
        if let Some(home) = non_empty("KILN_HOME") {
            return std::path::absolute(home).ok().map(Self);
        }
        if cfg!(target_os = "macos") {
            return Some(Self(non_empty("HOME")?.join("Library/Application Support/kiln")));
        }
        if is_root {
            return Some(Self("/var/lib/kiln".into()));
        }
        let data = non_empty("XDG_DATA_HOME").or_else(|| Some(non_empty("HOME")?.join(".local/share")))?;
        Some(Self(data.join("kiln")))
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    /// All instances, a directory each.
    pub fn instances(&self) -> PathBuf {
        self.0.join("instances")
    }

    /// The directory of one instance.
    pub fn instance(&self, id: &InstanceId) -> InstanceDir {
        InstanceDir(self.instances().join(id.as_str()))
    }

    /// Taken names, a file each that holds the id of the instance that has it.
    pub fn names(&self) -> PathBuf {
        self.0.join("names")
    }

    /// Networks, a file each.
    pub fn networks(&self) -> PathBuf {
        self.0.join("networks")
    }

    /// Machines saved when their guest was ready, a directory each.
    pub fn templates(&self) -> PathBuf {
        self.0.join("templates")
    }

    /// Named volumes, a directory each.
    pub fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }

    /// Views with a record, a directory each.
    pub fn views(&self) -> PathBuf {
        self.0.join("views")
    }

    /// What the service of the router's views has: its socket, its lock and its log.
    pub fn router(&self) -> PathBuf {
        self.0.join("router")
    }

    /// Kernels that machines boot, a directory each.
    pub fn kernels(&self) -> PathBuf {
        self.0.join("kernels")
    }

    /// The private key that may log in to machines.
    pub fn ssh_key(&self) -> PathBuf {
        self.0.join("ssh/id_ed25519")
    }

    /// Writable disks of machines, where they are files.
    pub fn disks(&self) -> PathBuf {
        self.0.join("disks")
    }

    /// The file system in a file that is mounted at [`disks`](Self::disks), where `kiln init` made one.
    pub fn disk_pool(&self) -> PathBuf {
        self.0.join("disks.btrfs")
    }

    /// Which back end keeps the disks.
    pub fn disk_settings(&self) -> PathBuf {
        self.0.join("disks.json")
    }

    /// Held exclusively by whoever mounts or changes what keeps the disks.
    pub fn disk_lock(&self) -> PathBuf {
        self.0.join("disks.lock")
    }
}

fn non_empty(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The directory of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceDir(PathBuf);

impl InstanceDir {
    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The record ([`crate::InstanceRecord`] as JSON).
    pub fn record(&self) -> PathBuf {
        self.0.join("instance.json")
    }

    /// Held exclusively while the record is changed, and shared by nobody.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// The private key of its SSH server.
    pub fn ssh_host_key(&self) -> PathBuf {
        self.0.join("ssh_host_key")
    }

    /// Its SSH server, as SSH clients know it.
    pub fn known_hosts(&self) -> PathBuf {
        self.0.join("known_hosts")
    }

    /// The overlay's upper directory: what the workload changed.
    pub fn upper(&self) -> PathBuf {
        self.0.join("upper")
    }

    /// The overlay's work directory.
    pub fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    /// Where the root is mounted.
    pub fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    /// The OCI bundle (config.json).
    pub fn bundle(&self) -> PathBuf {
        self.0.join("bundle")
    }

    /// The OCI runtime's state directory.
    pub fn runtime_state(&self) -> PathBuf {
        self.0.join("runtime")
    }

    /// What the workload wrote, as JSON lines.
    pub fn log(&self) -> PathBuf {
        self.0.join("log.jsonl")
    }

    /// The supervisor's control socket.
    pub fn control(&self) -> PathBuf {
        self.0.join("ctl.sock")
    }

    /// What the supervisor itself had to say.
    pub fn supervisor_log(&self) -> PathBuf {
        self.0.join("supervisor.log")
    }
}
