//! Starting a supervisor process.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use kiln_contract::{BackendError, ErrorKind, InstanceId};
use rustix::io::FdFlags;

use crate::control::{Attach, Connection, Reply, Request};
use crate::instances::Instances;
use crate::{process, socket};

/// Starts a supervisor for an instance and has it start the workload. When this returns, the workload runs; the
/// connection shows its streams if that was asked for.
pub(crate) fn start(
    instances: &Instances,
    id: &InstanceId,
    attach: Option<Attach>,
) -> Result<Connection, BackendError> {
    let fail = |error: io::Error| BackendError::caused("cannot start a supervisor", error);
    let (ours, theirs) = socket::pair().map_err(fail)?;
    let mut connection = Connection::over(ours);
    spawn(instances, id, theirs).map_err(fail)?;
    // A supervisor that is dead already is found out by reading.
    let _ = connection.send(&Request::Start { attach });
    match connection.reply().map_err(fail)? {
        Some(Reply::Done | Reply::Attached { .. }) => Ok(connection),
        Some(Reply::Failed(failure)) => Err(failure.into()),
        Some(Reply::Exited { .. }) | None => Err(died(instances, id)),
    }
}

fn spawn(instances: &Instances, id: &InstanceId, socket: OwnedFd) -> io::Result<()> {
    let log =
        OpenOptions::new().append(true).create(true).mode(0o600).open(instances.dir(id).supervisor_log())?;
    let mut command = Command::new(process::program()?);
    command
        .arg("supervise")
        .arg(id.as_str())
        .arg(socket.as_raw_fd().to_string())
        .env("KILN_HOME", instances.home().path())
        // So that it keeps no directory of the user busy.
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: two system calls between fork and exec, on a descriptor that outlives them.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            rustix::io::fcntl_setfd(&socket, FdFlags::empty())?;
            Ok(())
        });
    }
    // It is nobody's to wait for: it outlives this command, or ends right after it told how the workload did.
    command.spawn().map(drop)
}

fn died(instances: &Instances, id: &InstanceId) -> BackendError {
    let path = instances.dir(id).supervisor_log();
    let said = std::fs::read(&path).unwrap_or_default();
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(2000)..]).trim().to_owned();
    let error = BackendError::new(ErrorKind::Failed, "the supervisor ended before the workload ran");
    if said.is_empty() { error } else { error.hint(format!("its last words: {said}")) }
}
