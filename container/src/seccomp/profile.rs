//! Profiles in Docker's JSON format.

use std::fs;
use std::path::Path;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};
use serde::Deserialize;

use crate::capabilities::{self, CapabilitySet};
use crate::runtime::RuntimeError;

/// A policy that may depend on capabilities and processors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Profile {
    pub(super) default_action: LinuxSeccompAction,
    #[serde(default)]
    pub(super) default_errno_ret: Option<u32>,
    #[serde(default)]
    pub(super) arch_map: Vec<Architecture>,
    /// The other way of naming architectures, without sub-architectures.
    #[serde(default)]
    pub(super) architectures: Vec<Arch>,
    #[serde(default)]
    pub(super) flags: Vec<LinuxSeccompFilterFlag>,
    #[serde(default)]
    pub(super) syscalls: Vec<Rule>,
}

/// An architecture and those whose programs its kernel runs too.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Architecture {
    pub(super) architecture: Arch,
    #[serde(default)]
    pub(super) sub_architectures: Vec<Arch>,
}

/// What is done for some system calls.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rule {
    #[serde(default)]
    pub(super) names: Vec<String>,
    /// The old way of naming one.
    #[serde(default)]
    pub(super) name: Option<String>,
    pub(super) action: LinuxSeccompAction,
    #[serde(default)]
    pub(super) errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) args: Vec<Argument>,
    #[serde(default)]
    pub(super) includes: Condition,
    #[serde(default)]
    pub(super) excludes: Condition,
}

/// What an argument must be.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Argument {
    pub(super) index: usize,
    pub(super) value: u64,
    #[serde(default)]
    pub(super) value_two: u64,
    pub(super) op: LinuxSeccompOperator,
}

/// When a rule is taken in, or left out.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Condition {
    pub(super) caps: Vec<String>,
    pub(super) arches: Vec<String>,
    pub(super) min_kernel: Option<String>,
}

/// `null` for a list, as Go writes an empty one.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Profile {
    /// Reads a profile from a file.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] if it cannot be read, [`RuntimeError::Invalid`] if it makes no sense.
    pub(crate) fn read(path: &Path) -> Result<Self, RuntimeError> {
        let bytes = fs::read(path).map_err(|source| RuntimeError::Io {
            doing: "read the seccomp profile",
            path: path.to_owned(),
            source,
        })?;
        serde_json::from_slice(&bytes).map_err(|error| {
            RuntimeError::Invalid(format!("the seccomp profile {} makes no sense: {error}", path.display()))
        })
    }

    /// What it says for a container with `capabilities` on this processor.
    ///
    /// # Errors
    /// [`RuntimeError::Invalid`] for capabilities that are none.
    pub(crate) fn resolve(&self, capabilities: CapabilitySet) -> Result<LinuxSeccomp, RuntimeError> {
        let mut rules = Vec::new();
        for rule in &self.syscalls {
            if rule.includes.all_hold(capabilities)? && !rule.excludes.any_holds(capabilities)? {
                rules.push(rule.to_oci()?);
            }
        }
        let mut architectures = self.architectures.clone();
        for entry in self.arch_map.iter().filter(|entry| entry.architecture == native()) {
            architectures.push(entry.architecture);
            architectures.extend(&entry.sub_architectures);
        }
        if architectures.is_empty() {
            architectures.push(native());
        }
        let mut seccomp = LinuxSeccompBuilder::default()
            .default_action(self.default_action)
            .architectures(architectures)
            .syscalls(rules)
            .build()
            .map_err(|error| RuntimeError::Invalid(error.to_string()))?;
        seccomp.set_default_errno_ret(self.default_errno_ret);
        if !self.flags.is_empty() {
            seccomp.set_flags(Some(self.flags.clone()));
        }
        Ok(seccomp)
    }
}

impl Condition {
    fn all_hold(&self, capabilities: CapabilitySet) -> Result<bool, RuntimeError> {
        for name in &self.caps {
            if !capabilities.contains(capabilities::parse(name)?) {
                return Ok(false);
            }
        }
        let kernel = self.min_kernel.as_deref().is_none_or(kernel_is_at_least);
        Ok(kernel && (self.arches.is_empty() || self.names_this_processor()))
    }

    fn any_holds(&self, capabilities: CapabilitySet) -> Result<bool, RuntimeError> {
        for name in &self.caps {
            if capabilities.contains(capabilities::parse(name)?) {
                return Ok(true);
            }
        }
        Ok(self.names_this_processor() || self.min_kernel.as_deref().is_some_and(kernel_is_at_least))
    }

    /// Architectures are named as Go names them.
    fn names_this_processor(&self) -> bool {
        let own = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        self.arches.iter().any(|name| name == own)
    }
}

/// This processor.
pub(super) fn native() -> Arch {
    if cfg!(target_arch = "aarch64") { Arch::ScmpArchAarch64 } else { Arch::ScmpArchX86_64 }
}

fn kernel_is_at_least(wanted: &str) -> bool {
    let numbers = |text: &str| {
        let mut parts =
            text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
    };
    numbers(&rustix::system::uname().release().to_string_lossy()) >= numbers(wanted)
}

impl Rule {
    fn to_oci(&self) -> Result<LinuxSyscall, RuntimeError> {
        let wrong = |error: oci_spec::OciSpecError| RuntimeError::Invalid(error.to_string());
        let names: Vec<String> = self.names.iter().chain(&self.name).cloned().collect();
        let mut rule =
            LinuxSyscallBuilder::default().names(names).action(self.action).build().map_err(wrong)?;
        rule.set_errno_ret(self.errno_ret);
        if !self.args.is_empty() {
            let args: Vec<LinuxSeccompArg> = self
                .args
                .iter()
                .map(|arg| {
                    LinuxSeccompArgBuilder::default()
                        .index(arg.index)
                        .value(arg.value)
                        .value_two(arg.value_two)
                        .op(arg.op)
                        .build()
                })
                .collect::<Result<_, _>>()
                .map_err(wrong)?;
            rule.set_args(Some(args));
        }
        Ok(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}
        ],
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "", "includes": {}},
            {"name": "mount", "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["sync"], "action": "SCMP_ACT_LOG", "includes": {"arches": ["mips"]}},
            {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.1"}}
        ]
    }"#;

    #[test]
    fn rules_depend_on_capabilities_processor_and_kernel() {
        let profile: Profile = serde_json::from_str(PROFILE).unwrap();
        let names = |bits: u64| -> Vec<String> {
            let resolved = profile.resolve(CapabilitySet::from_bits(bits)).unwrap();
            assert_eq!(resolved.default_errno_ret(), Some(38));
            assert_eq!(resolved.architectures().as_ref().unwrap()[0], native());
            resolved.syscalls().iter().flatten().flat_map(|rule| rule.names().clone()).collect()
        };
        assert_eq!(names(0), ["read", "write", "clone3", "ptrace"]);
        assert_eq!(names(1 << 21), ["read", "write", "mount", "ptrace"]);
    }

    #[test]
    fn what_is_no_profile_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["", "{}", r#"{"defaultAction": "SCMP_ACT_MAYBE"}"#, "[]"] {
            fs::write(file.path(), text).unwrap();
            assert!(matches!(Profile::read(file.path()), Err(RuntimeError::Invalid(_))), "{text}");
        }
        assert!(matches!(Profile::read(Path::new("/nowhere")), Err(RuntimeError::Io { .. })));
    }
}
