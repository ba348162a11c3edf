//! The control group of a container: limits, freezing, killing, measuring; on v1, hybrid and v2 hierarchies.

mod create;
mod device_filter;
mod hierarchies;
mod processes;
mod stats;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kiln_contract::{Capabilities, Capability, Stats};
use rustix::process::{Pid, Signal};

pub(crate) use create::{Prepared, create, existing, left_to_runtime, planned};
pub(crate) use hierarchies::Hierarchies;
pub(crate) use processes::{network_bytes, process_table};

use crate::host;
use crate::runtime::RuntimeError;

/// How long the kernel may take to freeze, to end or to let go of processes before that is an error.
const PATIENCE: Duration = Duration::from_secs(10);

/// A container's control group, by its path relative to each hierarchy's mount point
/// ([`kiln_contract::InstanceRecord::cgroup`]).
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: String,
    hierarchies: Hierarchies,
}

impl Cgroup {
    /// The group at `path`, whether it is there or not.
    pub(crate) fn at(path: &str) -> Self {
        Self { path: path.to_owned(), hierarchies: Hierarchies::detect() }
    }

    /// Its path relative to each hierarchy's mount point.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The kind of hierarchies in which it is.
    pub(crate) fn hierarchies(&self) -> &Hierarchies {
        &self.hierarchies
    }

    /// Suspends all processes in it; returns when they are.
    ///
    /// # Errors
    /// If the kernel has not done it within ten seconds: a process may be waiting for a disk that does not answer.
    pub(crate) fn freeze(&self) -> Result<(), RuntimeError> {
        match self.hierarchies {
            Hierarchies::V2 => {
                self.write("cgroup.freeze", "1")?;
                self.wait_for("freeze", || {
                    Ok(self.read("cgroup.events")?.lines().any(|line| line == "frozen 1"))
                })
            }
            _ => self.wait_for("freeze", || {
                // Written again each time: processes forked meanwhile may have kept the group from freezing.
                self.write("freezer.state", "FROZEN")?;
                Ok(self.read("freezer.state")?.trim() == "FROZEN")
            }),
        }
    }

    /// Lets them go on.
    pub(crate) fn thaw(&self) -> Result<(), RuntimeError> {
        match self.hierarchies {
            Hierarchies::V2 => self.write("cgroup.freeze", "0"),
            _ => self.write("freezer.state", "THAWED"),
        }
    }

    /// Kills all processes in it, frozen or not. No error if there are none. Returns when none is left, or when
    /// those that are left have ended and wait for their parent.
    pub(crate) fn kill(&self) -> Result<(), RuntimeError> {
        if !self.directory().exists() {
            return Ok(());
        }
        if self.hierarchies == Hierarchies::V2 && self.write("cgroup.kill", "1").is_ok() {
            self.thaw()?;
            return self.wait_for("kill", || Ok(self.living()?.is_empty()));
        }
        self.wait_for("kill", || {
            let living = self.living()?;
            for pid in &living {
                // ESRCH: it ended by itself meanwhile.
                let _ = rustix::process::kill_process(*pid, Signal::KILL);
            }
            if !living.is_empty() {
                // A frozen process does not notice that it was killed.
                self.thaw()?;
            }
            Ok(living.is_empty())
        })
    }

    /// Removes it from every hierarchy, with groups that were made below it. No error if it is not there.
    ///
    /// # Errors
    /// If a process is still in it after ten seconds.
    pub(crate) fn remove(&self) -> Result<(), RuntimeError> {
        for directory in self.directories() {
            self.wait_for("remove", || match remove_tree(&directory) {
                Ok(()) => Ok(true),
                // Processes that have ended may not have been forgotten yet.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
                Err(source) => Err(RuntimeError::Io { doing: "remove", path: directory.clone(), source }),
            })?;
        }
        Ok(())
    }

    /// All processes in it and in groups below it, by their numbers in this process's PID namespace.
    pub(crate) fn processes(&self) -> Result<Vec<u32>, RuntimeError> {
        let mut pids = Vec::new();
        collect_processes(&self.directory(), &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// What it uses; the network's part is zero here.
    pub(crate) fn stats(&self) -> Result<Stats, RuntimeError> {
        stats::read(self)
    }

    /// Whether the kernel has killed a process in it for want of memory. To be asked before it is removed.
    pub(crate) fn out_of_memory(&self) -> bool {
        let (directory, file) = match self.hierarchies {
            Hierarchies::V2 => (self.directory(), "memory.events"),
            _ => (hierarchies::v1_directory("memory", &self.path), "memory.oom_control"),
        };
        fs::read_to_string(directory.join(file)).is_ok_and(|text| {
            text.lines()
                .filter_map(|line| line.strip_prefix("oom_kill "))
                .any(|count| count.trim().parse::<u64>().is_ok_and(|count| count > 0))
        })
    }

    /// Those of its hierarchies that a container sees in its own `/sys/fs/cgroup`, as (name, directory).
    pub(crate) fn shown_v1(&self) -> Vec<(&'static str, PathBuf)> {
        if self.hierarchies != Hierarchies::V1 {
            return Vec::new();
        }
        hierarchies::ALWAYS
            .into_iter()
            .chain(hierarchies::FOR_LIMITS)
            .map(|controller| (controller, hierarchies::v1_directory(controller, &self.path)))
            .filter(|(_, directory)| directory.exists())
            .collect()
    }

    /// The one directory that lists its processes and freezes them.
    fn directory(&self) -> PathBuf {
        match self.hierarchies {
            Hierarchies::V2 => hierarchies::v2_directory(&self.path),
            _ => hierarchies::v1_directory("freezer", &self.path),
        }
    }

    /// Its directory in every hierarchy where it may be; all of them, since an OCI runtime joins all.
    fn directories(&self) -> Vec<PathBuf> {
        match self.hierarchies {
            Hierarchies::V2 => vec![hierarchies::v2_directory(&self.path)],
            Hierarchies::V1 => hierarchies::ALWAYS
                .into_iter()
                .chain(hierarchies::FOR_LIMITS)
                .chain(["net_cls", "net_prio", "perf_event", "hugetlb", "rdma", "misc", "systemd", "unified"])
                .map(|controller| hierarchies::v1_directory(controller, &self.path))
                .collect(),
            Hierarchies::None => Vec::new(),
        }
    }

    /// Its processes that have not ended.
    fn living(&self) -> Result<Vec<Pid>, RuntimeError> {
        let alive = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // The state follows the name, which may hold anything, in brackets.
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        };
        let pids = self.processes()?;
        Ok(pids.into_iter().filter(alive).filter_map(|pid| Pid::from_raw(pid.cast_signed())).collect())
    }

    fn read(&self, file: &str) -> Result<String, RuntimeError> {
        let path = self.directory().join(file);
        fs::read_to_string(&path).map_err(|source| RuntimeError::Io { doing: "read", path, source })
    }

    fn write(&self, file: &str, value: &str) -> Result<(), RuntimeError> {
        let path = self.directory().join(file);
        fs::write(&path, value).map_err(|source| RuntimeError::Io { doing: "write", path, source })
    }

    fn wait_for(
        &self,
        doing: &'static str,
        mut done: impl FnMut() -> Result<bool, RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(200);
        while !done()? {
            if start.elapsed() > PATIENCE {
                let source = io::Error::from(io::ErrorKind::TimedOut);
                return Err(RuntimeError::Io { doing, path: self.directory(), source });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn collect_processes(directory: &Path, pids: &mut Vec<u32>) -> Result<(), RuntimeError> {
    let path = directory.join("cgroup.procs");
    match fs::read_to_string(&path) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(RuntimeError::Io { doing: "read", path, source }),
    }
    for below in directories_in(directory) {
        collect_processes(&below, pids)?;
    }
    Ok(())
}

fn directories_in(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes a directory of a control group and those below it.
fn remove_tree(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => {
            let below = directories_in(directory);
            if below.is_empty() {
                return Err(error);
            }
            below.iter().try_for_each(|below| remove_tree(below))?;
            fs::remove_dir(directory)
        }
    }
}

/// Why there are no control groups for this user.
fn why_no_groups(hierarchies: &Hierarchies, host_root: bool) -> String {
    match hierarchies {
        Hierarchies::None => "no control groups are mounted at /sys/fs/cgroup".into(),
        Hierarchies::V1 if !host_root => {
            "this host has control groups of version 1, which only root can use".into()
        }
        _ => "no control group was delegated to this user (start a user session of systemd, \
              or run below `systemd-run --user --scope -p Delegate=yes`)"
            .into(),
    }
}

/// What can be limited, suspended and measured on this host by this user.
pub(crate) fn capabilities() -> Capabilities {
    let host_root = host::is_host_root();
    let hierarchies = Hierarchies::detect();
    let missing = |reason: &str, which: &[Capability]| {
        which.iter().fold(Capabilities::all(), |all, capability| all.without(*capability, reason))
    };
    let every = [
        Capability::Pause,
        Capability::MemoryLimit,
        Capability::CpuLimit,
        Capability::PidsLimit,
        Capability::Stats,
    ];
    match hierarchies {
        Hierarchies::V1 if host_root => {
            let mut capabilities = Capabilities::all();
            let controllers = [
                ("freezer", Capability::Pause),
                ("memory", Capability::MemoryLimit),
                ("cpu", Capability::CpuLimit),
                ("pids", Capability::PidsLimit),
            ];
            for (controller, capability) in controllers {
                if !Path::new(hierarchies::MOUNT).join(controller).exists() {
                    let reason = format!("this host has no `{controller}` control groups");
                    capabilities = capabilities.without(capability, reason);
                }
            }
            capabilities
        }
        Hierarchies::V2 => match hierarchies::v2_parent(host_root) {
            None => missing(&why_no_groups(&Hierarchies::V2, host_root), &every),
            Some(parent) => {
                // `/kiln` may not have been made yet; what its parent has it can have.
                let directory = hierarchies::v2_directory(if host_root { "/" } else { &parent });
                let available = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
                let mut capabilities = Capabilities::all();
                let controllers = [
                    ("memory", Capability::MemoryLimit),
                    ("cpu", Capability::CpuLimit),
                    ("pids", Capability::PidsLimit),
                ];
                for (controller, capability) in controllers {
                    if !available.split_whitespace().any(|each| each == controller) {
                        let reason = format!("the control groups here have no `{controller}` controller");
                        capabilities = capabilities.without(capability, reason);
                    }
                }
                capabilities
            }
        },
        other => missing(&why_no_groups(&other, host_root), &every),
    }
}
