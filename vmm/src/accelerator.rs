//! What executes a machine's instructions.

use std::fmt;
use std::fs;

/// Hardware or software.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's translator; why there is nothing better.
    Tcg {
        /// One clause: `/dev/kvm is not there`.
        because: String,
    },
}

impl Accelerator {
    /// What this host has. That `/dev/kvm` can be opened proves nothing on x86-64: the processor must have `vmx` or `svm`, or
    /// no ordinary kernel runs.
    pub fn choose() -> Self {
        let because = match fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Err(error) => format!("/dev/kvm cannot be opened ({error})"),
            Ok(_) => match missing_extension(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()) {
                None => return Self::Kvm,
                Some(why) => why,
            },
        };
        Self::Tcg { because }
    }

    /// QEMU's name for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg { .. } => "tcg",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => f.write_str("KVM"),
            Self::Tcg { because } => write!(f, "TCG, software emulation: {because}"),
        }
    }
}

fn missing_extension(cpuinfo: &str) -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return None;
    }
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let has = flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"));
    (!has).then(|| "/dev/kvm is there, but the processor shows neither vmx nor svm".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_extensions_is_found_out() {
        for (flags, useful) in [
            ("flags\t\t: fpu vmx sse", true),
            ("processor : 0\nflags\t: fpu svm", true),
            ("flags\t: fpu vmxx nosvm", false),
            ("", false),
        ] {
            assert_eq!(
                missing_extension(flags).is_none(),
                useful || !cfg!(target_arch = "x86_64"),
                "{flags}"
            );
        }
    }
}
