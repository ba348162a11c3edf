//! The control groups (v2) that everything of the workload is in, and the agent is not.
//!
//! ```text
//! /cgroup                  the hierarchy
//!   agent/                 the agent
//!   workload/              the root that the workload sees: frozen as a whole
//!     init/                processes that were started over the link
//! ```
//!
//! The workload's root has no processes of its own, so that a container engine can hand out controllers.
//!
//! A system's init has the whole hierarchy, as on a machine without a guest: below a root that is none, systemd takes itself
//! to be in a container, and leaves out what only a machine needs. What it makes beside these groups is the workload too.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_bind, mount_remount};
use rustix::thread::UnshareFlags;

use crate::failure::{Doing as _, Failure, failed};
use crate::root::descriptor;

/// Where the hierarchy is, outside of the root.
pub(crate) const MOUNT: &str = "/cgroup";
/// Where the workload sees it.
const SEEN: &str = "/sys/fs/cgroup";
const AGENT: &str = "agent";
const WORKLOAD: &str = "workload";
/// For what is neither's.
const APART: &str = "apart";
/// How long processes may take to freeze.
const PATIENCE: Duration = Duration::from_secs(5);

/// The workload's control groups.
#[derive(Debug)]
pub(crate) struct Workload {
    /// Of the hierarchy; its path is out of reach once the root is another.
    root: OwnedFd,
    /// `workload/init`.
    init: OwnedFd,
    /// The namespace that sees the root as it is.
    whole: OwnedFd,
    /// All of the hierarchy is the workload's but the agent's group.
    system: AtomicBool,
}

impl Workload {
    /// Makes the groups, and puts this process into its own. From here on it sees the workload's group as the root, and so
    /// does all that it starts.
    pub(crate) fn make() -> Result<Self, Failure> {
        for group in [AGENT, WORKLOAD, "workload/init"] {
            let path = format!("{MOUNT}/{group}");
            std::fs::create_dir(&path).doing(format_args!("make {path}"))?;
        }
        // Not every kernel has all of them.
        for controller in ["+cpu", "+cpuset", "+memory", "+pids", "+io"] {
            let _ = std::fs::write(format!("{MOUNT}/cgroup.subtree_control"), controller);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, MOUNT, flags, Mode::empty()).doing("open the control groups")?;
        let init = openat(&root, "workload/init", flags, Mode::empty())
            .doing("open the workload's control group")?;
        let whole = File::open("/proc/self/ns/cgroup").doing("open the control group namespace")?;
        let workload = Self { root, init, whole: whole.into(), system: AtomicBool::new(false) };
        // The root of a control group namespace is where its maker was.
        workload.write(WORKLOAD, "cgroup.procs", b"0")?;
        // SAFETY: this process has one thread, and shares nothing that the namespace holds.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
            .doing("make a control group namespace")?;
        workload.write(AGENT, "cgroup.procs", b"0")?;
        Ok(workload)
    }

    /// From here on the hierarchy is a system's.
    pub(crate) fn give_to_system(&self) {
        self.system.store(true, Ordering::Relaxed);
    }

    /// Lays the whole hierarchy over what the agent sees of it.
    pub(crate) fn show_whole(&self) -> Result<(), Failure> {
        let doing = || format!("show the control groups at {SEEN}");
        mount_bind(descriptor(&self.root).as_str(), SEEN).doing(doing())?;
        let flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount_remount(SEEN, flags, "").doing(doing())
    }

    /// The directory of the group that processes are started in.
    pub(crate) fn group(&self) -> BorrowedFd<'_> {
        self.init.as_fd()
    }

    /// The same of a group that is none of the workload's, and is there until [`forget_apart`](Self::forget_apart).
    pub(crate) fn apart(&self) -> Result<Arc<OwnedFd>, Failure> {
        match mkdirat(&self.root, APART, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(format_args!("make the control group {APART}"), errno)),
        }
        let group = self.open(APART, ".", OFlags::RDONLY | OFlags::DIRECTORY);
        group.map(|group| Arc::new(group.into())).doing(format_args!("open the control group {APART}"))
    }

    /// Removes that group, which must be empty.
    pub(crate) fn forget_apart(&self) -> Result<(), Failure> {
        match unlinkat(&self.root, APART, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(failed(format_args!("remove the control group {APART}"), errno)),
        }
    }

    /// The namespace that a process of a system enters to see the groups as its init does.
    pub(crate) fn namespace(&self) -> Option<BorrowedFd<'_>> {
        self.system.load(Ordering::Relaxed).then(|| self.whole.as_fd())
    }

    /// Stops every process of the workload; returns when they have stopped.
    pub(crate) async fn freeze(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        let mut frozen = Vec::new();
        // A system makes groups until all that could make one is frozen.
        loop {
            let groups = self.groups()?;
            if groups == frozen {
                return Ok(());
            }
            for group in &groups {
                self.write(group, "cgroup.freeze", b"1")?;
            }
            for group in &groups {
                if !self.is_frozen(group, begun).await? {
                    self.thaw()?;
                    return Err(failed("freeze the workload", "it takes too long"));
                }
            }
            frozen = groups;
        }
    }

    async fn is_frozen(&self, group: &str, begun: Instant) -> Result<bool, Failure> {
        let mut events = match self.open(group, "cgroup.events", OFlags::RDONLY) {
            Ok(events) => events,
            // A group that has been removed has no processes.
            Err(Errno::NOENT) => return Ok(true),
            Err(errno) => return Err(failed(format_args!("open the events of {group}"), errno)),
        };
        while begun.elapsed() < PATIENCE {
            let mut text = String::new();
            events
                .seek(SeekFrom::Start(0))
                .and_then(|_| events.read_to_string(&mut text))
                .doing("see whether the workload is frozen")?;
            if text.lines().any(|line| line == "frozen 1") {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        Ok(false)
    }

    /// Lets them go on.
    pub(crate) fn thaw(&self) -> Result<(), Failure> {
        self.groups()?.iter().try_for_each(|group| self.write(group, "cgroup.freeze", b"0"))
    }

    /// Sees to it that no process of the workload runs any more, for good.
    pub(crate) async fn end(&self) -> Result<(), Failure> {
        if self.system.load(Ordering::Relaxed) {
            // Nobody can kill process 1, and it would start again what was killed.
            return self.freeze().await;
        }
        self.write(WORKLOAD, "cgroup.kill", b"1")
    }

    /// Processor time in microseconds, processes and threads.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let number = |text: &str| text.trim().parse::<u64>().unwrap_or(0);
        let group = if self.system.load(Ordering::Relaxed) { "." } else { WORKLOAD };
        let cpu = self.read(group, "cpu.stat");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("usage_usec ")).map_or(0, number);
        // The root counts none.
        let groups = self.groups().unwrap_or_default();
        (cpu, groups.iter().map(|group| number(&self.read(group, "pids.current"))).sum())
    }

    /// The groups that all of the workload is in.
    fn groups(&self) -> Result<Vec<String>, Failure> {
        let mut groups = vec![WORKLOAD.to_owned()];
        if self.system.load(Ordering::Relaxed) {
            let entries = Dir::read_from(&self.root).doing("list the control groups")?;
            for entry in entries {
                let entry = entry.doing("list the control groups")?;
                let name = entry.file_name().to_string_lossy();
                if entry.file_type() == FileType::Directory
                    && !matches!(&*name, "." | ".." | AGENT | WORKLOAD)
                {
                    groups.push(name.into_owned());
                }
            }
        }
        Ok(groups)
    }

    /// A file of a group, whole; empty if there is none.
    fn read(&self, group: &str, file: &str) -> String {
        let mut text = String::new();
        let read = self.open(group, file, OFlags::RDONLY).map(|mut file| file.read_to_string(&mut text));
        if read.is_err() {
            text.clear();
        }
        text
    }

    /// Writes to a file of a group, unless that has been removed.
    fn write(&self, group: &str, file: &str, text: &[u8]) -> Result<(), Failure> {
        let written = match self.open(group, file, OFlags::WRONLY) {
            Ok(mut open) => open.write_all(text),
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        };
        match written {
            // It was removed while it was open.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            written => written.doing(format_args!("write {file} of the control group {group}")),
        }
    }

    fn open(&self, group: &str, file: &str, flags: OFlags) -> Result<File, Errno> {
        openat(&self.root, format!("{group}/{file}"), flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
    }
}
