//! Making a container's control group with its limits, and joining it.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kiln_contract::{ByteSize, InstanceId, Resources};
use oci_spec::runtime::LinuxDeviceCgroup;

use super::Cgroup;
use super::device_filter;
use super::hierarchies::{self, ALWAYS, FOR_LIMITS, Hierarchies};
use crate::devices;
use crate::runtime::RuntimeError;

/// The period in which processor time is counted out, in microseconds: the kernel's own default.
const PERIOD: u64 = 100_000;

/// A control group that was made, and how a process joins it.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    /// The group.
    pub(crate) cgroup: Cgroup,
    /// Files into which a process writes `0` to join.
    joins: Vec<PathBuf>,
}

impl Prepared {
    /// Moves this process, which must have one thread only, into the group.
    ///
    /// # Errors
    /// Whatever the kernel says; the process may then be in some hierarchies of several.
    pub(crate) fn join(&self) -> io::Result<()> {
        join_all(&self.joins)
    }
}

/// The files by which a process joins the existing group `cgroup`.
pub(crate) fn existing(cgroup: &Cgroup) -> Prepared {
    let joins = cgroup
        .directories()
        .into_iter()
        .map(|directory| directory.join(join_file(&cgroup.hierarchies)))
        .filter(|file| file.exists())
        .collect();
    Prepared { cgroup: cgroup.clone(), joins }
}

fn join_all(files: &[PathBuf]) -> io::Result<()> {
    for file in files {
        fs::write(file, "0")?;
    }
    Ok(())
}

/// `tasks` moves one thread, and for the calling thread the kernel then takes no lock that waits for all processors
/// (0.05 ms instead of 0.4 ms and more with `cgroup.procs`). v2 knows no such file.
fn join_file(hierarchies: &Hierarchies) -> &'static str {
    if *hierarchies == Hierarchies::V1 { "tasks" } else { "cgroup.procs" }
}

/// Makes the group of instance `id` with the limits of `resources`. `device_rules` are what is allowed of devices; `None`
/// allows everything.
///
/// `None` where this host or user can have no groups and no limit is asked for.
///
/// # Errors
/// [`RuntimeError::Unsupported`] for a limit that cannot be kept here.
pub(crate) fn create(
    id: &InstanceId,
    resources: &Resources,
    device_rules: Option<&[LinuxDeviceCgroup]>,
    host_root: bool,
) -> Result<Option<Prepared>, RuntimeError> {
    let hierarchies = Hierarchies::detect();
    let prepared = match hierarchies {
        Hierarchies::V1 if host_root => Some(create_v1(id, resources, device_rules)?),
        Hierarchies::V2 => create_v2(id, resources, device_rules, host_root)?,
        Hierarchies::V1 | Hierarchies::None => None,
    };
    if prepared.is_none() {
        refuse_limits(resources, &hierarchies, host_root)?;
    }
    Ok(prepared)
}

/// The group that an OCI runtime is to make for instance `id`; `None` where this host or user can have none.
///
/// # Errors
/// [`RuntimeError::Unsupported`] for a limit where there is none.
pub(crate) fn left_to_runtime(
    id: &InstanceId,
    resources: &Resources,
    host_root: bool,
) -> Result<Option<Cgroup>, RuntimeError> {
    let hierarchies = Hierarchies::detect();
    let path = planned(id, host_root);
    if path.is_none() {
        refuse_limits(resources, &hierarchies, host_root)?;
    }
    Ok(path.map(|path| Cgroup { path, hierarchies }))
}

fn refuse_limits(
    resources: &Resources,
    hierarchies: &Hierarchies,
    host_root: bool,
) -> Result<(), RuntimeError> {
    match first_limit(resources) {
        None => Ok(()),
        Some(limit) => {
            let reason = super::why_no_groups(hierarchies, host_root);
            Err(RuntimeError::Unsupported(format!("{limit} cannot be limited: {reason}")))
        }
    }
}

/// The path of the group that [`create`] makes for instance `id`; `None` where this host or user can have none.
pub(crate) fn planned(id: &InstanceId, host_root: bool) -> Option<String> {
    match Hierarchies::detect() {
        Hierarchies::V1 => host_root.then(|| v1_path(id)),
        Hierarchies::V2 => v2_path(id, host_root),
        Hierarchies::None => None,
    }
}

fn v1_path(id: &InstanceId) -> String {
    format!("/kiln/{id}")
}

fn v2_path(id: &InstanceId, host_root: bool) -> Option<String> {
    let parent = hierarchies::v2_parent(host_root)?;
    Some(match parent.as_str() {
        "/kiln" => format!("/kiln/{id}"),
        _ => format!("{}/kiln-{id}", parent.trim_end_matches('/')),
    })
}

fn first_limit(resources: &Resources) -> Option<&'static str> {
    let Resources { cpus, cpu_shares, cpuset, memory, memory_swap, pids, ulimits: _, shm_size: _ } =
        resources;
    if memory.is_some() || memory_swap.is_some() {
        Some("memory")
    } else if cpus.is_some() || cpu_shares.is_some() || cpuset.is_some() {
        Some("processor time")
    } else if limits_pids(pids) {
        Some("the number of processes")
    } else {
        None
    }
}

fn limits_pids(pids: &Option<i64>) -> bool {
    pids.is_some_and(|pids| pids > 0)
}

fn write(file: &Path, value: &str) -> Result<(), RuntimeError> {
    fs::write(file, value).map_err(|source| RuntimeError::Io {
        doing: "write",
        path: file.to_owned(),
        source,
    })
}

fn make_directory(directory: &Path) -> Result<(), RuntimeError> {
    fs::create_dir(directory)
        .or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            io::ErrorKind::NotFound => fs::create_dir_all(directory),
            _ => Err(error),
        })
        .map_err(|source| RuntimeError::Io {
            doing: "make the control group",
            path: directory.to_owned(),
            source,
        })
}

fn create_v1(
    id: &InstanceId,
    resources: &Resources,
    device_rules: Option<&[LinuxDeviceCgroup]>,
) -> Result<Prepared, RuntimeError> {
    let cgroup = Cgroup { path: v1_path(id), hierarchies: Hierarchies::V1 };
    let made = fill_v1(&cgroup, resources, device_rules);
    if made.is_err() {
        // What was made is useless; its removal cannot tell more than the error that is on its way.
        let _ = cgroup.remove();
    }
    made.map(|joins| Prepared { cgroup, joins })
}

fn fill_v1(
    cgroup: &Cgroup,
    resources: &Resources,
    device_rules: Option<&[LinuxDeviceCgroup]>,
) -> Result<Vec<PathBuf>, RuntimeError> {
    let mut joins = Vec::with_capacity(ALWAYS.len());
    for controller in ALWAYS.into_iter().chain(FOR_LIMITS) {
        let wanted = match controller {
            "cpu" => resources.cpus.is_some() || resources.cpu_shares.is_some(),
            "cpuset" => resources.cpuset.is_some(),
            "devices" => device_rules.is_some(),
            _ => true,
        };
        if !wanted {
            continue;
        }
        let limited = match controller {
            "memory" => resources.memory.is_some() || resources.memory_swap.is_some(),
            "pids" => limits_pids(&resources.pids),
            "freezer" | "cpuacct" | "blkio" => false,
            _ => true,
        };
        let directory = hierarchies::v1_directory(controller, &cgroup.path);
        if !Path::new(hierarchies::MOUNT).join(controller).exists() {
            if limited {
                return Err(RuntimeError::Unsupported(format!(
                    "this host has no `{controller}` control groups, which a setting of this container needs"
                )));
            }
            continue;
        }
        make_directory(&directory)?;
        let set = |file: &str, value: &str| write(&directory.join(file), value);
        match controller {
            "memory" => limit_memory_v1(&directory, resources)?,
            "pids" if limited => set("pids.max", &resources.pids.unwrap_or_default().to_string())?,
            "cpu" => {
                if let Some(cpus) = resources.cpus {
                    set("cpu.cfs_period_us", &PERIOD.to_string())?;
                    set("cpu.cfs_quota_us", &(u64::from(cpus.millis) * PERIOD / 1000).to_string())?;
                }
                if let Some(shares) = resources.cpu_shares {
                    set("cpu.shares", &shares.to_string())?;
                }
            }
            "cpuset" => {
                // A new group has neither processors nor memory nodes, and nothing can join it so.
                let parent = hierarchies::v1_directory(controller, "/kiln");
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    fill_cpuset(&parent, file)?;
                    fill_cpuset(&directory, file)?;
                }
                let processors = resources.cpuset.as_deref().unwrap_or_default();
                set("cpuset.cpus", processors).map_err(|error| cannot_run_on(processors, &error))?;
            }
            "devices" => {
                set("devices.deny", "a")?;
                for rule in device_rules.unwrap_or_default() {
                    set("devices.allow", &devices::v1_line(rule))?;
                }
            }
            _ => {}
        }
        joins.push(directory.join("tasks"));
    }
    Ok(joins)
}

/// Those numbers are no processors of this host, or none that are left to this group.
fn cannot_run_on(processors: &str, error: &RuntimeError) -> RuntimeError {
    RuntimeError::Invalid(format!("cannot run on processors `{processors}`: {error}"))
}

fn fill_cpuset(directory: &Path, file: &str) -> Result<(), RuntimeError> {
    let read = |path: PathBuf| {
        fs::read_to_string(&path).map_err(|source| RuntimeError::Io { doing: "read", path, source })
    };
    if read(directory.join(file))?.trim().is_empty() {
        let parent = read(directory.join("..").join(file))?;
        write(&directory.join(file), parent.trim())?;
    }
    Ok(())
}

fn limit_memory_v1(directory: &Path, resources: &Resources) -> Result<(), RuntimeError> {
    let Some(memory) = resources.memory else {
        return match resources.memory_swap {
            None => Ok(()),
            Some(_) => {
                Err(RuntimeError::Invalid("memory and swap can only be limited along with memory".into()))
            }
        };
    };
    write(&directory.join("memory.limit_in_bytes"), &memory.bytes().to_string())?;
    let both = directory.join("memory.memsw.limit_in_bytes");
    match resources.memory_swap {
        // Kernels without swap accounting have no such file; nobody asked for it by name.
        None if !both.exists() => Ok(()),
        None => write(&both, &memory.bytes().saturating_mul(2).to_string()),
        Some(_) if !both.exists() => Err(RuntimeError::Unsupported(
            "this kernel does not count swap (boot it with swapaccount=1)".into(),
        )),
        Some(swap) if swap.bytes() < memory.bytes() => {
            Err(RuntimeError::Invalid("memory and swap together cannot be less than memory".into()))
        }
        Some(swap) => write(&both, &swap.bytes().to_string()),
    }
}

fn create_v2(
    id: &InstanceId,
    resources: &Resources,
    device_rules: Option<&[LinuxDeviceCgroup]>,
    host_root: bool,
) -> Result<Option<Prepared>, RuntimeError> {
    let Some(path) = v2_path(id, host_root) else { return Ok(None) };
    let cgroup = Cgroup { path, hierarchies: Hierarchies::V2 };
    let directory = hierarchies::v2_directory(&cgroup.path);
    let made = make_directory(&directory).and_then(|()| {
        enable_controllers(&directory);
        limit_v2(&directory, resources)?;
        match device_rules {
            // In a user namespace no device works but those that were given to it.
            Some(rules) if host_root => keep_devices(&directory, rules),
            _ => Ok(()),
        }
    });
    match made {
        Ok(()) => {
            let joins = vec![directory.join("cgroup.procs")];
            Ok(Some(Prepared { cgroup, joins }))
        }
        Err(error) => {
            let _ = cgroup.remove();
            let nothing_asked = first_limit(resources).is_none();
            if nothing_asked && !host_root { Ok(None) } else { Err(error) }
        }
    }
}

fn keep_devices(directory: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), RuntimeError> {
    device_filter::attach(directory, rules).map_err(|source| {
        RuntimeError::Unsupported(format!(
            "this host cannot keep its devices from a container ({source}): its kernel needs CONFIG_CGROUP_BPF, and Kiln all \
             capabilities; --privileged gives a container all devices"
        ))
    })
}

/// Turns on, from the top down, what containers may need. What cannot be turned on is missed only by the limit that
/// needs it, which then says so.
fn enable_controllers(directory: &Path) {
    let mut above: Vec<&Path> = directory
        .ancestors()
        .skip(1)
        .take_while(|path| path.as_os_str().as_bytes().starts_with(hierarchies::MOUNT.as_bytes()))
        .collect();
    above.reverse();
    for parent in above {
        for controller in ["+memory", "+pids", "+cpu", "+cpuset", "+io"] {
            let _ = fs::write(parent.join("cgroup.subtree_control"), controller);
        }
    }
}

fn limit_v2(directory: &Path, resources: &Resources) -> Result<(), RuntimeError> {
    let set = |file: &str, value: String| {
        let path = directory.join(file);
        if path.exists() {
            return write(&path, &value);
        }
        let controller = file.split('.').next().unwrap_or_default();
        Err(RuntimeError::Unsupported(format!(
            "the control groups of this user have no `{controller}` controller, which a limit of this container needs"
        )))
    };
    match (resources.memory, resources.memory_swap) {
        (None, None) => {}
        (None, Some(_)) => {
            return Err(RuntimeError::Invalid(
                "memory and swap can only be limited along with memory".into(),
            ));
        }
        (Some(memory), swap) => {
            set("memory.max", memory.bytes().to_string())?;
            let both = swap.map_or(memory.bytes().saturating_mul(2), ByteSize::bytes);
            let Some(swap_alone) = both.checked_sub(memory.bytes()) else {
                return Err(RuntimeError::Invalid(
                    "memory and swap together cannot be less than memory".into(),
                ));
            };
            if swap.is_some() || directory.join("memory.swap.max").exists() {
                set("memory.swap.max", swap_alone.to_string())?;
            }
        }
    }
    if let Some(cpus) = resources.cpus {
        set("cpu.max", format!("{} {PERIOD}", u64::from(cpus.millis) * PERIOD / 1000))?;
    }
    if let Some(shares) = resources.cpu_shares {
        set("cpu.weight", weight_of(shares).to_string())?;
    }
    if let Some(cpuset) = &resources.cpuset {
        set("cpuset.cpus", cpuset.clone()).map_err(|error| match error {
            RuntimeError::Io { .. } => cannot_run_on(cpuset, &error),
            other => other,
        })?;
    }
    if limits_pids(&resources.pids) {
        set("pids.max", resources.pids.unwrap_or_default().to_string())?;
    }
    Ok(())
}

/// v1 shares (2 to 262144) as v2 weight (1 to 10000), by the line that the OCI runtimes share.
fn weight_of(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    #[test]
    fn shares_become_weights_over_the_whole_range() {
        for (shares, weight) in [(0, 1), (2, 1), (1024, 39), (262_144, 10_000), (u64::MAX, 10_000)] {
            assert_eq!(super::weight_of(shares), weight, "{shares}");
        }
    }
}
