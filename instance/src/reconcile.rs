//! Setting right what dead supervisors left.
//!
//! A workload never outlives its supervisor: its process gets SIGKILL when the supervisor dies, mounts go with the
//! supervisor's mount namespace. What remains is found here, by the instance's record and id: the process, if the kernel
//! has not taken it along, what its kind knows of ([`Kind::clean`]), the socket, and the record itself, which still says
//! that it runs.
//!
//! A transient instance has a maker before it has a supervisor; if that died before it started it, nobody will.

use std::time::Duration;

use jiff::Timestamp;
use kiln_contract::{BackendError, ExitStatus, InstanceRecord, InstanceStatus};

use crate::instances::{Instances, is_of_this_boot, is_supervised};
use crate::kind::{Kind, Kinds, kind_of};
use crate::process;

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

/// Whether an instance was to be started at once by the process that made it, and that has died before.
fn is_orphan(record: &InstanceRecord) -> bool {
    let dead = |maker| !is_of_this_boot(record) || !process::alive(maker);
    record.status == InstanceStatus::Created && record.supervisor.is_none() && record.maker.is_some_and(dead)
}

/// Whether there is nothing to set right.
fn is_true(record: &InstanceRecord) -> bool {
    !is_orphan(record) && (!claims_to_live(record) || is_supervised(record))
}

/// The record as it truly is: if its supervisor is dead, what that left is taken away first. `None` if the instance
/// was to be removed at its end, and is now, or if it was orphaned.
pub(crate) fn truth(
    instances: &Instances,
    kinds: Kinds,
    record: InstanceRecord,
) -> Result<Option<InstanceRecord>, BackendError> {
    if is_true(&record) {
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
    if is_true(&record) {
        return Ok(Some(record));
    }
    tracing::info!(id = record.id.short(), "taking away what a dead supervisor left");
    let kind = kind_of(kinds, &record)?;
    clean(instances, kind, &record)?;
    let same_boot = is_of_this_boot(&record);
    if record.spec.remove || is_orphan(&record) {
        // It goes on saying that it lives until it is gone: if this process dies meanwhile, the next one goes on.
        drop(locked);
        remove_files(instances, kind, &record, true)?;
        return Ok(None);
    }
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
    Ok(Some(record))
}

/// Takes away everything outside the instance's directory. To be called when its supervisor does not live.
pub(crate) fn clean(
    instances: &Instances,
    kind: &dyn Kind,
    record: &InstanceRecord,
) -> Result<(), BackendError> {
    if is_of_this_boot(record)
        && let Some(process) = record.process
    {
        process::kill_and_wait(process, DEATH);
    }
    kind.clean(instances, record)?;
    let _ = std::fs::remove_file(instances.dir(&record.id).control());
    Ok(())
}

/// A record without anything that holds only while the instance runs.
pub(crate) fn forget_run(record: &mut InstanceRecord) {
    record.process = None;
    record.supervisor = None;
    record.maker = None;
    record.boot = None;
    record.cgroup = None;
    record.addresses.clear();
    record.ports.clear();
}

/// Removes an instance that does not run: its files, its name and, with `volumes`, its anonymous volumes.
pub(crate) fn remove_files(
    instances: &Instances,
    kind: &dyn Kind,
    record: &InstanceRecord,
    volumes: bool,
) -> Result<(), BackendError> {
    instances.forget(record)?;
    if volumes { kind.release_volumes(instances, &record.volumes) } else { Ok(()) }
}
