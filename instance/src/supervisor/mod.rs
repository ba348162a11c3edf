//! The one process that owns a running instance.
//!
//! How a supervisor lives:
//!
//! 1. It *claims* the instance: under the record's lock it writes itself into it, unless another one lives there.
//! 2. It enters the ground on which such workloads are made ([`crate::kind`]), listens on `ctl.sock`, and *launches* the
//!    workload.
//! 3. It waits, in one thread, for whatever comes first: signals (its own, to be passed on; of children that ended),
//!    output of the workload (to the log and to everybody attached), input of those attached, requests on the socket,
//!    and times (a check of health, the end of a grace period, a restart).
//! 4. When the workload's first process has ended, what is left of the run is taken away; by the restart policy the
//!    next run is launched from 2, or the supervisor *concludes*: root unmounted, record written (or the instance
//!    removed), those who wait told.
//!
//! The same code runs in two processes: `kiln supervise`, which a command starts for what goes on after it or has a
//! terminal, and the command itself, for what runs in its foreground.

mod clients;
mod event_loop;
mod health;
mod memory;
mod requests;
mod restart;

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_contract::{
    BackendError, ErrorKind, ExitStatus, Home, InstanceId, InstanceRecord, InstanceStatus, Stdio,
};

use crate::control::{self, Connection, Failure, Reply, Request};
use crate::instances::{Instances, failed, is_supervised};
use crate::kind::{Ground, Kind, Kinds, Run, kind_of};
use crate::log::LogWriter;
use crate::signals::Signals;
use crate::streams::{self, Wiring};
use crate::{process, reconcile};

use clients::{Client, Console, Role};
use health::Health;
use restart::Restarts;

/// The supervisor of one instance.
struct Supervisor {
    instances: Instances,
    record: InstanceRecord,
    kind: &'static dyn Kind,
    ground: Box<dyn Ground>,
    signals: Signals,
    listener: Option<OwnedFd>,
    clients: Vec<Client>,
    console: Option<Console>,
    /// Signals that this process gets are meant for the workload.
    proxies_signals: bool,
    log: Option<LogWriter>,
    run: Option<Run>,
    /// Of the run's first process, once it was reaped.
    ended: Option<u8>,
    /// The signal for which it was killed, since it would have died of it.
    dies_of: Option<u8>,
    health: Option<Health>,
    restarts: Restarts,
    restart_at: Option<Instant>,
    kill_at: Option<Instant>,
    /// The next kill is one at once: the workload was asked to end, or nothing of it is needed.
    ending: bool,
    paused: bool,
    stopped_by_user: bool,
    /// It waited to be started again, and is not to be any more.
    given_up: bool,
}

/// Owns an instance until its workload has ended for good: what `kiln supervise <id> <ready>` does.
///
/// `ready` is the number of an inherited socket, over which the command that started this process asks to start the
/// workload, and is told whether it runs. It may stay attached over it. `kinds` are those that the instance may be of.
///
/// # Errors
/// Only if that socket is none. Every other failure is told over it, and is in the instance's record.
pub fn supervise(home: &Home, id: &InstanceId, ready: i32, kinds: Kinds) -> Result<(), BackendError> {
    let protocol = |error| BackendError::caused(format!("cannot read what {ready} says"), error);
    if ready < 3 {
        return Err(BackendError::new(ErrorKind::Invalid, format!("{ready} is no inherited socket")));
    }
    // SAFETY: by this command's contract the number is a descriptor that was inherited for this very use; nothing
    // else in this process knows of it.
    let socket = unsafe { OwnedFd::from_raw_fd(ready) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(|error| protocol(error.into()))?;
    let mut connection = Connection::over(socket);
    let attach = match connection.receive().map_err(protocol)? {
        Some((control::Kind::Message, payload)) => match control::parse(&payload) {
            Ok(Request::Start { attach }) => attach,
            Ok(_) => return Err(BackendError::new(ErrorKind::Invalid, "not asked to start anything")),
            Err(error) => return Err(protocol(std::io::Error::other(error))),
        },
        _ => return Err(BackendError::new(ErrorKind::Invalid, "not asked to start anything")),
    };
    let socket = connection.into_socket();
    streams::set_nonblocking(&socket).map_err(protocol)?;
    let mut client = Client::new(socket);
    let instances = Instances::of(home);
    let mut supervisor = match Supervisor::claim(&instances, kinds, id) {
        Ok(supervisor) => supervisor,
        Err(error) => {
            client.dismiss(&Reply::Failed(Failure::from(&error)));
            return Ok(());
        }
    };
    let size = attach.as_ref().and_then(|attach| attach.size);
    if let Err(error) = supervisor.begin(Wiring::Pumped { size }) {
        client.dismiss(&Reply::Failed(Failure::from(&error)));
        return Ok(());
    }
    match attach {
        Some(attach) => {
            client.tell(&Reply::Attached { tty: supervisor.record.spec.process.tty });
            client.role = Role::Attached(attach);
            supervisor.clients.push(client);
        }
        None => client.dismiss(&Reply::Done),
    }
    memory::give_back();
    supervisor.supervise();
    Ok(())
}

/// Starts an instance and owns it in this process until its workload has ended. The process stays where its workload was
/// made (another mount namespace), and its working directory is `/`. Its workload has no terminal.
pub(crate) fn foreground(
    instances: &Instances,
    kinds: Kinds,
    id: &InstanceId,
    stdio: Stdio,
) -> Result<ExitStatus, BackendError> {
    // The caller's directory may have been removed, and is not to be kept from being unmounted.
    std::env::set_current_dir("/").map_err(|error| BackendError::caused("cannot go to /", error))?;
    let mut supervisor = Supervisor::claim(instances, kinds, id)?;
    supervisor.proxies_signals = true;
    let spec = &supervisor.record.spec;
    // Nobody will read the log of what is removed at its end: then nothing need pass through this process.
    let wiring = if spec.remove {
        Wiring::Direct { stdin: stdio.stdin, stdout: stdio.stdout, stderr: stdio.stderr }
    } else {
        supervisor.console = Some(Console::new(stdio, spec.process.stdin));
        Wiring::Pumped { size: None }
    };
    supervisor.begin(wiring)?;
    Ok(supervisor.supervise())
}

impl Supervisor {
    /// Becomes the supervisor of an instance that has none.
    fn claim(instances: &Instances, kinds: Kinds, id: &InstanceId) -> Result<Self, BackendError> {
        // From here on signals wait until there is a workload to pass them on to.
        let signals =
            Signals::take().map_err(|error| BackendError::caused("cannot take signals as events", error))?;
        let kind = kind_of(kinds, &instances.read(id)?)?;
        let mut before = None;
        let mut record = instances.update(id, |record| {
            if is_supervised(record) {
                return Err(BackendError::new(
                    ErrorKind::State,
                    format!("instance {} ({}) runs already", record.spec.name, record.id.short()),
                ));
            }
            before = Some((record.status, record.started));
            record.supervisor = Some(process::this());
            record.maker = None;
            record.boot = Some(process::boot_id().to_owned());
            // Where it will be, so that it is found even if this process is killed while it makes it.
            record.cgroup = kind.planned_cgroup(id);
            record.stopped_by_user = false;
            record.restarts = 0;
            Ok(())
        })?;
        let ground = kind.enter(instances, &record).inspect_err(|error| {
            let _ = instances.update(id, |record| {
                reconcile::forget_run(record);
                record.exit = Some(status_of_failure(error));
                Ok(())
            });
        })?;
        if let Some((status, started)) = before {
            // What the record goes back to if the very first launch fails.
            (record.status, record.started) = (status, started);
        }
        Ok(Self {
            instances: instances.clone(),
            kind,
            ground,
            signals,
            listener: None,
            clients: Vec::new(),
            console: None,
            proxies_signals: false,
            log: None,
            run: None,
            ended: None,
            dies_of: None,
            health: None,
            restarts: Restarts::new(record.spec.restart),
            restart_at: None,
            kill_at: None,
            ending: false,
            paused: false,
            stopped_by_user: false,
            given_up: false,
            record,
        })
    }

    /// The first launch. If it fails, the instance is as it was before, or removed if it was to be.
    fn begin(&mut self, wiring: Wiring) -> Result<(), BackendError> {
        let before = (self.record.status, self.record.started);
        let begun = self.try_begin(wiring);
        if let Err(error) = &begun {
            (self.record.status, self.record.started) = before;
            self.record.exit = Some(status_of_failure(error));
            self.conclude();
        }
        begun
    }

    fn try_begin(&mut self, wiring: Wiring) -> Result<(), BackendError> {
        let id = self.record.id.clone();
        let dir = self.instances.dir(&id);
        // Whatever outlives its parent in the workload becomes a child of this process, and is reaped by it.
        crate::process::adopt_orphans()
            .map_err(|error| BackendError::caused("cannot become a reaper of processes", error))?;
        let listener =
            control::listen_at(&dir).map_err(|error| failed("listen on", &dir.control(), error))?;
        self.listener = Some(listener);
        if matches!(wiring, Wiring::Pumped { .. }) {
            self.log = Some(LogWriter::open(&dir.log()).map_err(|error| failed("open", &dir.log(), error))?);
        }
        self.launch(wiring)
    }

    fn launch(&mut self, wiring: Wiring) -> Result<(), BackendError> {
        let run = self.ground.launch(&mut self.record, wiring)?;
        self.health = self.record.spec.health.as_ref().and_then(|check| Health::new(check, run.since));
        self.run = Some(run);
        self.ended = None;
        self.kill_at = None;
        self.ending = false;
        self.paused = false;
        Ok(())
    }

    /// Waits for events until the workload has ended for good; how.
    fn supervise(mut self) -> ExitStatus {
        let status = loop {
            if let Err(error) = self.handle_events() {
                // Not to be able to wait is not to be able to supervise: nothing must be left running.
                tracing::error!("cannot wait for events: {error}");
                self.ending = true;
                self.kill();
            }
            if let Some(status) = self.turn() {
                break status;
            }
        };
        self.record.status = InstanceStatus::Exited;
        self.record.exit = Some(status.clone());
        self.conclude();
        self.take_leave(&status);
        status
    }

    /// Does what is due. `Some` when the workload has ended for good.
    fn turn(&mut self) -> Option<ExitStatus> {
        let now = Instant::now();
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill_at = None;
            self.kill();
        }
        self.look_after_health(now);
        if let Some(code) = self.ended.take() {
            return self.run_has_ended(code);
        }
        if self.given_up {
            return Some(self.record.exit.clone().unwrap_or_else(|| ExitStatus {
                code: 0,
                out_of_memory: false,
                at: Timestamp::now(),
                error: None,
            }));
        }
        if self.restart_at.is_some_and(|at| at <= now) {
            self.restart_at = None;
            return self.restart();
        }
        None
    }

    fn run_has_ended(&mut self, code: u8) -> Option<ExitStatus> {
        let mut run = self.run.take()?;
        self.drain(&mut run);
        let ran = run.since.elapsed();
        let out_of_memory = run.hold.as_ref().is_some_and(|hold| hold.out_of_memory());
        let error = run.hold.as_ref().and_then(|hold| hold.why_it_ended());
        let status = ExitStatus { code, out_of_memory, at: Timestamp::now(), error };
        if let Err(error) = self.ground.end(&self.record, run) {
            tracing::warn!("cannot clean up after the workload: {error}");
        }
        self.health = None;
        self.kill_at = None;
        self.after(status, ran)
    }

    /// Restarts the workload or not, after it ended with `status` having run for `ran`.
    fn after(&mut self, status: ExitStatus, ran: Duration) -> Option<ExitStatus> {
        let Some(delay) = self.restarts.after(status.code, ran, self.stopped_by_user) else {
            return Some(status);
        };
        self.restart_at = Some(Instant::now() + delay);
        self.update(|record| {
            record.status = InstanceStatus::Restarting;
            record.exit = Some(status.clone());
            record.process = None;
            record.addresses.clear();
            record.ports.clear();
        });
        // An attachment is to one run.
        for client in &mut self.clients {
            if matches!(client.role, Role::Attached(_)) {
                client.dismiss(&Reply::Exited { status: status.clone() });
            }
        }
        None
    }

    fn restart(&mut self) -> Option<ExitStatus> {
        self.update(|record| record.restarts = record.restarts.saturating_add(1));
        match self.launch(Wiring::Pumped { size: None }) {
            Ok(()) => {
                memory::give_back();
                None
            }
            Err(error) => self.after(status_of_failure(&error), Duration::ZERO),
        }
    }

    /// Changes the record on disk, and what is known of it here.
    fn update(&mut self, change: impl FnOnce(&mut InstanceRecord)) {
        let updated = self.instances.update(&self.record.id, |record| {
            change(record);
            Ok(())
        });
        match updated {
            Ok(record) => self.record = record,
            // The workload goes on even where its record cannot be written (disk full).
            Err(error) => tracing::error!("cannot write the instance's record: {error}"),
        }
    }

    /// Gives the instance up: root unmounted, nobody listens any more, the record says how it ended.
    fn conclude(&mut self) {
        if let Some(log) = &mut self.log
            && let Err(error) = log.finish()
        {
            tracing::warn!("cannot finish the log: {error}");
        }
        if let Err(error) = self.ground.unmount() {
            tracing::warn!("{error}");
        }
        self.listener = None;
        let last = self.record.clone();
        let concluded = if last.spec.remove {
            reconcile::remove_files(&self.instances, self.kind, &last, true)
        } else {
            let _ = std::fs::remove_file(self.instances.dir(&last.id).control());
            self.instances
                .update(&last.id, |record| {
                    record.status = last.status;
                    record.started = last.started;
                    record.exit = last.exit.clone();
                    reconcile::forget_run(record);
                    Ok(())
                })
                .map(drop)
        };
        if let Err(error) = concluded {
            tracing::error!("cannot give the instance up: {error}");
        }
    }
}

/// How an instance that could not be started has «ended».
pub(crate) fn status_of_failure(error: &BackendError) -> ExitStatus {
    let code = match error.kind() {
        ErrorKind::CommandNotFound => 127,
        ErrorKind::CommandNotExecutable => 126,
        _ => 125,
    };
    ExitStatus { code, out_of_memory: false, at: Timestamp::now(), error: Some(error.to_string()) }
}
