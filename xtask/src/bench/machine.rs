//! What the figures were taken on.

use std::process::Command;

use crate::shell::capture;

/// Names and values, without anything that names the machine itself.
pub(crate) fn facts() -> Vec<(&'static str, String)> {
    let of_file = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).map(str::to_owned);
        line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
            .unwrap_or_else(|| "unknown".to_owned())
    };
    let first_line = |program: &str, argument: &str| {
        let text =
            capture(Command::new(program).arg(argument)).unwrap_or_else(|_| "not installed".to_owned());
        text.lines().next().unwrap_or_default().to_owned()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory: u64 = of_file("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
    vec![
        ("processor", format!("{}, {cores} cores", of_file("/proc/cpuinfo", "model name"))),
        ("memory", format!("{} GiB", (memory + (1 << 19)) >> 20)),
        ("kernel", first_line("uname", "-sr")),
        ("accelerator", super::slirp::accelerator().to_owned()),
        ("qemu", first_line("qemu-system-x86_64", "--version")),
        ("runc", first_line("runc", "--version")),
        ("podman", first_line("podman", "--version")),
        ("skopeo", first_line("skopeo", "--version")),
        ("umoci", first_line("umoci", "--version")),
        ("conmon", first_line("conmon", "--version")),
    ]
}
