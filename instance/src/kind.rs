//! What about an instance depends on how its workload is isolated.
//!
//! The sequence, as a supervisor goes through it:
//!
//! 1. It claims the instance; the record says [`Kind::planned_cgroup`], so that it is found whatever happens next.
//! 2. [`Kind::enter`], once: the process moves to where such workloads are made, its [`Ground`].
//! 3. [`Ground::launch`], once a run. The workload is *one child process* of the supervisor, whose exit code is the
//!    workload's: the first process of a container, or the monitor of a machine. The supervisor reaps it, sends it
//!    signals, and copies what comes out of its pipes or its terminal.
//! 4. [`Ground::end`] after that child was reaped; then perhaps 3 again.
//! 5. [`Ground::unmount`], before the instance is given up or its files are removed.
//!
//! If the supervisor is killed in between, the next command that looks at the instance calls [`Kind::clean`].

use std::fmt;
use std::time::{Duration, Instant};

use kiln_contract::{BackendError, ExecSpec, InstanceId, InstanceRecord, Isolation, ProcessId};

use crate::instances::Instances;
use crate::streams::{Ends, Streams, Wiring};

/// One way to isolate a workload. Has no state: everything is in the home.
pub trait Kind: fmt::Debug + Send + Sync {
    /// Which instances are of this kind, by their specification.
    fn isolation(&self) -> Isolation;

    /// Moves the calling process, which has claimed `record` and has one thread, to where its workload can be made.
    ///
    /// # Errors
    /// If this host or this user cannot have such workloads. The instance is given up then.
    fn enter(&self, instances: &Instances, record: &InstanceRecord) -> Result<Box<dyn Ground>, BackendError>;

    /// Takes away what a supervisor that is dead has left outside of the instance's directory: what the record names
    /// and what is found by the instance's id. The record's process does not run any more. What is not there is no
    /// error; nor need the record be of a run in this boot of the host
    /// ([`is_of_this_boot`](crate::is_of_this_boot)).
    ///
    /// # Errors
    /// If something is left that the user should know of; the instance then stays as it is.
    fn clean(&self, instances: &Instances, record: &InstanceRecord) -> Result<(), BackendError>;

    /// The control group in which [`Ground::launch`] will put the workload of `id`; `None` where it has none of its own.
    fn planned_cgroup(&self, _id: &InstanceId) -> Option<String> {
        None
    }

    /// Removes the anonymous volumes that an instance of this kind owned. Its record is gone already.
    ///
    /// # Errors
    /// If files of them cannot be removed.
    fn release_volumes(&self, instances: &Instances, volumes: &[String]) -> Result<(), BackendError>;
}

/// The kinds that a program knows. A program that lists instances should know all kinds that may be in its home.
pub type Kinds = &'static [&'static dyn Kind];

/// The kind of an instance among those that are known.
///
/// # Errors
/// [`ErrorKind::Unsupported`](kiln_contract::ErrorKind::Unsupported) if it is none of them.
pub fn kind_of(kinds: Kinds, record: &InstanceRecord) -> Result<&'static dyn Kind, BackendError> {
    let isolation = record.spec.isolation;
    kinds.iter().copied().find(|kind| kind.isolation() == isolation).ok_or_else(|| {
        let what = match isolation {
            Isolation::Container => "containers",
            Isolation::Machine => "machines",
        };
        BackendError::unsupported(format!(
            "cannot do this with instance {}: this program does not run {what}",
            record.spec.name
        ))
    })
}

/// Where the workload of one instance is made, run after run: a value of its supervisor.
pub trait Ground {
    /// Makes the workload and lets it go. Writes what is known of the run (process, addresses, ports,
    /// [`Running`](kiln_contract::InstanceStatus::Running)) to the instance's record *before* the workload's command
    /// runs, and leaves the new record in `record`.
    ///
    /// To be called from the process's main thread: a workload may be killed when the thread that made it ends.
    ///
    /// # Errors
    /// [`CommandNotFound`](kiln_contract::ErrorKind::CommandNotFound) and
    /// [`CommandNotExecutable`](kiln_contract::ErrorKind::CommandNotExecutable) become exit codes 127 and 126, all else
    /// 125. Nothing is left of the run then.
    fn launch(&mut self, record: &mut InstanceRecord, wiring: Wiring) -> Result<Run, BackendError>;

    /// Takes away what a run had, after its process was reaped.
    ///
    /// # Errors
    /// If something is left. The supervisor reports it and goes on.
    fn end(&mut self, record: &InstanceRecord, run: Run) -> Result<(), BackendError>;

    /// Starts a further process in the workload, such as a check of its health: a child of the calling process, whose
    /// exit code is that process's.
    ///
    /// # Errors
    /// If it cannot be started; nothing is left of it then.
    fn exec(
        &self,
        record: &InstanceRecord,
        spec: &ExecSpec,
        streams: Streams,
    ) -> Result<ProcessId, BackendError>;

    /// Takes the root away, between two runs. Nothing mounted is no error.
    ///
    /// # Errors
    /// If it stays mounted.
    fn unmount(&mut self) -> Result<(), BackendError>;
}

/// A workload that runs.
#[derive(Debug)]
pub struct Run {
    /// Its process: a child of the supervisor, whose exit code is the workload's.
    pub process: ProcessId,
    /// The supervisor's ends of its streams.
    pub ends: Ends,
    /// When it was let go.
    pub since: Instant,
    /// All of it at once; `None` where this host or user has no means for that. It can still be killed by its process.
    pub hold: Option<Box<dyn Hold>>,
}

/// All processes of a workload that runs, taken as one.
pub trait Hold: fmt::Debug {
    /// Suspends them; returns when they are.
    ///
    /// # Errors
    /// If they cannot be, or not soon enough.
    fn freeze(&self) -> Result<(), BackendError>;

    /// Lets them go on.
    ///
    /// # Errors
    /// If they cannot be.
    fn thaw(&self) -> Result<(), BackendError>;

    /// Asks whoever runs them to end them by what is better than a signal, and returns at once: how long that may take before
    /// they are killed all the same, or `None` if there is nobody to ask. What a workload has written survives the death of its
    /// processes; that of a machine's kernel it survives only if that has written it to its disk.
    fn end(&self) -> Option<Duration> {
        None
    }

    /// Kills them, suspended or not. No error if there are none. The run's own process was sent SIGKILL before.
    ///
    /// # Errors
    /// If one is left.
    fn kill(&self) -> Result<(), BackendError>;

    /// Why the run has ended, if not by itself. Asked as [`out_of_memory`](Self::out_of_memory) is.
    fn why_it_ended(&self) -> Option<String> {
        None
    }

    /// Whether one of them was killed for want of memory. Asked after the run's process was reaped, before
    /// [`Ground::end`].
    fn out_of_memory(&self) -> bool;
}
