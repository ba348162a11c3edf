//! What is mounted in a container, and what of the kernel's files is hidden from it.

use std::path::Path;

use kiln_contract::ByteSize;
use oci_spec::runtime::{Mount, MountBuilder};

use super::{Ingredients, builder};
use crate::cgroup::Hierarchies;
use crate::runtime::{NetworkNamespace, ResolvedMount, RuntimeError};

/// Files and directories of the kernel that tell of, or reach, the host: Docker's list.
pub(super) const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// What may be read but not changed: Docker's list.
pub(super) const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Of `/dev/shm` unless told otherwise, as Docker has it.
const SHM_SIZE: ByteSize = ByteSize(64 << 20);

/// Everything, in the order in which it is mounted.
pub(super) fn all(from: &Ingredients<'_>) -> Result<Vec<Mount>, RuntimeError> {
    let spec = &from.record.spec;
    let privileged = spec.security.privileged;
    let shm_size = spec.resources.shm_size.unwrap_or(SHM_SIZE);
    let shm = format!("size={}", shm_size.bytes());
    // Group 5 is `tty` in every distribution; in a user namespace that maps one number only there is none.
    let terminal_group =
        if from.user_namespace && crate::host::mapped_groups() <= 5 { None } else { Some("gid=5") };
    let mut terminals = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    terminals.extend(terminal_group);
    let own: [(&str, &str, &[&str]); 5] = [
        ("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", &terminals),
        ("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", &shm]),
    ];
    let replaced =
        |target: &str| from.mounts.iter().any(|mount| Path::new(&mount.target) == Path::new(target));
    let mut mounts = Vec::new();
    for (target, kind, options) in own {
        if !replaced(target) {
            mounts.push(mount(target, kind, Path::new(kind), options.iter().copied())?);
        }
    }
    if !replaced("/sys") {
        mounts.push(sysfs(from, privileged)?);
        cgroups(from, privileged, &mut mounts)?;
    }
    for ResolvedMount { fstype, source, target, options } in from.mounts {
        if !target.starts_with('/') || Path::new(target) == Path::new("/") {
            return Err(RuntimeError::Invalid(format!(
                "cannot mount at `{target}`: it is not a path in the container"
            )));
        }
        mounts.push(mount(target, fstype, source, options.iter().map(String::as_str))?);
    }
    Ok(mounts)
}

/// A new sysfs shows the network of its mounter: only who owns that network's namespace may mount one. Others get
/// the host's, read-only.
fn sysfs(from: &Ingredients<'_>, privileged: bool) -> Result<Mount, RuntimeError> {
    let access = if privileged && !from.user_namespace { "rw" } else { "ro" };
    if from.user_namespace && *from.network != NetworkNamespace::New {
        return mount(
            "/sys",
            "bind",
            Path::new("/sys"),
            ["rbind", "nosuid", "noexec", "nodev", "ro", "rro", "rslave"],
        );
    }
    mount("/sys", "sysfs", Path::new("sysfs"), ["nosuid", "noexec", "nodev", access])
}

/// The container's own control groups, read-only: one mount on v2; on v1 those hierarchies in which it is.
fn cgroups(from: &Ingredients<'_>, privileged: bool, mounts: &mut Vec<Mount>) -> Result<(), RuntimeError> {
    let Some(cgroup) = from.cgroup else { return Ok(()) };
    let access = if privileged { "rw" } else { "ro" };
    let plain = ["nosuid", "noexec", "nodev"];
    match cgroup.hierarchies() {
        Hierarchies::V2 | Hierarchies::V1 if from.runtime_makes_cgroup => {
            let options = plain.into_iter().chain(["relatime", access]);
            mounts.push(mount("/sys/fs/cgroup", "cgroup", Path::new("cgroup"), options)?);
        }
        Hierarchies::V2 => {
            let options = plain.into_iter().chain(["relatime", access]);
            mounts.push(mount("/sys/fs/cgroup", "cgroup", Path::new("cgroup"), options)?);
        }
        Hierarchies::V1 if limits_anything(from) => {
            let options = plain.into_iter().chain(["mode=755", "size=64k"]);
            mounts.push(mount("/sys/fs/cgroup", "tmpfs", Path::new("tmpfs"), options)?);
            for (name, directory) in cgroup.shown_v1() {
                let options = plain.into_iter().chain(["rbind", "rprivate", access]);
                mounts.push(mount(&format!("/sys/fs/cgroup/{name}"), "bind", &directory, options)?);
            }
        }
        Hierarchies::V1 | Hierarchies::None => {}
    }
    Ok(())
}

/// On v1 the groups are shown only where there is a limit to be read in them (by language runtimes that size their
/// heaps): each hierarchy is a mount of its own, and all of them together take longer than the rest of a start.
fn limits_anything(from: &Ingredients<'_>) -> bool {
    let wanted = &from.record.spec.resources;
    wanted.memory.is_some() || wanted.cpus.is_some() || wanted.cpu_shares.is_some() || wanted.cpuset.is_some()
}

fn mount<'a>(
    target: &str,
    kind: &str,
    source: &Path,
    options: impl IntoIterator<Item = &'a str>,
) -> Result<Mount, RuntimeError> {
    MountBuilder::default()
        .destination(target)
        .typ(kind)
        .source(source)
        .options(options.into_iter().map(str::to_owned).collect::<Vec<_>>())
        .build()
        .map_err(builder)
}

/// How the container's mounts and the host's hear of each other: a mount that is to be shared with the host needs a
/// root that is.
pub(super) fn propagation(mounts: &[ResolvedMount]) -> &'static str {
    let any = |kinds: [&str; 2]| {
        mounts.iter().flat_map(|mount| &mount.options).any(|option| kinds.contains(&option.as_str()))
    };
    if any(["shared", "rshared"]) {
        "shared"
    } else if any(["slave", "rslave"]) {
        "slave"
    } else {
        "private"
    }
}
