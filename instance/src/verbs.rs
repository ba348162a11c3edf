//! The verbs of instances that do not depend on how their workloads are isolated.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_contract::{
    AttachEnd, AttachOptions, BackendError, ErrorKind, ExitStatus, Home, InstanceId, InstanceRecord,
    InstanceStatus, LogLine, LogQuery, PublishSpec, RemoveOptions, RestartPolicy, StartMode, Update,
};

use crate::attach::{self, End, Manner};
use crate::control::{Attach, Connection, Reply, Request};
use crate::instances::{Instances, is_supervised};
use crate::keys::DetachKeys;
use crate::kind::{Kinds, kind_of};
use crate::{log, process, reconcile, spawn, supervisor, terminal};

/// How long a supervisor may take to listen after it has claimed its instance.
const TO_LISTEN: Duration = Duration::from_secs(10);
/// How long a supervisor may take to end what it was told to kill, before it is killed itself.
const TO_KILL: Duration = Duration::from_secs(20);

/// What can be done with the instances of one home, whatever kinds they are of: the part of a
/// [`RuntimeBackend`](kiln_contract::RuntimeBackend) that back ends share. Where a method says nothing else, it does what
/// that trait's method of the same name says.
///
/// No state is kept in the value: everything is in the home, and every process may open it.
#[derive(Debug)]
pub struct Verbs {
    instances: Instances,
    kinds: Kinds,
}

impl Verbs {
    /// The instances of a home, which may be of these kinds. Nothing is read or made by this.
    pub fn open(home: &Home, kinds: Kinds) -> Self {
        Self { instances: Instances::of(home), kinds }
    }

    /// Their directories, records and names.
    pub fn instances(&self) -> &Instances {
        &self.instances
    }

    /// The record of an instance, as it truly is: what a dead supervisor left is set right first.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; or what was left cannot be taken away.
    pub fn truth(&self, id: &InstanceId) -> Result<InstanceRecord, BackendError> {
        let record = self.instances.read(id)?;
        reconcile::truth(&self.instances, self.kinds, record)?.ok_or_else(|| gone(id))
    }

    /// The record of an instance whose supervisor lives: it runs, is paused, or waits to be started again.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not; `doing` is a verb for the message («measure»).
    pub fn running(&self, id: &InstanceId, doing: &str) -> Result<InstanceRecord, BackendError> {
        let record = self.truth(id)?;
        if is_supervised(&record) {
            return Ok(record);
        }
        Err(BackendError::new(
            ErrorKind::State,
            format!("cannot {doing} instance {}: it does not run ({})", record.spec.name, record.status),
        )
        .hint(format!("start it with `kiln start {}`", record.spec.name)))
    }

    /// The record of an instance in which a further command can be run now.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not run, is paused, or waits to be started again.
    pub fn ready_for_exec(&self, id: &InstanceId) -> Result<InstanceRecord, BackendError> {
        self.ready_to(id, "run a command in")
    }

    /// The record of an instance that runs now; `doing` is a verb for the message («log in to»).
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not run, is paused, or waits to be started again.
    pub fn ready_to(&self, id: &InstanceId, doing: &str) -> Result<InstanceRecord, BackendError> {
        let record = self.running(id, doing)?;
        let name = &record.spec.name;
        match record.status {
            InstanceStatus::Running => Ok(record),
            InstanceStatus::Paused => Err(BackendError::new(
                ErrorKind::State,
                format!("cannot {doing} instance {name}: it is paused"),
            )
            .hint(format!("let it go on with `kiln resume {name}`"))),
            status => Err(BackendError::new(
                ErrorKind::State,
                format!("cannot {doing} instance {name}: it is {status}"),
            )),
        }
    }

    /// A connection to the supervisor of an instance; `None` if it ends meanwhile.
    ///
    /// # Errors
    /// If it does not listen within ten seconds.
    pub fn connect(&self, id: &InstanceId) -> Result<Option<Connection>, BackendError> {
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
                Ok(record) if is_supervised(&record) => {}
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
    ///
    /// # Errors
    /// What the supervisor answers, or that it cannot be understood.
    pub fn ask(&self, id: &InstanceId, request: &Request) -> Result<Option<Reply>, BackendError> {
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
    ///
    /// # Errors
    /// What the supervisor answers; [`ErrorKind::State`] if there is none (any more). `doing` is a verb for the message.
    pub fn ask_running(&self, id: &InstanceId, doing: &str, request: &Request) -> Result<(), BackendError> {
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
        let Some(supervisor) = record.supervisor.filter(|_| is_supervised(record)) else {
            return Ok(());
        };
        let Some(handle) = process::open(supervisor) else { return Ok(()) };
        let asked = self.connect(&record.id).ok().flatten().is_some_and(|mut connection| {
            connection.send(&Request::Stop { timeout: Some(Duration::ZERO), discard: true }).is_ok()
                && connection.wait_until(Instant::now() + TO_KILL)
        });
        // A foreground command goes on after its workload, and is not to be killed for that.
        let settled = asked
            && self.instances.read(&record.id).map_or(true, |record| record.supervisor != Some(supervisor));
        if !settled && !process::wait_for(&handle, Duration::ZERO) {
            tracing::warn!(pid = supervisor.pid, "killing a supervisor that does not do what it is told");
            process::kill_and_wait(supervisor, Duration::from_secs(10));
        }
        Ok(())
    }

    /// Starts an instance. `Some` when it ended in the foreground, `None` when it goes on.
    ///
    /// # Errors
    /// If it cannot be started; it is then as it was before.
    pub fn start(&self, id: &InstanceId, mode: StartMode) -> Result<Option<ExitStatus>, BackendError> {
        let record = self.truth(id)?;
        match mode {
            // As Docker has it: to start what runs is no error. It may not run yet, or be about to end.
            StartMode::Detached if is_supervised(&record) && self.comes_to_run(id)? => Ok(None),
            StartMode::Detached => match spawn::start(&self.instances, id, None) {
                // Somebody else was faster: then it is their start that is waited for.
                Err(error) if error.kind() == ErrorKind::State => {
                    if self.comes_to_run(id)? {
                        Ok(None)
                    } else {
                        Err(error)
                    }
                }
                started => started.map(|_| None),
            },
            StartMode::Foreground { stdio, detach_keys, signal_proxy } => {
                let keys = DetachKeys::parse(&detach_keys)?;
                let process = &record.spec.process;
                // What can be left alone, or goes on after its first end, must not end with this process.
                if !process.tty && signal_proxy && record.spec.restart == RestartPolicy::No {
                    return supervisor::foreground(&self.instances, self.kinds, id, stdio).map(Some);
                }
                let attach =
                    Attach { stdin: process.stdin, closes_stdin: true, size: terminal::size_of(&stdio) };
                let connection = spawn::start(&self.instances, id, Some(attach))?;
                let manner = Manner { stdio, stdin: process.stdin, tty: process.tty, keys, signal_proxy };
                match self.show(id, connection, manner)? {
                    AttachEnd::Exited(status) => Ok(Some(status)),
                    AttachEnd::Detached => Ok(None),
                }
            }
        }
    }

    /// Waits until a start that somebody else has begun has come to something; `false` if nobody owns the instance any more.
    fn comes_to_run(&self, id: &InstanceId) -> Result<bool, BackendError> {
        loop {
            let record = self.truth(id)?;
            if !is_supervised(&record) {
                return Ok(false);
            }
            if matches!(
                record.status,
                InstanceStatus::Running | InstanceStatus::Paused | InstanceStatus::Restarting
            ) {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Connects to the streams of an instance's workload.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not run or is paused.
    pub fn attach(&self, id: &InstanceId, options: AttachOptions) -> Result<AttachEnd, BackendError> {
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
        let attach = Attach { stdin, closes_stdin: false, size: terminal::size_of(&options.stdio) };
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

    /// Sends a signal (a Linux number) to an instance's workload.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not run; [`ErrorKind::Invalid`] if there is no such signal.
    pub fn signal(&self, id: &InstanceId, signal: i32) -> Result<(), BackendError> {
        self.ask_running(id, "signal", &Request::Signal { signal })
    }

    /// Asks an instance to end, and has it killed after `timeout`, or after what its specification says. Stopping what
    /// does not run is no error.
    ///
    /// # Errors
    /// If its supervisor cannot be asked.
    pub fn stop(&self, id: &InstanceId, timeout: Option<Duration>) -> Result<(), BackendError> {
        if !is_supervised(&self.truth(id)?) {
            return Ok(());
        }
        if self.ask(id, &Request::Stop { timeout, discard: false })?.is_none() {
            // It ended before it could answer: perhaps it was killed, and there is something to clean up.
            match self.truth(id) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Suspends all processes of an instance.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not run, [`ErrorKind::Unsupported`] where there is no means for it.
    pub fn pause(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.ask_running(id, "pause", &Request::Pause)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it is not paused.
    pub fn resume(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.ask_running(id, "resume", &Request::Resume)
    }

    /// Waits until an instance does not run.
    ///
    /// # Errors
    /// If its supervisor cannot be asked.
    pub fn wait(&self, id: &InstanceId) -> Result<ExitStatus, BackendError> {
        loop {
            let record = self.truth(id)?;
            if !is_supervised(&record) {
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

    /// Gives the lines of an instance's log, in order, until there are no more or the caller breaks.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it keeps none.
    pub fn logs(
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
            record.supervisor.filter(|_| is_supervised(&record)).and_then(process::open)
        };
        log::read(&path, query, ended, each).map_err(|error| {
            BackendError::caused(format!("cannot read the log of {}", record.spec.name), error)
        })
    }

    /// Changes what an instance is given from its next start on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it runs.
    pub fn update(&self, id: &InstanceId, update: &Update) -> Result<InstanceRecord, BackendError> {
        self.truth(id)?;
        self.instances.update(id, |record| {
            if is_supervised(record) {
                return Err(BackendError::new(
                    ErrorKind::State,
                    format!("cannot change instance {}: it is {}", record.spec.name, record.status),
                )
                .hint(format!("stop it first: `kiln stop {}`", record.spec.name)));
            }
            update.apply(&mut record.spec);
            Ok(())
        })
    }

    /// Gives an instance another name.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if it is taken, [`ErrorKind::Invalid`] if it can be none.
    pub fn rename(&self, id: &InstanceId, name: &str) -> Result<(), BackendError> {
        self.instances.rename(id, name)
    }

    /// The published ports of an instance.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn ports(&self, id: &InstanceId) -> Result<Vec<PublishSpec>, BackendError> {
        Ok(self.truth(id)?.ports)
    }

    /// Removes an instance, with all that it left.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it runs and `force` was not given; or something of it cannot be taken away.
    pub fn remove(&self, id: &InstanceId, options: RemoveOptions) -> Result<(), BackendError> {
        let record = self.truth(id)?;
        if is_supervised(&record) {
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
        let kind = kind_of(self.kinds, &record)?;
        reconcile::clean(&self.instances, kind, &record)?;
        reconcile::remove_files(&self.instances, kind, &record, options.volumes)
    }

    /// All instances of the home, oldest first, with their true state.
    ///
    /// # Errors
    /// If the directory of instances cannot be read.
    pub fn list(&self) -> Result<Vec<InstanceRecord>, BackendError> {
        let mut records = Vec::new();
        for record in self.instances.all()? {
            let before = record.clone();
            match reconcile::truth(&self.instances, self.kinds, record) {
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

    /// Finds an instance by its name, its id, or a prefix of its id that fits no other.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; an ambiguous prefix is [`ErrorKind::Conflict`] and names its candidates.
    pub fn find(&self, name_or_id: &str) -> Result<InstanceRecord, BackendError> {
        let record = self.instances.find(name_or_id)?;
        let id = record.id.clone();
        reconcile::truth(&self.instances, self.kinds, record)?.ok_or_else(|| gone(&id))
    }
}

fn gone(id: &InstanceId) -> BackendError {
    BackendError::new(ErrorKind::NotFound, format!("no such instance: {}", id.short()))
}
