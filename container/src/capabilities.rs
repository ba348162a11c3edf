//! Sets of capabilities (`capabilities(7)`), as bits by their kernel numbers.

use std::fmt;
use std::fs;

use kiln_contract::{SecuritySpec, UnknownCapability, linux_capability};
use oci_spec::runtime::{Capabilities, Capability};

use crate::runtime::RuntimeError;

/// Every capability by its kernel number (`linux/capability.h`).
const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// What a container has unless told otherwise: Docker's set.
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// A set of capabilities; bit n is capability n.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct CapabilitySet(u64);

impl CapabilitySet {
    /// To send signals to processes of other users.
    pub(crate) const KILL: Self = Self(1 << 5);

    /// What is in `other` too.
    pub(crate) const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// From the kernel's bits.
    #[cfg(test)]
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The kernel's bits.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// Whether `capability` is in the set.
    pub(crate) fn contains(self, capability: Capability) -> bool {
        self.0 & Self::only(capability).0 != 0
    }

    /// What is in both sets.
    #[must_use]
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What containers have unless told otherwise.
    pub(crate) fn default_of_containers() -> Self {
        DEFAULT.into_iter().fold(Self(0), |set, capability| Self(set.0 | Self::only(capability).0))
    }

    /// What this process may give away: its bounding set, as far as it also holds it.
    ///
    /// # Errors
    /// If `/proc/self/status` cannot be read.
    pub(crate) fn of_this_process() -> Result<Self, RuntimeError> {
        let path = "/proc/self/status";
        let status = fs::read_to_string(path).map_err(|source| RuntimeError::Io {
            doing: "read",
            path: path.into(),
            source,
        })?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
                .unwrap_or(0)
        };
        Ok(Self(field("CapPrm:") & field("CapBnd:")))
    }

    /// The set that `security` asks for: Docker's rules.
    ///
    /// # Errors
    /// [`RuntimeError::Invalid`] for a name that is no capability.
    pub(crate) fn asked_for(security: &SecuritySpec) -> Result<Self, RuntimeError> {
        let asked = security.capabilities(Self::default_of_containers().0);
        asked.map(Self).map_err(|unknown| RuntimeError::Invalid(unknown.to_string()))
    }

    /// As the OCI runtime specification writes it.
    pub(crate) fn to_oci(self) -> Capabilities {
        ALL.into_iter().filter(|capability| self.contains(*capability)).collect()
    }

    fn only(capability: Capability) -> Self {
        Self(ALL.iter().position(|each| *each == capability).map_or(0, |number| 1 << number))
    }
}

impl fmt::Debug for CapabilitySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CapabilitySet({:#x})", self.0)
    }
}

/// A capability by its name, with or without `CAP_`, in any case.
pub(crate) fn parse(name: &str) -> Result<Capability, RuntimeError> {
    let number = linux_capability(name).map_err(|unknown| RuntimeError::Invalid(unknown.to_string()))?;
    let known = usize::try_from(number).ok().and_then(|number| ALL.get(number).copied());
    known.ok_or_else(|| RuntimeError::Invalid(UnknownCapability(name.to_owned()).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_dockers_set_unless_flags_say_more() {
        let set = |security: &SecuritySpec| CapabilitySet::asked_for(security).map(CapabilitySet::bits);
        assert_eq!(set(&SecuritySpec::default()).unwrap(), 0xa804_25fb);
        let bare = SecuritySpec { cap_drop: vec!["ALL".into()], ..SecuritySpec::default() };
        assert_eq!(set(&bare).unwrap(), 0);
        let wrong = SecuritySpec { cap_add: vec!["EVERYTHING".into()], ..SecuritySpec::default() };
        assert!(matches!(set(&wrong), Err(RuntimeError::Invalid(_))));
    }

    #[test]
    fn numbers_are_the_kernels() {
        let oci = CapabilitySet::from_bits(1 << 21 | 1 << 40).to_oci();
        assert_eq!(oci, Capabilities::from([Capability::SysAdmin, Capability::CheckpointRestore]));
        for capability in ALL {
            assert_eq!(parse(&capability.to_string()).unwrap(), capability);
        }
    }
}
