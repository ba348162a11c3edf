//! `cp`: files into and out of an instance's root.

use std::io::{Read, Write};
use std::path::Path;

use kiln_contract::{BackendError, ErrorKind, Home, InstanceRecord, InstanceStatus};
use kiln_store::Store;

use crate::root::OpenRoot;
use kiln_instance::archive::{Archive, ArchiveError, Devices, Pack, Top, Unpack, pack};

type Result<T> = std::result::Result<T, BackendError>;

/// See [`kiln_contract::RuntimeBackend::copy_out`]. `record` tells the true state.
pub(crate) fn copy_out(
    home: &Home,
    record: &InstanceRecord,
    path: &Path,
    follow: bool,
    archive: &mut dyn Write,
) -> Result<()> {
    let root = open(home, record)?;
    let what = Pack { path, top: Top::Own, follow, owners: true };
    pack(&root.base, &what, archive).map_err(|error| failed(record, "copy from", error))
}

/// See [`kiln_contract::RuntimeBackend::copy_in`].
pub(crate) fn copy_in(
    home: &Home,
    record: &InstanceRecord,
    path: &Path,
    archive: &mut dyn Read,
) -> Result<()> {
    let root = open(home, record)?;
    let options = Unpack { owners: true, devices: Devices::as_caller(), top: None };
    Archive::open(archive)
        .and_then(|archive| archive.unpack(&root.base, path, &options))
        .map_err(|error| failed(record, "copy to", error))
}

fn open(home: &Home, record: &InstanceRecord) -> Result<OpenRoot> {
    match (record.status, record.process) {
        (InstanceStatus::Running | InstanceStatus::Paused, Some(process)) => OpenRoot::running(process.pid),
        _ => {
            let store =
                Store::open(home).map_err(|error| BackendError::caused("cannot open the store", error))?;
            OpenRoot::stopped(&store, home, record)
        }
    }
}

fn failed(record: &InstanceRecord, doing: &str, error: ArchiveError) -> BackendError {
    let kind = match error.kind() {
        std::io::ErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Failed,
    };
    BackendError::caused(format!("cannot {doing} {}", record.spec.name), error).of_kind(kind)
}
