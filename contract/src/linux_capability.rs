//! Linux capabilities by name (`capabilities(7)`), and the set that flags ask for.

use crate::SecuritySpec;

/// Every capability, at its kernel number (`linux/capability.h`).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A name that is no capability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a capability (capabilities(7) lists them)")]
pub struct UnknownCapability(pub String);

/// The kernel's number of a capability by its name, with or without `CAP_`, in any case.
///
/// # Errors
/// [`UnknownCapability`].
pub fn linux_capability(name: &str) -> Result<u32, UnknownCapability> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let number = (0..).zip(NAMES).find_map(|(number, known)| (known == bare).then_some(number));
    number.ok_or_else(|| UnknownCapability(name.to_owned()))
}

impl SecuritySpec {
    /// Every capability that is known here; bit n is capability n.
    pub const ALL_CAPABILITIES: u64 = (1 << NAMES.len()) - 1;

    /// The capabilities that it asks for where `usual` are had without a word, a bit each: Docker's rules, by which
    /// `--cap-add ALL` and `--cap-drop ALL` come first.
    ///
    /// # Errors
    /// [`UnknownCapability`].
    pub fn capabilities(&self, usual: u64) -> Result<u64, UnknownCapability> {
        let is_all = |name: &&String| name.eq_ignore_ascii_case("ALL");
        let mut set = if self.privileged || self.cap_add.iter().any(|name| is_all(&name)) {
            Self::ALL_CAPABILITIES
        } else if self.cap_drop.iter().any(|name| is_all(&name)) {
            0
        } else {
            usual
        };
        for name in self.cap_add.iter().filter(|name| !is_all(name)) {
            set |= 1 << linux_capability(name)?;
        }
        for name in self.cap_drop.iter().filter(|name| !is_all(name)) {
            set &= !(1 << linux_capability(name)?);
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_added_and_dropped_as_docker_does() {
        const CONTAINER: u64 = 0xa804_25fb;
        const ALL: u64 = 0x1ff_ffff_ffff;
        type Case<'a> = (&'a [&'a str], &'a [&'a str], bool, u64, u64);
        let cases: [Case<'_>; 9] = [
            (&[], &[], false, CONTAINER, CONTAINER),
            (&[], &[], false, ALL, ALL),
            (&[], &["ALL"], false, CONTAINER, 0),
            (&["net_admin"], &["all"], false, ALL, 1 << 12),
            (&["ALL"], &["CAP_SYS_ADMIN"], false, CONTAINER, ALL & !(1 << 21)),
            (&["CAP_BPF"], &["MKNOD"], false, CONTAINER, CONTAINER & !(1 << 27) | 1 << 39),
            (&[], &["net_raw"], false, ALL, ALL & !(1 << 13)),
            (&[], &[], true, CONTAINER, ALL),
            (&["CHOWN"], &["CHOWN"], false, CONTAINER, CONTAINER & !1),
        ];
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        for (add, drop, privileged, usual, expected) in cases {
            let spec = SecuritySpec {
                cap_add: own(add),
                cap_drop: own(drop),
                privileged,
                ..SecuritySpec::default()
            };
            assert_eq!(spec.capabilities(usual), Ok(expected), "+{add:?} -{drop:?} {privileged} {usual:#x}");
        }
        for wrong in ["", "CAP_", "EVERYTHING", "CAP_CAP_CHOWN"] {
            assert_eq!(linux_capability(wrong), Err(UnknownCapability(wrong.to_owned())));
        }
    }
}
