//! How one container process is made: by `libcontainer` in this process, or by an OCI runtime's program.
//!
//! The sequence, the same for both:
//!
//! 1. The supervisor mounts the root and resolves mounts, then calls [`OciRuntime::create`]: namespaces, mounts
//!    and cgroup exist, the container's process waits. It is a child of the calling process (native), or of the
//!    nearest subreaper, which `create` makes the calling process be (external): either way the caller can
//!    `waitid` for it. It is killed when the *thread* that called `create` ends: call it from the main thread.
//! 2. The supervisor connects the network through `/proc/<pid>/ns/net` and writes hosts and resolv.conf.
//! 3. [`Created::start`] lets the process go on to its command; a command that is not there (127) or cannot be
//!    executed (126) is an error of `start`, not a mute end of the process.
//! 4. When the process has ended and was reaped, [`OciRuntime::delete`] takes away what is left.

mod birth;
mod error;
mod executor;
mod external;
mod further;
mod launcher;
mod native;
mod privileges;
mod surroundings;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kiln_contract::{ExecSpec, InstanceDir, InstanceRecord, ProcessId, RuntimeChoice, TmpfsOptions};

use crate::spec::ProcessPlan;

pub(crate) use error::RuntimeError;
pub(crate) use kiln_instance::streams::Streams;

/// How errors call `libcontainer` and what is ours around it: a user need not know of the parts.
const NATIVE: &str = "Kiln";

/// Everything that is needed to make an instance's first process.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// The instance.
    pub(crate) record: &'a InstanceRecord,
    /// Its directory: bundle and runtime state are written there.
    pub(crate) dir: &'a InstanceDir,
    /// Its root, mounted in the calling process's mount namespace.
    pub(crate) root: &'a Path,
    /// What the user asked to mount, plus `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf`; in order.
    pub(crate) mounts: Vec<ResolvedMount>,
    /// Its network namespace.
    pub(crate) network: NetworkNamespace,
    /// Its standard streams.
    pub(crate) streams: Streams,
}

/// Where a container finds its network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NetworkNamespace {
    /// In a new namespace.
    New,
    /// In the caller's.
    Host,
    /// In an existing one, such as `/proc/<pid>/ns/net`.
    Join(PathBuf),
}

/// Something to mount, with a source that exists and is not to be resolved any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResolvedMount {
    /// `bind` or `tmpfs`.
    pub(crate) fstype: &'static str,
    /// A path of the host for `bind`.
    pub(crate) source: PathBuf,
    /// Absolute in the container; made if it is missing; symbolic links stay in the root.
    pub(crate) target: String,
    /// Mount options as in `fstab`.
    pub(crate) options: Vec<String>,
}

impl ResolvedMount {
    /// A file or directory of the host; `propagation` is `rprivate` unless told.
    pub(crate) fn bind(
        source: impl Into<PathBuf>,
        target: impl Into<String>,
        read_only: bool,
        propagation: Option<&str>,
    ) -> Self {
        let mut options = vec!["rbind".to_owned(), propagation.unwrap_or("rprivate").to_owned()];
        options.push(if read_only { "ro" } else { "rw" }.to_owned());
        Self { fstype: "bind", source: source.into(), target: target.into(), options }
    }

    /// Memory; `nosuid,nodev,noexec` as Docker has it, unless the options say otherwise.
    pub(crate) fn tmpfs(target: impl Into<String>, tmpfs: &TmpfsOptions, read_only: bool) -> Self {
        let mut options: Vec<String> = ["nosuid", "nodev", "noexec"].map(str::to_owned).to_vec();
        options.extend(tmpfs.size.map(|size| format!("size={}", size.bytes())));
        options.push(format!("mode={:o}", tmpfs.mode.unwrap_or(0o1777)));
        options.extend(tmpfs.options.iter().cloned());
        if read_only {
            options.push("ro".to_owned());
        }
        Self { fstype: "tmpfs", source: "tmpfs".into(), target: target.into(), options }
    }
}

/// A process that waits to be let go.
#[derive(Debug)]
pub(crate) struct Created {
    /// The process, by its number in the caller's PID namespace.
    pub(crate) process: ProcessId,
    /// The terminal's master, where one was asked for.
    pub(crate) terminal: Option<OwnedFd>,
    /// Its cgroup, relative to each hierarchy's mount point; `None` where this host or user can have none.
    pub(crate) cgroup: Option<String>,
    waiting: Waiting,
}

/// What a process waits for.
#[derive(Debug)]
enum Waiting {
    /// A byte; what goes wrong after it comes back through `report`.
    Native { go: OwnedFd, report: OwnedFd, command: String },
    /// A call of the program.
    External { program: PathBuf, dir: InstanceDir, record: Box<InstanceRecord> },
    /// Nothing any more.
    Nothing,
}

impl Waiting {
    fn native(go: OwnedFd, report: OwnedFd, plan: &ProcessPlan) -> Self {
        Self::Native { go, report, command: plan.args[0].clone() }
    }

    fn start(self) -> Result<(), RuntimeError> {
        match self {
            Self::Native { go, report, command } => {
                rustix::io::write(&go, b"g").map_err(|errno| RuntimeError::System {
                    doing: "start the container",
                    source: errno.into(),
                })?;
                launcher::read_report(report, &command, "start")
            }
            Self::External { program, dir, record } => external::start(&program, &dir, &record),
            Self::Nothing => Err(RuntimeError::Invalid("the container was started before".into())),
        }
    }
}

impl Created {
    /// Lets the process go on to its command; returns when the command runs.
    ///
    /// # Errors
    /// [`RuntimeError::CommandNotFound`] and [`RuntimeError::CommandNotExecutable`]; the process has then ended, and
    /// is still to be reaped and deleted.
    pub(crate) fn start(&mut self) -> Result<(), RuntimeError> {
        std::mem::replace(&mut self.waiting, Waiting::Nothing).start()
    }
}

/// A further process in a container, which runs.
#[derive(Debug)]
pub(crate) struct Executed {
    /// The process: a child of the caller, or adopted by it; to be waited for.
    pub(crate) process: ProcessId,
    /// The terminal's master, where one was asked for.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Makes container processes.
pub(crate) trait OciRuntime {
    /// Makes the first process of an instance; it waits.
    ///
    /// # Errors
    /// Nothing is left behind, except what [`delete`](Self::delete) takes away.
    fn create(&self, launch: Launch<'_>) -> Result<Created, RuntimeError>;

    /// Runs a further process in a running instance. To be called in the user namespace in which the instance was
    /// made; any mount namespace will do.
    fn exec(
        &self,
        record: &InstanceRecord,
        dir: &InstanceDir,
        spec: &ExecSpec,
        streams: Streams,
    ) -> Result<Executed, RuntimeError>;

    /// Whether the loopback interface of a new network namespace is up after [`create`](Self::create).
    fn brings_up_loopback(&self) -> bool;

    /// Takes away what `create` made (state, cgroup) after the first process has ended; kills what is left of
    /// the others first. Taking away what is not there is no error.
    fn delete(&self, record: &InstanceRecord, dir: &InstanceDir) -> Result<(), RuntimeError>;
}

/// The runtime that an instance asks for.
pub(crate) fn choose(choice: &RuntimeChoice) -> Result<Box<dyn OciRuntime>, RuntimeError> {
    match choice {
        RuntimeChoice::Native => Ok(Box::new(native::Native)),
        RuntimeChoice::External(program) => Ok(Box::new(external::External { program: program.clone() })),
    }
}

#[cfg(test)]
mod tests;
