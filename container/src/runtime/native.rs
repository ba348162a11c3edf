//! The native runtime: `libcontainer` in this process.
//!
//! What `libcontainer` does between `fork` and `execve` of a first process (namespaces, mounts, devices, `pivot_root`,
//! sysctls, masked paths, the user) is done by its `container_init_process`, and the last steps by our own
//! `Executor`; further processes are made by our own code alone. Its front (`ContainerBuilder`) is not used: it joins every control group
//! hierarchy, each with a lock that waits for all processors, forks twice, and keeps a state file of its own; one
//! fork is enough here, since the caller can put its *next* child into a PID namespace.

use std::path::PathBuf;

use kiln_contract::{ExecSpec, InstanceDir, InstanceRecord, ProcessId};
use oci_spec::runtime::{Spec, UserBuilder};
use rustix::process::{Pid, PidfdFlags};
use std::os::fd::OwnedFd;

use super::birth::Birth;
use super::further::{Further, foreign_namespaces};
use super::{Created, Executed, Launch, NetworkNamespace, OciRuntime, RuntimeError, Streams, Waiting};
use crate::cgroup::{self, Cgroup};
use crate::spec::{self, Identity, Ingredients, ProcessPlan};
use crate::{devices, host, seccomp};

/// `libcontainer` in this process.
#[derive(Debug)]
pub(super) struct Native;

impl OciRuntime for Native {
    fn create(&self, launch: Launch<'_>) -> Result<Created, RuntimeError> {
        let Launch { record, dir, root, mounts, network, streams } = launch;
        let user_namespace = host::in_user_namespace();
        let identity = Identity::resolve(record, root)?;
        let plan = spec::plan(record, &identity)?;
        let devices = devices::resolve(&record.spec.security.devices, record.spec.security.privileged)?;
        let host_root = host::is_host_root();
        let group = cgroup::create(&record.id, &record.spec.resources, devices.rules.as_deref(), host_root)?;
        let result = spec::build(&Ingredients {
            record,
            root,
            mounts: &mounts,
            network: &network,
            process: &plan,
            devices: &devices,
            cgroup: group.as_ref().map(|group| &group.cgroup),
            runtime_makes_cgroup: false,
            seccomp: None,
            user_namespace,
        })
        .and_then(|full| {
            Birth {
                spec: for_libcontainer(full, &plan)?,
                plan: &plan,
                seccomp: seccomp::program(record, plan.capabilities)?,
                group: group.as_ref(),
                streams,
                directory: dir.path(),
                init: record.spec.init,
                own_network: network == NetworkNamespace::New,
            }
            .give()
        });
        match result {
            Ok(born) => Ok(Created {
                process: born.process,
                terminal: born.terminal,
                cgroup: group.map(|group| group.cgroup.path().to_owned()),
                waiting: Waiting::native(born.go, born.report, &plan),
            }),
            Err(error) => {
                if let Some(group) = group {
                    // The first error is the one to tell.
                    let _ = group.cgroup.kill().and_then(|()| group.cgroup.remove());
                }
                Err(error)
            }
        }
    }

    fn exec(
        &self,
        record: &InstanceRecord,
        _: &InstanceDir,
        exec: &ExecSpec,
        streams: Streams,
    ) -> Result<Executed, RuntimeError> {
        let target =
            record.process.ok_or_else(|| RuntimeError::Invalid("the container does not run".into()))?;
        let pidfd = open_process(target)?;
        let namespaces = foreign_namespaces(target.pid).map_err(|source| RuntimeError::Io {
            doing: "read the namespaces in",
            path: format!("/proc/{}/ns", target.pid).into(),
            source,
        })?;
        let root = PathBuf::from(format!("/proc/{}/root", target.pid));
        let who = exec.user.as_deref().unwrap_or(&record.spec.process.user);
        let user = kiln_accounts::resolve(&root, who, &record.spec.process.groups)?;
        let plan = spec::exec_plan(record, exec, user, spec::exec_capabilities(record, exec)?)?;
        let group = record.cgroup.as_deref().map(|path| cgroup::existing(&Cgroup::at(path)));
        Further {
            seccomp: seccomp::program(record, plan.capabilities)?,
            plan: &plan,
            group: group.as_ref(),
            streams,
            pidfd: &pidfd,
            namespaces,
        }
        .run()
    }

    fn brings_up_loopback(&self) -> bool {
        true
    }

    fn delete(&self, record: &InstanceRecord, _: &InstanceDir) -> Result<(), RuntimeError> {
        let Some(path) = &record.cgroup else { return Ok(()) };
        let cgroup = Cgroup::at(path);
        cgroup.kill()?;
        cgroup.remove()
    }
}

/// The specification for `libcontainer`, without what it would do in another way than is wanted: capabilities,
/// groups, limits, environment and working directory are set by our own child and executor.
fn for_libcontainer(mut spec: Spec, plan: &ProcessPlan) -> Result<Spec, RuntimeError> {
    if let Some(process) = spec.process_mut() {
        let user = UserBuilder::default().uid(plan.user.uid).gid(plan.user.gid).umask(spec::UMASK);
        process
            .set_user(user.build().map_err(|error| RuntimeError::Invalid(error.to_string()))?)
            .set_cwd("/".into())
            // With any HOME it does not ask the C library, which would load code of the container for the answer.
            .set_env(Some(vec!["HOME=/".to_owned()]))
            .set_capabilities(None)
            .set_rlimits(None);
    }
    Ok(spec)
}

/// A handle on a process that is surely the one that is meant.
fn open_process(process: ProcessId) -> Result<OwnedFd, RuntimeError> {
    let gone = || RuntimeError::Invalid("the container does not run any more".into());
    let pid = Pid::from_raw(process.pid.cast_signed()).ok_or_else(gone)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|_| gone())?;
    // Its number cannot be taken by another while the handle's process is the one of this start time.
    if host::process_id(process.pid) == Some(process) { Ok(pidfd) } else { Err(gone()) }
}
