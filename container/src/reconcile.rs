//! Setting right what dead supervisors left.
//!
//! A container never outlives its supervisor: its first process gets SIGKILL when the supervisor dies, its mounts go
//! with the supervisor's mount namespace. What remains is found here, by the instance's record and id: processes that
//! the kernel has not taken along, the control group, addresses and rules of the network, the socket, and the record
//! itself, which still says that it runs.

use std::time::Duration;

use jiff::Timestamp;
use kiln_contract::{
    BackendError, ExitStatus, InstanceRecord, InstanceStatus, NetworkBackend, RuntimeChoice,
};
use kiln_net::ContainerNetwork;

use crate::cgroup::Cgroup;
use crate::instances::Instances;
pub(crate) use crate::instances::is_supervised;
use crate::{process, runtime};

/// How long a killed process may take to be gone.
const DEATH: Duration = Duration::from_secs(10);

/// Whether a record speaks of something that lives, or did when it was written.
pub(crate) fn claims_to_live(record: &InstanceRecord) -> bool {
    record.supervisor.is_some()
        || record.process.is_some()
        || matches!(
            record.status,
            InstanceStatus::Running | InstanceStatus::Paused | InstanceStatus::Restarting
        )
}

/// The record as it truly is: if its supervisor is dead, what that left is taken away first. `None` if the instance
/// was to be removed at its end, and is now.
pub(crate) fn truth(
    instances: &Instances,
    record: InstanceRecord,
) -> Result<Option<InstanceRecord>, BackendError> {
    if !claims_to_live(&record) || is_supervised(&record) {
        return Ok(Some(record));
    }
    let locked = match instances.lock(&record.id) {
        Ok(locked) => locked,
        Err(error) if error.kind() == kiln_contract::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Somebody else may have set it right, started it again, or removed it meanwhile.
    let mut record = match locked.read() {
        Ok(record) => record,
        Err(error) if error.kind() == kiln_contract::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !claims_to_live(&record) || is_supervised(&record) {
        return Ok(Some(record));
    }
    tracing::info!(id = record.id.short(), "taking away what a dead supervisor left");
    clean(instances, &record)?;
    let same_boot = record.boot.as_deref() == Some(process::boot_id());
    if record.status != InstanceStatus::Created {
        record.exit = Some(match (record.status, record.exit.take()) {
            // It had ended, and waited to be started again.
            (InstanceStatus::Restarting | InstanceStatus::Exited, Some(exit)) => exit,
            _ => ExitStatus {
                code: if same_boot { 137 } else { 255 },
                out_of_memory: false,
                at: Timestamp::now(),
                error: Some(
                    if same_boot {
                        "its supervisor was killed"
                    } else {
                        "the host was restarted while it ran"
                    }
                    .to_owned(),
                ),
            },
        });
        record.status = InstanceStatus::Exited;
    }
    forget_run(&mut record);
    locked.write(&record)?;
    drop(locked);
    if record.spec.remove {
        remove_files(instances, &record, true)?;
        return Ok(None);
    }
    Ok(Some(record))
}

/// Takes away everything outside the instance's directory. To be called when its supervisor does not live.
pub(crate) fn clean(instances: &Instances, record: &InstanceRecord) -> Result<(), BackendError> {
    let dir = instances.dir(&record.id);
    if record.boot.as_deref() == Some(process::boot_id()) {
        if let Some(process) = record.process {
            process::kill_and_wait(process, DEATH);
        }
        // Known by name even if the supervisor died before it was made.
        if let Some(path) = &record.cgroup {
            let cgroup = Cgroup::at(path);
            cgroup.kill()?;
            cgroup.remove()?;
        }
    }
    let runtime = match runtime::choose(&record.spec.runtime) {
        Ok(runtime) => runtime,
        // Its program was removed from the host: our own takes away what can be taken away without it.
        Err(_) => runtime::choose(&RuntimeChoice::Native)?,
    };
    runtime.delete(record, &dir)?;
    if kiln_net::needs_namespace(&record.spec.network.mode) && record.spec.network.mode != "none" {
        ContainerNetwork::new(instances.home()).teardown(&record.id)?;
    }
    let _ = std::fs::remove_file(dir.control());
    Ok(())
}

/// A record without anything that holds only while the instance runs.
pub(crate) fn forget_run(record: &mut InstanceRecord) {
    record.process = None;
    record.supervisor = None;
    record.boot = None;
    record.cgroup = None;
    record.addresses.clear();
    record.ports.clear();
}

/// Removes an instance that does not run: its files, its name and, with `volumes`, its anonymous volumes.
pub(crate) fn remove_files(
    instances: &Instances,
    record: &InstanceRecord,
    volumes: bool,
) -> Result<(), BackendError> {
    instances.forget(record)?;
    if volumes { crate::Volumes::open(instances.home()).release(&record.volumes) } else { Ok(()) }
}
