//! The verbs of containers.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_contract::{
    AttachEnd, AttachOptions, BackendError, Capabilities, Change, CommitOptions, Digest, ErrorKind, ExecSpec,
    ExitStatus, Home, InstanceId, InstanceRecord, InstanceSpec, InstanceStatus, LogLine, LogQuery,
    ProcessTable, PublishSpec, RemoveOptions, RestartPolicy, RuntimeBackend, StartMode, Stats, Stdio,
};

use crate::attach::{self, End, Manner};
use crate::cgroup::{self, Cgroup};
use crate::control::{Attach, Connection, Reply, Request};
use crate::instances::Instances;
use crate::keys::DetachKeys;
use crate::supervisor::signals;
use crate::{Volumes, commit, copy, exec, log, process, reconcile, spawn, supervisor};

/// How long a supervisor may take to listen after it has claimed its instance.
const TO_LISTEN: Duration = Duration::from_secs(10);
/// How long a supervisor may take to end what it was told to kill, before it is killed itself.
const TO_KILL: Duration = Duration::from_secs(20);

/// Containers of one home: the native [`RuntimeBackend`].
///
/// No state is kept in the value: everything is in the home, and every process may open it.
#[derive(Debug)]
pub struct Containers {
    instances: Instances,
}

impl Containers {
    /// The containers of a home. Nothing is read or made by this.
    ///
    /// # Errors
    /// None today.
    pub fn open(home: &Home) -> Result<Self, BackendError> {
        Ok(Self { instances: Instances::of(home) })
    }

    /// The record of an instance, as it truly is.
    fn truth(&self, id: &InstanceId) -> Result<InstanceRecord, BackendError> {
        let record = self.instances.read(id)?;
        reconcile::truth(&self.instances, record)?.ok_or_else(|| gone(id))
    }

    /// The record of an instance that runs.
    fn running(&self, id: &InstanceId, doing: &str) -> Result<InstanceRecord, BackendError> {
        let record = self.truth(id)?;
        if reconcile::is_supervised(&record) {
            return Ok(record);
        }
        Err(BackendError::new(
            ErrorKind::State,
            format!("cannot {doing} instance {}: it does not run ({})", record.spec.name, record.status),
        )
        .hint(format!("start it with `kiln start {}`", record.spec.name)))
    }

    /// A connection to the supervisor of an instance; `None` if it ends meanwhile.
    fn connect(&self, id: &InstanceId) -> Result<Option<Connection>, BackendError> {
        let dir = self.instances.dir(id);
        let until = Instant::now() + TO_LISTEN;
        loop {
            match Connection::open(&dir) {
                Ok(Some(connection)) => return Ok(Some(connection)),
                Ok(None) => {}
                Err(error) => {
                    return Err(BackendError::caused(
                        format!("cannot connect to the supervisor of {}", id.short()),
                        error,
                    ));
                }
            }
            match self.instances.read(id) {
                Ok(record) if reconcile::is_supervised(&record) => {}
                Ok(_) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
            if Instant::now() > until {
                return Err(BackendError::new(
                    ErrorKind::Failed,
                    format!("the supervisor of {} does not listen", id.short()),
                )
                .hint("`kiln rm --force` ends it"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks a supervisor, and waits for its answer; `None` if it ended without one.
    fn ask(&self, id: &InstanceId, request: &Request) -> Result<Option<Reply>, BackendError> {
        let Some(mut connection) = self.connect(id)? else { return Ok(None) };
        let fail =
            |error| BackendError::caused(format!("cannot talk to the supervisor of {}", id.short()), error);
        if connection.send(request).is_err() {
            return Ok(None);
        }
        match connection.reply().map_err(fail)? {
            Some(Reply::Failed(failure)) => Err(failure.into()),
            reply => Ok(reply),
        }
    }

    /// Asks for something that only a running workload can do.
    fn ask_running(&self, id: &InstanceId, doing: &str, request: &Request) -> Result<(), BackendError> {
        let record = self.running(id, doing)?;
        match self.ask(id, request)? {
            Some(_) => Ok(()),
            None => Err(BackendError::new(
                ErrorKind::State,
                format!("cannot {doing} instance {}: it has just ended", record.spec.name),
            )),
        }
    }

    /// Shows the streams of a supervisor that was told to attach.
    fn show(
        &self,
        id: &InstanceId,
        connection: Connection,
        manner: Manner,
    ) -> Result<AttachEnd, BackendError> {
        match attach::show(connection, manner)? {
            End::Exited(status) => Ok(AttachEnd::Exited(status)),
            End::Detached => Ok(AttachEnd::Detached),
            End::Lost => self.wait(id).map(AttachEnd::Exited),
        }
    }

    /// Ends an instance at once, whatever state its supervisor is in.
    fn kill(&self, record: &InstanceRecord) -> Result<(), BackendError> {
        let Some(supervisor) = record.supervisor.filter(|_| reconcile::is_supervised(record)) else {
            return Ok(());
        };
        let Some(handle) = process::open(supervisor) else { return Ok(()) };
        let asked = self.connect(&record.id).ok().flatten().is_some_and(|mut connection| {
            connection.send(&Request::Stop { timeout: Some(Duration::ZERO) }).is_ok()
                && connection.wait_until(Instant::now() + TO_KILL)
        });
        // A foreground command goes on after its container, and is not to be killed for that.
        let settled = asked
            && self.instances.read(&record.id).map_or(true, |record| record.supervisor != Some(supervisor));
        if !settled && !process::wait_for(&handle, Duration::ZERO) {
            tracing::warn!(pid = supervisor.pid, "killing a supervisor that does not do what it is told");
            process::kill_and_wait(supervisor, Duration::from_secs(10));
        }
        Ok(())
    }
}

fn gone(id: &InstanceId) -> BackendError {
    BackendError::new(ErrorKind::NotFound, format!("no such instance: {}", id.short()))
}

impl RuntimeBackend for Containers {
    fn capabilities(&self) -> Capabilities {
        cgroup::capabilities()
    }

    fn create(&self, spec: &InstanceSpec) -> Result<InstanceRecord, BackendError> {
        if spec.process.args.is_empty() {
            return Err(BackendError::new(
                ErrorKind::Invalid,
                "cannot make a container: there is no command to run",
            )
            .hint("the image names none: give one after the image"));
        }
        signals::parse(&spec.stop.signal)?;
        let volumes = Volumes::open(self.instances.home());
        let mut spec = spec.clone();
        let anonymous = volumes.claim(&mut spec)?;
        self.instances.create(&spec, anonymous.clone()).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = volumes.release(&anonymous);
        })
    }

    fn start(&self, id: &InstanceId, mode: StartMode) -> Result<Option<ExitStatus>, BackendError> {
        let record = self.truth(id)?;
        match mode {
            // As Docker has it: to start what runs is no error.
            StartMode::Detached if reconcile::is_supervised(&record) => Ok(None),
            StartMode::Detached => spawn::start(&self.instances, id, None).map(|_| None),
            StartMode::Foreground { stdio, detach_keys, signal_proxy } => {
                let keys = DetachKeys::parse(&detach_keys)?;
                let process = &record.spec.process;
                // What can be left alone, or goes on after its first end, must not end with this process.
                if !process.tty && signal_proxy && record.spec.restart == RestartPolicy::No {
                    return supervisor::foreground(&self.instances, id, stdio).map(Some);
                }
                let attach = Attach { stdin: process.stdin, closes_stdin: true, size: attach::size(&stdio) };
                let connection = spawn::start(&self.instances, id, Some(attach))?;
                let manner = Manner { stdio, stdin: process.stdin, tty: process.tty, keys, signal_proxy };
                match self.show(id, connection, manner)? {
                    AttachEnd::Exited(status) => Ok(Some(status)),
                    AttachEnd::Detached => Ok(None),
                }
            }
        }
    }

    fn exec(
        &self,
        id: &InstanceId,
        spec: &ExecSpec,
        stdio: Stdio,
    ) -> Result<Option<ExitStatus>, BackendError> {
        if spec.args.is_empty() {
            return Err(BackendError::new(ErrorKind::Invalid, "there is no command to run"));
        }
        let record = self.running(id, "run a command in")?;
        let name = &record.spec.name;
        match record.status {
            InstanceStatus::Running => exec::exec(&record, &self.instances.dir(id), spec, stdio),
            InstanceStatus::Paused => Err(BackendError::new(
                ErrorKind::State,
                format!("cannot run a command in instance {name}: it is paused"),
            )
            .hint(format!("let it go on with `kiln resume {name}`"))),
            status => Err(BackendError::new(
                ErrorKind::State,
                format!("cannot run a command in instance {name}: it is {status}"),
            )),
        }
    }

    fn attach(&self, id: &InstanceId, options: AttachOptions) -> Result<AttachEnd, BackendError> {
        let keys = DetachKeys::parse(&options.detach_keys)?;
        let record = self.running(id, "attach to")?;
        let name = &record.spec.name;
        if record.status == InstanceStatus::Paused {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("cannot attach to instance {name}: it is paused"),
            )
            .hint(format!("let it go on with `kiln resume {name}`")));
        }
        let stdin = options.stdin && record.spec.process.stdin;
        let attach = Attach { stdin, closes_stdin: false, size: attach::size(&options.stdio) };
        let ended = || {
            BackendError::new(
                ErrorKind::State,
                format!("cannot attach to instance {name}: it has just ended"),
            )
        };
        let mut connection = self.connect(id)?.ok_or_else(ended)?;
        let fail = |error| BackendError::caused(format!("cannot attach to instance {name}"), error);
        connection.send(&Request::Attach(attach)).map_err(fail)?;
        match connection.reply().map_err(fail)? {
            Some(Reply::Attached { tty }) => {
                let AttachOptions { stdio, signal_proxy, .. } = options;
                self.show(id, connection, Manner { stdio, stdin, tty, keys, signal_proxy })
            }
            Some(Reply::Failed(failure)) => Err(failure.into()),
            _ => Err(ended()),
        }
    }

    fn signal(&self, id: &InstanceId, signal: i32) -> Result<(), BackendError> {
        self.ask_running(id, "signal", &Request::Signal { signal })
    }

    fn stop(&self, id: &InstanceId, timeout: Option<Duration>) -> Result<(), BackendError> {
        if !reconcile::is_supervised(&self.truth(id)?) {
            return Ok(());
        }
        if self.ask(id, &Request::Stop { timeout })?.is_none() {
            // It ended before it could answer: perhaps it was killed, and there is something to clean up.
            match self.truth(id) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn pause(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.ask_running(id, "pause", &Request::Pause)
    }

    fn resume(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.ask_running(id, "resume", &Request::Resume)
    }

    fn wait(&self, id: &InstanceId) -> Result<ExitStatus, BackendError> {
        loop {
            let record = self.truth(id)?;
            if !reconcile::is_supervised(&record) {
                return Ok(record.exit.unwrap_or_else(|| ExitStatus {
                    code: 0,
                    out_of_memory: false,
                    at: Timestamp::now(),
                    error: None,
                }));
            }
            if let Some(Reply::Exited { status }) = self.ask(id, &Request::Wait)? {
                return Ok(status);
            }
        }
    }

    fn logs(
        &self,
        id: &InstanceId,
        query: &LogQuery,
        each: &mut dyn FnMut(LogLine) -> ControlFlow<()>,
    ) -> Result<(), BackendError> {
        let record = self.truth(id)?;
        let path = self.instances.dir(id).log();
        if record.spec.remove && record.started.is_some() && !path.exists() {
            return Err(BackendError::unsupported(format!(
                "instance {} has no log: it runs in the foreground and will be removed at its end",
                record.spec.name
            )));
        }
        let ended = || {
            let record = self.instances.read(id).ok()?;
            record.supervisor.filter(|_| reconcile::is_supervised(&record)).and_then(process::open)
        };
        log::read(&path, query, ended, each).map_err(|error| {
            BackendError::caused(format!("cannot read the log of {}", record.spec.name), error)
        })
    }

    fn stats(&self, id: &InstanceId) -> Result<Stats, BackendError> {
        let record = self.running(id, "measure")?;
        let Some(path) = &record.cgroup else {
            return Err(BackendError::unsupported(format!(
                "cannot measure instance {}: it has no control group",
                record.spec.name
            )));
        };
        let mut stats = Cgroup::at(path).stats()?;
        if let Some(process) = record.process
            && kiln_net::needs_namespace(&record.spec.network.mode)
        {
            (stats.network_received, stats.network_sent) = cgroup::network_bytes(process.pid)?;
        }
        Ok(stats)
    }

    fn top(&self, id: &InstanceId) -> Result<ProcessTable, BackendError> {
        let record = self.running(id, "list the processes of")?;
        let Some(process) = record.process else {
            return Err(BackendError::new(
                ErrorKind::State,
                format!(
                    "cannot list the processes of instance {}: it is {}",
                    record.spec.name, record.status
                ),
            ));
        };
        let cgroup = record.cgroup.as_deref().map(Cgroup::at);
        Ok(cgroup::process_table(cgroup.as_ref(), process.pid)?)
    }

    fn changes(&self, id: &InstanceId) -> Result<Vec<Change>, BackendError> {
        commit::changes(self.instances.home(), &self.truth(id)?)
    }

    fn commit(&self, id: &InstanceId, options: &CommitOptions) -> Result<Digest, BackendError> {
        let record = self.truth(id)?;
        // Where it cannot be suspended, what is committed may be from several moments.
        let suspended = options.pause
            && record.status == InstanceStatus::Running
            && self.ask(id, &Request::Pause).is_ok();
        let committed = commit::commit(self.instances.home(), &record, options);
        if suspended {
            self.ask(id, &Request::Resume)?;
        }
        committed
    }

    fn copy_out(
        &self,
        id: &InstanceId,
        path: &Path,
        follow: bool,
        archive: &mut dyn Write,
    ) -> Result<(), BackendError> {
        copy::copy_out(self.instances.home(), &self.truth(id)?, path, follow, archive)
    }

    fn copy_in(&self, id: &InstanceId, path: &Path, archive: &mut dyn Read) -> Result<(), BackendError> {
        copy::copy_in(self.instances.home(), &self.truth(id)?, path, archive)
    }

    fn rename(&self, id: &InstanceId, name: &str) -> Result<(), BackendError> {
        self.instances.rename(id, name)
    }

    fn ports(&self, id: &InstanceId) -> Result<Vec<PublishSpec>, BackendError> {
        Ok(self.truth(id)?.ports)
    }

    fn remove(&self, id: &InstanceId, options: RemoveOptions) -> Result<(), BackendError> {
        let record = self.truth(id)?;
        if reconcile::is_supervised(&record) {
            if !options.force {
                return Err(BackendError::new(
                    ErrorKind::State,
                    format!("cannot remove instance {}: it is {}", record.spec.name, record.status),
                )
                .hint("stop it first, or use --force"));
            }
            self.kill(&record)?;
        }
        // One that was to be removed at its end has been.
        let record = match self.truth(id) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            record => record?,
        };
        reconcile::clean(&self.instances, &record)?;
        reconcile::remove_files(&self.instances, &record, options.volumes)
    }

    fn list(&self) -> Result<Vec<InstanceRecord>, BackendError> {
        let mut records = Vec::new();
        for record in self.instances.all()? {
            let before = record.clone();
            match reconcile::truth(&self.instances, record) {
                Ok(record) => records.extend(record),
                Err(error) => {
                    // The others are still to be listed, and this one can still be removed.
                    tracing::warn!(
                        id = before.id.short(),
                        "cannot set right what a dead supervisor left: {error}"
                    );
                    records.push(before);
                }
            }
        }
        Ok(records)
    }

    fn find(&self, name_or_id: &str) -> Result<InstanceRecord, BackendError> {
        let record = self.instances.find(name_or_id)?;
        let id = record.id.clone();
        reconcile::truth(&self.instances, record)?.ok_or_else(|| gone(&id))
    }
}
