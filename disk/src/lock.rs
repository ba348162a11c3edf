//! The lock of a home's disks: who holds it may mount, make or remove what keeps them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;

use kiln_contract::Home;
use rustix::fs::{FlockOperation, flock};

use crate::Result;
use crate::error::Context as _;

/// Waits until nobody else holds it. It ends when the result is dropped.
pub(crate) fn lock(home: &Home) -> Result<File> {
    std::fs::create_dir_all(home.path()).doing("create", home.path())?;
    let path = home.disk_lock();
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.doing("open", &path)?;
    flock(&file, FlockOperation::LockExclusive).doing("lock", &path)?;
    Ok(file)
}
