//! What a saved state depends on besides the machine.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// A program as a file: cheaper than to ask it for its version, and as telling.
pub(crate) fn program(path: &Path) -> String {
    let file = fs::metadata(path).map_or_else(
        |_| String::new(),
        |file| format!(" {}:{}:{}.{}", file.ino(), file.len(), file.mtime(), file.mtime_nsec()),
    );
    format!("{}{file}", path.display())
}

/// The host's processor: a state of its own is only restored on the same model.
pub(crate) fn processor() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line =
        |name: &str| cpuinfo.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    format!("{} {} {}", line("model name"), line("flags"), line("microcode"))
}
