//! `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a container.
//!
//! They are files in the instance's directory, mounted over what the image has. Once mounted they are only ever written
//! in place: a file renamed over one of them would not be seen in the container.

use std::fs;
use std::path::PathBuf;

use kiln_contract::{Attachment, BackendError, InstanceDir, InstanceRecord};
use kiln_instance::failed;

use crate::runtime::ResolvedMount;

const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// The name that a container has for itself.
pub(crate) fn hostname(record: &InstanceRecord) -> String {
    match &record.spec.hostname {
        Some(name) => name.clone(),
        None if record.spec.network.mode == "host" => {
            rustix::system::uname().nodename().to_string_lossy().into_owned()
        }
        None => record.id.short().to_owned(),
    }
}

/// Makes the files, and gives their mounts. What the network decides is written later, by [`complete`].
pub(crate) fn prepare(
    record: &InstanceRecord,
    dir: &InstanceDir,
) -> Result<Vec<ResolvedMount>, BackendError> {
    let mut mounts = Vec::with_capacity(NAMES.len());
    for name in NAMES {
        let path = path(dir, name);
        let content = if name == "hostname" { format!("{}\n", hostname(record)) } else { String::new() };
        fs::write(&path, content).map_err(|error| failed("write", &path, error))?;
        mounts.push(ResolvedMount::bind(path, format!("/etc/{name}"), false, None));
    }
    Ok(mounts)
}

/// The mounts of another container's files, whose network this one shares.
pub(crate) fn share(dir: &InstanceDir) -> Vec<ResolvedMount> {
    NAMES
        .into_iter()
        .map(|name| (path(dir, name), format!("/etc/{name}")))
        .filter(|(path, _)| path.exists())
        .map(|(path, target)| ResolvedMount::bind(path, target, false, None))
        .collect()
}

/// Writes what the network decided. The files, mounted already, show it.
pub(crate) fn complete(dir: &InstanceDir, attachment: &Attachment) -> Result<(), BackendError> {
    for (name, content) in [("hosts", &attachment.hosts), ("resolv.conf", &attachment.resolv_conf)] {
        if let Some(content) = content {
            let path = path(dir, name);
            fs::write(&path, content).map_err(|error| failed("write", &path, error))?;
        }
    }
    Ok(())
}

fn path(dir: &InstanceDir, name: &str) -> PathBuf {
    dir.path().join(name)
}
