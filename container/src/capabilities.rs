//! Sets of capabilities (`capabilities(7)`), as bits by their kernel numbers.

use std::fmt;
use std::fs;

use kiln_contract::SecuritySpec;
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
    /// Every capability that this program knows.
    pub(crate) const ALL: Self = Self((1 << ALL.len()) - 1);

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

    /// The set that `security` asks for: Docker's rules, where `--cap-add ALL` and `--cap-drop ALL` come first.
    ///
    /// # Errors
    /// [`RuntimeError::Invalid`] for a name that is no capability.
    pub(crate) fn asked_for(security: &SecuritySpec) -> Result<Self, RuntimeError> {
        let is_all = |name: &String| name.eq_ignore_ascii_case("ALL");
        let mut set = if security.privileged || security.cap_add.iter().any(is_all) {
            Self::ALL
        } else if security.cap_drop.iter().any(is_all) {
            Self(0)
        } else {
            Self::default_of_containers()
        };
        for name in security.cap_add.iter().filter(|name| !is_all(name)) {
            set.0 |= Self::only(parse(name)?).0;
        }
        for name in security.cap_drop.iter().filter(|name| !is_all(name)) {
            set.0 &= !Self::only(parse(name)?).0;
        }
        Ok(set)
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
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).parse().map_err(|_| {
        RuntimeError::Invalid(format!("`{name}` is not a capability (capabilities(7) lists them)"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(add: &[&str], drop: &[&str], privileged: bool) -> Result<u64, RuntimeError> {
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        CapabilitySet::asked_for(&SecuritySpec {
            cap_add: own(add),
            cap_drop: own(drop),
            privileged,
            ..SecuritySpec::default()
        })
        .map(CapabilitySet::bits)
    }

    #[test]
    fn capabilities_are_added_and_dropped_as_docker_does() {
        let cases: [(&[&str], &[&str], bool, u64); 7] = [
            (&[], &[], false, 0xa804_25fb),
            (&[], &["ALL"], false, 0),
            (&["net_admin"], &["all"], false, 1 << 12),
            (&["ALL"], &["CAP_SYS_ADMIN"], false, 0x1ff_ffff_ffff & !(1 << 21)),
            (&["CAP_BPF"], &["MKNOD"], false, 0xa804_25fb & !(1 << 27) | 1 << 39),
            (&[], &[], true, 0x1ff_ffff_ffff),
            (&["CHOWN"], &["CHOWN"], false, 0xa804_25fa),
        ];
        for (add, drop, privileged, expected) in cases {
            assert_eq!(set(add, drop, privileged).unwrap(), expected, "+{add:?} -{drop:?} {privileged}");
        }
        for wrong in ["", "CAP_", "EVERYTHING", "CAP_CAP_CHOWN"] {
            assert!(matches!(set(&[wrong], &[], false), Err(RuntimeError::Invalid(_))), "{wrong}");
        }
    }

    #[test]
    fn numbers_are_the_kernels() {
        let oci = CapabilitySet::from_bits(1 << 21 | 1 << 40).to_oci();
        assert_eq!(oci, Capabilities::from([Capability::SysAdmin, Capability::CheckpointRestore]));
    }
}
