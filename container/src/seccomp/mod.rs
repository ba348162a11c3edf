//! Which system calls a container may make: Docker's default policy, or a profile that the user gives.
//!
//! A policy ([`Profile`]) is in Docker's format: what it says may depend on the container's capabilities and on the
//! processor. Resolved for one container it is the `linux.seccomp` section of the OCI specification, which external
//! runtimes get; for the native runtime it is compiled to a [`Program`].
//!
//! Programs for another architecture than the policy names (of which the default policy names the processor's own and
//! its 32-bit one) are killed with `SIGSYS` at their first system call. Calls of x86-64's x32 ABI get the policy's
//! default action.

mod default_policy;
mod profile;
mod program;

use std::path::Path;

use kiln_contract::InstanceRecord;
use oci_spec::runtime::LinuxSeccomp;

use crate::capabilities::CapabilitySet;
use crate::runtime::RuntimeError;
use crate::spec;

pub(crate) use profile::Profile;
pub(crate) use program::Program;

/// The policy of an instance whose process has `capabilities`; `None` if it is not confined.
///
/// # Errors
/// [`RuntimeError::Invalid`] for a profile that makes no sense, [`RuntimeError::Io`] for one that cannot be read.
pub(crate) fn policy(
    record: &InstanceRecord,
    capabilities: CapabilitySet,
) -> Result<Option<LinuxSeccomp>, RuntimeError> {
    let profile = match spec::option(record, "seccomp") {
        Some("unconfined") => return Ok(None),
        Some(path) if !path.is_empty() && path != "default" && path != "builtin" => {
            Profile::read(Path::new(path))?
        }
        // As Docker: a privileged container is confined only by a profile that is given by name.
        _ if record.spec.security.privileged => return Ok(None),
        _ => default_policy::profile(),
    };
    profile.resolve(capabilities).map(Some)
}

/// The same, compiled for this processor.
///
/// # Errors
/// As [`policy`].
pub(crate) fn program(
    record: &InstanceRecord,
    capabilities: CapabilitySet,
) -> Result<Option<Program>, RuntimeError> {
    policy(record, capabilities)?.map(|policy| Program::compile(&policy)).transpose()
}
