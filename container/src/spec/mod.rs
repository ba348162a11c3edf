//! The OCI runtime specification of a container: everything that a runtime is told, from the instance's settings and
//! Docker's defaults.

mod kernel;
mod mounts;
mod process;

use std::path::Path;

use kiln_contract::{ExecSpec, InstanceRecord};
use oci_spec::runtime::{
    LinuxBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccomp, RootBuilder, Spec,
    SpecBuilder,
};

use crate::capabilities::CapabilitySet;
use crate::cgroup::Cgroup;
use crate::devices::Devices;
use crate::runtime::{NetworkNamespace, ResolvedMount, RuntimeError};
use kiln_accounts::User;

pub(crate) use process::{ProcessPlan, UMASK, exec_plan, plan};

/// The version of the specification that is written: what Debian 12's runc and crun know.
const VERSION: &str = "1.0.2";

/// What a container is made from, with everything looked up.
#[derive(Debug)]
pub(crate) struct Ingredients<'a> {
    /// The instance.
    pub(crate) record: &'a InstanceRecord,
    /// Its mounted root.
    pub(crate) root: &'a Path,
    /// What the supervisor mounts into it.
    pub(crate) mounts: &'a [ResolvedMount],
    /// Its network namespace.
    pub(crate) network: &'a NetworkNamespace,
    /// Its process.
    pub(crate) process: &'a ProcessPlan,
    /// Its devices.
    pub(crate) devices: &'a Devices,
    /// Its control group, if it is to be joined by the runtime or shown in the container.
    pub(crate) cgroup: Option<&'a Cgroup>,
    /// The runtime makes the group, and knows how to show it in the container.
    pub(crate) runtime_makes_cgroup: bool,
    /// Its system call filter.
    pub(crate) seccomp: Option<LinuxSeccomp>,
    /// The caller is root of a user namespace only.
    pub(crate) user_namespace: bool,
}

/// Who and what an instance's first process is: what is looked up in its root and on this host.
#[derive(Debug)]
pub(crate) struct Identity {
    /// Its user.
    pub(crate) user: User,
    /// Its capabilities, as far as the caller has them to give.
    pub(crate) capabilities: CapabilitySet,
}

impl Identity {
    /// Looks up an instance's user in `root`.
    ///
    /// # Errors
    /// [`RuntimeError::Invalid`] for a user or a capability that is none.
    pub(crate) fn resolve(record: &InstanceRecord, root: &Path) -> Result<Self, RuntimeError> {
        let process = &record.spec.process;
        let user = kiln_accounts::resolve(root, &process.user, &process.groups)?;
        Ok(Self { user, capabilities: capabilities(record)? })
    }
}

/// The capabilities of an instance's processes, as far as the caller has them to give.
///
/// # Errors
/// [`RuntimeError::Invalid`] for a name that is none.
pub(crate) fn capabilities(record: &InstanceRecord) -> Result<CapabilitySet, RuntimeError> {
    let spec = &record.spec;
    Ok(CapabilitySet::asked_for(&spec.security)?.and(CapabilitySet::of_this_process()?))
}

/// The same for a further process.
///
/// # Errors
/// As [`capabilities`].
pub(crate) fn exec_capabilities(
    record: &InstanceRecord,
    exec: &ExecSpec,
) -> Result<CapabilitySet, RuntimeError> {
    if exec.privileged { CapabilitySet::of_this_process() } else { capabilities(record) }
}

/// The host name of an instance.
pub(crate) fn hostname(record: &InstanceRecord) -> &str {
    record.spec.hostname.as_deref().unwrap_or(record.id.short())
}

/// Whether the security option `name` is given, with its value.
pub(crate) fn option<'a>(record: &'a InstanceRecord, name: &str) -> Option<&'a str> {
    record.spec.security.options.iter().rev().find_map(|option| {
        let (key, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
        (key == name).then_some(value)
    })
}

/// Writes the specification.
///
/// # Errors
/// [`RuntimeError::Invalid`] for settings that make no sense.
pub(crate) fn build(from: &Ingredients<'_>) -> Result<Spec, RuntimeError> {
    let spec = &from.record.spec;
    let privileged = spec.security.privileged;
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces(from))
        .devices(from.devices.nodes.clone())
        .sysctl(kernel::sysctls(spec, from.network, from.user_namespace)?)
        .rootfs_propagation(mounts::propagation(from.mounts))
        .build()
        .map_err(builder)?;
    let unconfined = privileged || option(from.record, "systempaths") == Some("unconfined");
    let paths = |paths: &[&str]| (!unconfined).then(|| paths.iter().map(|&path| path.to_owned()).collect());
    linux
        .set_masked_paths(paths(&mounts::MASKED))
        .set_readonly_paths(paths(&mounts::READ_ONLY))
        .set_seccomp(from.seccomp.clone())
        .set_resources(None);
    if let Some(cgroup) = from.cgroup.filter(|_| from.runtime_makes_cgroup) {
        linux
            .set_cgroups_path(Some(cgroup.path().into()))
            .set_resources(Some(kernel::resources(spec, from.devices)?));
    }
    SpecBuilder::default()
        .version(VERSION)
        .root(
            RootBuilder::default()
                .path(from.root)
                .readonly(spec.security.read_only)
                .build()
                .map_err(builder)?,
        )
        .hostname(hostname(from.record))
        .mounts(mounts::all(from)?)
        .process(from.process.to_oci()?)
        .linux(linux)
        .build()
        .map_err(builder)
}

fn namespaces(from: &Ingredients<'_>) -> Vec<LinuxNamespace> {
    use LinuxNamespaceType as Kind;
    let mut namespaces: Vec<LinuxNamespace> = [Kind::Pid, Kind::Mount, Kind::Uts, Kind::Ipc]
        .into_iter()
        .map(|kind| new_namespace(kind, None))
        .collect();
    match from.network {
        NetworkNamespace::New => namespaces.push(new_namespace(Kind::Network, None)),
        NetworkNamespace::Host => {}
        NetworkNamespace::Join(path) => namespaces.push(new_namespace(Kind::Network, Some(path))),
    }
    // Docker: a container that may do everything sees the host's groups; others see theirs as the root.
    if from.cgroup.is_some() && !from.record.spec.security.privileged {
        namespaces.push(new_namespace(Kind::Cgroup, None));
    }
    namespaces
}

fn new_namespace(kind: LinuxNamespaceType, path: Option<&Path>) -> LinuxNamespace {
    let mut namespace = LinuxNamespaceBuilder::default().typ(kind).build().unwrap_or_default();
    namespace.set_path(path.map(Path::to_owned));
    namespace
}

/// A builder's error: all fields have defaults, so that only the values can be wrong.
#[expect(clippy::needless_pass_by_value, reason = "the shape that `map_err` wants")]
fn builder(error: oci_spec::OciSpecError) -> RuntimeError {
    RuntimeError::Invalid(error.to_string())
}
