//! What runs workloads: the verbs of instances.

use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    BackendError, ByteSize, Capabilities, CpuLimit, Digest, ExitStatus, InstanceId, InstanceRecord,
    InstanceSpec, PublishSpec, RestartPolicy,
};

/// The caller's ends of a workload's standard streams.
#[derive(Debug)]
pub struct Stdio {
    /// Read from, if the workload's standard input is open.
    pub stdin: OwnedFd,
    /// Written to. With a terminal, everything comes here.
    pub stdout: OwnedFd,
    /// Written to.
    pub stderr: OwnedFd,
}

/// How an instance is started.
#[derive(Debug)]
pub enum StartMode {
    /// By a supervisor of its own; returns when the workload runs.
    Detached,
    /// By this process; returns when the workload has ended, or when the user detached (a supervisor then has it).
    Foreground {
        /// Where its streams go.
        stdio: Stdio,
        /// Key sequence that detaches, in Docker's notation (`ctrl-p,ctrl-q`); empty: none.
        detach_keys: String,
        /// Pass the signals that this process gets on to the workload (where it has no terminal). Otherwise they end
        /// this process, and a supervisor has the workload.
        signal_proxy: bool,
    },
}

/// How to look into a running instance.
#[derive(Debug)]
pub struct AttachOptions {
    /// Where its streams go.
    pub stdio: Stdio,
    /// Send standard input.
    pub stdin: bool,
    /// Key sequence that detaches; empty: none.
    pub detach_keys: String,
    /// Pass the signals that this process gets on to the workload (where it has no terminal).
    pub signal_proxy: bool,
}

/// How an attachment ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachEnd {
    /// The workload ended.
    Exited(ExitStatus),
    /// The user typed the detach keys.
    Detached,
}

/// A further process in a running instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecSpec {
    /// The command and its arguments; never empty.
    pub args: Vec<String>,
    /// Set on top of the instance's environment.
    pub env: Vec<String>,
    /// The working directory; `None` is the instance's.
    pub cwd: Option<String>,
    /// `user[:group]`; `None` is the instance's.
    pub user: Option<String>,
    /// Give it a terminal.
    pub tty: bool,
    /// Keep its standard input open.
    pub stdin: bool,
    /// All capabilities.
    pub privileged: bool,
    /// Do not wait for it.
    pub detach: bool,
    /// Key sequence that detaches; empty: none.
    pub detach_keys: String,
}

/// Which of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line that a workload wrote (or a part of a line longer than 16 KiB).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// When.
    pub time: Timestamp,
    /// Where to.
    pub stream: LogStream,
    /// What, with its newline if it had one.
    pub bytes: Vec<u8>,
}

/// Which lines of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogQuery {
    /// Go on with new lines until the workload ends.
    pub follow: bool,
    /// Only from then on.
    pub since: Option<Timestamp>,
    /// Only before.
    pub until: Option<Timestamp>,
    /// Only the last so many.
    pub tail: Option<usize>,
}

/// What a workload uses.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Processor time since it started.
    pub cpu: Duration,
    /// Bytes of memory, without the page cache that can be dropped.
    pub memory: u64,
    /// The most it may use, if limited.
    pub memory_limit: Option<u64>,
    /// Processes and threads.
    pub pids: u64,
    /// The most, if limited.
    pub pids_limit: Option<u64>,
    /// Bytes received from the network.
    pub network_received: u64,
    /// Bytes sent to the network.
    pub network_sent: u64,
    /// Bytes read from block devices.
    pub block_read: u64,
    /// Bytes written to block devices.
    pub block_written: u64,
}

/// The processes of a workload, as `ps` on the host shows them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessTable {
    /// Column titles.
    pub titles: Vec<String>,
    /// A row a process.
    pub rows: Vec<Vec<String>>,
}

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// Its content or its attributes are others.
    Modified,
    /// It is gone.
    Deleted,
}

/// A path at which a workload's root differs from its image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Absolute in the root; may be any bytes.
    pub path: Vec<u8>,
    /// What happened.
    pub kind: ChangeKind,
}

/// How changes become an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommitOptions {
    /// Names for the new image.
    pub tags: Vec<String>,
    /// What it is for; goes to its history.
    pub message: String,
    /// Who made it.
    pub author: String,
    /// Dockerfile instructions that change its config: `CMD`, `ENV`, `ENTRYPOINT`, `EXPOSE`, `LABEL`,
    /// `USER`, `VOLUME`, `WORKDIR`, `STOPSIGNAL`.
    pub changes: Vec<String>,
    /// Suspend the workload meanwhile.
    pub pause: bool,
    /// The image is to have nothing but the new layer, so that it can be put over others.
    pub layer_only: bool,
    /// Patterns of the paths that the layer is to have; all if there is none.
    pub include: Vec<String>,
    /// Patterns of the paths that it is not to have.
    pub exclude: Vec<String>,
    /// Paths that it is to hide in the layers below.
    pub masks: Vec<String>,
}

/// How an instance is saved.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotOptions {
    /// The snapshot's name.
    pub name: String,
    /// Its memory too.
    pub memory: bool,
}

/// A saved state of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Its name, among those of the instance.
    pub name: String,
    /// When it was made.
    pub created: Timestamp,
    /// The size of the writable disk in bytes, as the instance saw it.
    pub disk_size: u64,
    /// Bytes of memory that are saved of it, beyond what is shared; `None` if only the disk is.
    pub memory: Option<u64>,
}

/// What of an instance is to be another from its next start on. What is `None` stays.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Update {
    /// Processors.
    pub cpus: Option<CpuLimit>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// The kernel of a machine, by name.
    pub kernel: Option<String>,
    /// What happens when it ends.
    pub restart: Option<RestartPolicy>,
}

impl Update {
    /// Makes the changes.
    pub fn apply(&self, spec: &mut InstanceSpec) {
        let resources = &mut spec.resources;
        resources.cpus = self.cpus.or(resources.cpus);
        resources.memory = self.memory.or(resources.memory);
        if let Some(kernel) = &self.kernel {
            spec.machine.kernel = Some(kernel.clone());
        }
        if let Some(restart) = self.restart {
            spec.restart = restart;
        }
    }
}

/// How an instance is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RemoveOptions {
    /// Kill it first if it runs.
    pub force: bool,
    /// Its anonymous volumes too.
    pub volumes: bool,
}

/// Something that runs workloads: containers on this kernel, or machines.
///
/// Every method takes the instance by its id and may be called by any process: no state is kept in the value.
/// All block; none prints.
pub trait RuntimeBackend: Send + Sync {
    /// What this back end can do on this host for this user.
    fn capabilities(&self) -> Capabilities;

    /// Makes an instance: its name is taken, its record is written, nothing runs yet.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Conflict`] if the name is taken; nothing is left behind by any failure.
    fn create(&self, spec: &InstanceSpec) -> Result<InstanceRecord, BackendError>;

    /// Starts it. `Some` when it ended in the foreground, `None` when it goes on.
    fn start(&self, id: &InstanceId, mode: StartMode) -> Result<Option<ExitStatus>, BackendError>;

    /// Runs a further process in it; its exit status, or `None` if detached.
    fn exec(
        &self,
        id: &InstanceId,
        spec: &ExecSpec,
        stdio: Stdio,
    ) -> Result<Option<ExitStatus>, BackendError>;

    /// Connects to the streams of its first process.
    fn attach(&self, id: &InstanceId, options: AttachOptions) -> Result<AttachEnd, BackendError>;

    /// Sends a signal (a Linux number) to its first process.
    fn signal(&self, id: &InstanceId, signal: i32) -> Result<(), BackendError>;

    /// Asks it to end and kills it after `timeout` (`None`: as its spec says). Returns when it has ended. Stopping
    /// what does not run is no error.
    fn stop(&self, id: &InstanceId, timeout: Option<Duration>) -> Result<(), BackendError>;

    /// Suspends all its processes.
    fn pause(&self, _id: &InstanceId) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this back end cannot pause instances"))
    }

    /// Lets its processes go on.
    fn resume(&self, _id: &InstanceId) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this back end cannot resume instances"))
    }

    /// Waits until it does not run.
    fn wait(&self, id: &InstanceId) -> Result<ExitStatus, BackendError>;

    /// Gives the lines of its log, in order, until there are no more or the caller breaks.
    fn logs(
        &self,
        id: &InstanceId,
        query: &LogQuery,
        each: &mut dyn FnMut(LogLine) -> ControlFlow<()>,
    ) -> Result<(), BackendError>;

    /// What it uses now.
    fn stats(&self, id: &InstanceId) -> Result<Stats, BackendError>;

    /// Its processes.
    fn top(&self, id: &InstanceId) -> Result<ProcessTable, BackendError>;

    /// Where its root differs from its image, sorted by path.
    fn changes(&self, id: &InstanceId) -> Result<Vec<Change>, BackendError>;

    /// Makes its changes a layer on top of its stack; the new image's id.
    fn commit(&self, id: &InstanceId, options: &CommitOptions) -> Result<Digest, BackendError>;

    /// Writes a tar archive of `path` in its root (as `docker cp` does: the entry is named by the last part).
    /// With `follow`, a symbolic link is what it points to.
    fn copy_out(
        &self,
        id: &InstanceId,
        path: &Path,
        follow: bool,
        archive: &mut dyn std::io::Write,
    ) -> Result<(), BackendError>;

    /// Unpacks a tar archive below the directory `path` of its root. No entry leaves the root, whatever it says.
    fn copy_in(
        &self,
        id: &InstanceId,
        path: &Path,
        archive: &mut dyn std::io::Read,
    ) -> Result<(), BackendError>;

    /// Gives it another name.
    fn rename(&self, id: &InstanceId, name: &str) -> Result<(), BackendError>;

    /// Its published ports.
    fn ports(&self, id: &InstanceId) -> Result<Vec<PublishSpec>, BackendError>;

    /// Saves it under a name that none of its snapshots has. A running one goes on.
    fn snapshot(&self, _id: &InstanceId, _options: &SnapshotOptions) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this back end has no snapshots"))
    }

    /// Its snapshots, oldest first.
    fn snapshots(&self, _id: &InstanceId) -> Result<Vec<Snapshot>, BackendError> {
        Err(BackendError::unsupported("this back end has no snapshots"))
    }

    /// Puts it back to what it was when it was saved; its snapshots stay. If its memory was saved too, its next start goes on
    /// from there. With `force` it is killed first if it runs.
    ///
    /// # Errors
    /// [`crate::ErrorKind::State`] if it runs; [`crate::ErrorKind::NotFound`] names the snapshots that there are.
    fn restore(&self, _id: &InstanceId, _snapshot: &str, _force: bool) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this back end has no snapshots"))
    }

    /// Removes one of its snapshots. Forks of it stay as they are.
    fn remove_snapshot(&self, _id: &InstanceId, _snapshot: &str) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this back end has no snapshots"))
    }

    /// Grows its writable disk to so many bytes, while it runs or not.
    fn resize(&self, _id: &InstanceId, _disk: u64) -> Result<(), BackendError> {
        Err(BackendError::unsupported("this back end has no disks"))
    }

    /// Changes what it is given from its next start on.
    ///
    /// # Errors
    /// [`crate::ErrorKind::State`] if it runs.
    fn update(&self, _id: &InstanceId, _update: &Update) -> Result<InstanceRecord, BackendError> {
        Err(BackendError::unsupported("this back end cannot change instances"))
    }

    /// Makes a new instance that begins as a copy of it.
    fn fork(&self, _id: &InstanceId, _name: &str, _memory: bool) -> Result<InstanceRecord, BackendError> {
        Err(BackendError::unsupported("this back end cannot fork instances"))
    }

    /// Removes it, with all that it left: mounts, interfaces, rules, cgroups, processes.
    fn remove(&self, id: &InstanceId, options: RemoveOptions) -> Result<(), BackendError>;

    /// All instances of this home, with their true state: those of dead supervisors are set right first.
    fn list(&self) -> Result<Vec<InstanceRecord>, BackendError>;

    /// Finds an instance by its name, its id, or a prefix of its id that fits no other.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`]; an ambiguous prefix names its candidates.
    fn find(&self, name_or_id: &str) -> Result<InstanceRecord, BackendError>;
}
