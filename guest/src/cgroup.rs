//! The control group (v2) that everything of the workload is in, and the agent is not.
//!
//! ```text
//! /cgroup                  the hierarchy
//!   agent/                 the agent
//!   workload/              the root that the workload sees: frozen as a whole
//!     init/                processes that were started over the link
//! ```
//!
//! The workload's root has no processes of its own, so that a container engine or a system's init can hand out controllers.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::thread::UnshareFlags;

use crate::failure::{Doing as _, Failure, failed};

/// Where the hierarchy is, outside of the root.
pub(crate) const MOUNT: &str = "/cgroup";
/// How long processes may take to freeze.
const PATIENCE: Duration = Duration::from_secs(5);

/// The workload's control group.
#[derive(Debug)]
pub(crate) struct Workload {
    directory: OwnedFd,
    /// `init/cgroup.procs`, kept open: its path is out of reach once the root is another.
    init: File,
}

impl Workload {
    /// Makes the groups, and puts this process into its own. From here on it sees the workload's group as the root, and so
    /// does all that it starts.
    pub(crate) fn make() -> Result<Self, Failure> {
        for group in ["agent", "workload", "workload/init"] {
            let path = format!("{MOUNT}/{group}");
            std::fs::create_dir(&path).doing(format_args!("make {path}"))?;
        }
        // Not every kernel has all of them.
        for controller in ["+cpu", "+cpuset", "+memory", "+pids", "+io"] {
            let _ = std::fs::write(format!("{MOUNT}/cgroup.subtree_control"), controller);
        }
        let directory = openat(
            CWD,
            format!("{MOUNT}/workload"),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing("open the workload's control group")?;
        let init = File::options()
            .write(true)
            .open(format!("{MOUNT}/workload/init/cgroup.procs"))
            .doing("open the workload's control group")?;
        let workload = Self { directory, init };
        // The root of a control group namespace is where its maker was.
        workload.write("cgroup.procs", b"0")?;
        // SAFETY: this process has one thread, and shares nothing that the namespace holds.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
            .doing("make a control group namespace")?;
        std::fs::write(format!("{MOUNT}/agent/cgroup.procs"), "0")
            .doing("leave the workload's control group")?;
        Ok(workload)
    }

    /// Where a process writes `0` to join. For use between fork and exec.
    pub(crate) fn entrance(&self) -> BorrowedFd<'_> {
        self.init.as_fd()
    }

    /// Stops every process of the workload; returns when they have stopped.
    pub(crate) async fn freeze(&self) -> Result<(), Failure> {
        self.write("cgroup.freeze", b"1")?;
        let mut events = self.open("cgroup.events", OFlags::RDONLY)?;
        let begun = Instant::now();
        loop {
            let mut text = String::new();
            events
                .seek(SeekFrom::Start(0))
                .and_then(|_| events.read_to_string(&mut text))
                .doing("see whether the workload is frozen")?;
            if text.lines().any(|line| line == "frozen 1") {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                self.thaw()?;
                return Err(failed("freeze the workload", "it takes too long"));
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
    }

    /// Lets them go on.
    pub(crate) fn thaw(&self) -> Result<(), Failure> {
        self.write("cgroup.freeze", b"0")
    }

    /// Kills every process of the workload.
    pub(crate) fn kill(&self) -> Result<(), Failure> {
        self.write("cgroup.kill", b"1")
    }

    /// A file of the group, whole.
    pub(crate) fn read(&self, file: &str) -> Result<String, Failure> {
        let mut text = String::new();
        self.open(file, OFlags::RDONLY)?.read_to_string(&mut text).doing(format_args!("read {file}"))?;
        Ok(text)
    }

    fn write(&self, file: &str, text: &[u8]) -> Result<(), Failure> {
        self.open(file, OFlags::WRONLY)?.write_all(text).doing(format_args!("write {file}"))
    }

    fn open(&self, file: &str, flags: OFlags) -> Result<File, Failure> {
        openat(&self.directory, file, flags | OFlags::CLOEXEC, Mode::empty())
            .map(File::from)
            .doing(format_args!("open {file} of the workload's control group"))
    }
}

/// Puts this process, PID 1, where a system's init expects to be: in the root of the hierarchy that it sees.
pub(crate) fn enter_as_init() -> Result<(), Failure> {
    // The only other process so far that the kernel did not make is the agent; it has made the namespace.
    let namespace = std::fs::read_dir("/proc")
        .doing("list the processes")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .find(|pid| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.starts_with(b"@kiln-guest\0")
        })
        .ok_or_else(|| failed("find the agent", "it is not there"))?;
    let namespace = File::open(format!("/proc/{namespace}/ns/cgroup")).doing("open the agent's namespace")?;
    rustix::thread::move_into_link_name_space(
        namespace.as_fd(),
        Some(rustix::thread::LinkNameSpaceType::ControlGroup),
    )
    .doing("enter the workload's control group namespace")?;
    std::fs::write("/sys/fs/cgroup/cgroup.procs", "0").doing("enter the workload's control group")
}
