//! Machines as a [`Kind`] of instance: what a supervisor does to run one.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_contract::{
    BackendError, DiskId, ErrorKind, ExecSpec, HealthState, HealthStatus, InstanceId, InstanceRecord,
    InstanceStatus, Isolation, ProcessId,
};
use kiln_instance::streams::{Ends, Streams, Wiring};
use kiln_instance::{Ground, Hold, Instances, Kind, Run, Volumes, process, terminal};
use kiln_net::MachineNetwork;
use rustix::io::FdFlags;

use crate::beginning::disks;
use crate::door::{self, Ask};
use crate::monitor::{GO, News};
use crate::{plan, stream};

/// How long a monitor may take to hear that its machine is to end.
const TO_ANSWER: Duration = Duration::from_secs(2);
/// How long a machine may take to write everything to its disk before it is killed.
const TO_END: Duration = Duration::from_secs(15);

/// MicroVMs.
#[derive(Debug)]
pub struct MachineKind;

impl Kind for MachineKind {
    fn isolation(&self) -> Isolation {
        Isolation::Machine
    }

    fn enter(&self, instances: &Instances, record: &InstanceRecord) -> Result<Box<dyn Ground>, BackendError> {
        Ok(Box::new(MachineGround { instances: instances.clone(), id: record.id.clone() }))
    }

    fn clean(&self, instances: &Instances, record: &InstanceRecord) -> Result<(), BackendError> {
        // Monitor and hypervisor ended with the supervisor.
        let dir = instances.dir(&record.id);
        door::close(&dir);
        crate::saved::remove(&plan::base(&dir))?;
        leave(instances, record)?;
        if record.spec.remove { disks(instances.home())?.remove(&DiskId::from(&record.id)) } else { Ok(()) }
    }

    fn release_volumes(&self, instances: &Instances, volumes: &[String]) -> Result<(), BackendError> {
        Volumes::open(instances.home()).release(volumes)
    }
}

/// Gives up its place on the network. Its monitor is gone.
fn leave(instances: &Instances, record: &InstanceRecord) -> Result<(), BackendError> {
    match plan::network_of(&record.spec) {
        Some(_) => MachineNetwork::leave(instances.home(), &record.id),
        None => Ok(()),
    }
}

/// Where one machine runs.
struct MachineGround {
    instances: Instances,
    id: InstanceId,
}

impl Ground for MachineGround {
    fn launch(&mut self, record: &mut InstanceRecord, wiring: Wiring) -> Result<Run, BackendError> {
        let (streams, mut ends) = wiring
            .connect(&record.spec.process)
            .map_err(|error| BackendError::caused("cannot make the machine's streams", error))?;
        let (process, mut monitor) = self.spawn(streams, &mut ends)?;
        let run = Run { process, ends, since: Instant::now(), hold: None };
        let begun = self.begin(record, process, &mut monitor);
        if let Err(error) = begun {
            process::kill_and_wait(process, Duration::from_secs(10));
            process::reap(process.pid);
            leave(&self.instances, record)?;
            return Err(error);
        }
        let door = Door {
            instances: self.instances.clone(),
            id: self.id.clone(),
            keeps_disk: !record.spec.remove,
            monitor: Mutex::new(monitor),
        };
        Ok(Run { since: Instant::now(), hold: Some(Box::new(door)), ..run })
    }

    fn end(&mut self, record: &InstanceRecord, _: Run) -> Result<(), BackendError> {
        let dir = self.instances.dir(&self.id);
        door::close(&dir);
        leave(&self.instances, record)?;
        crate::saved::remove(&plan::base(&dir))
    }

    fn exec(&self, _: &InstanceRecord, spec: &ExecSpec, streams: Streams) -> Result<ProcessId, BackendError> {
        crate::exec::spawn(&self.instances, &self.id, spec, streams)
    }

    fn unmount(&mut self) -> Result<(), BackendError> {
        let record = self.instances.read(&self.id)?;
        if record.spec.remove {
            disks(self.instances.home())?.discard(&DiskId::from(&self.id))
        } else {
            Ok(())
        }
    }
}

impl MachineGround {
    /// Starts the monitor, with the workload's streams as its own.
    fn spawn(
        &self,
        streams: Streams,
        ends: &mut Ends,
    ) -> Result<(ProcessId, BufReader<UnixStream>), BackendError> {
        let fail = |error: std::io::Error| BackendError::caused("cannot start the machine's monitor", error);
        let (ours, theirs) = UnixStream::pair().map_err(fail)?;
        let theirs = OwnedFd::from(theirs);
        let mut command = Command::new(process::program().map_err(fail)?);
        command
            .arg("monitor")
            .arg(self.id.as_str())
            .arg(theirs.as_raw_fd().to_string())
            .env("KILN_HOME", self.instances.home().path())
            .current_dir("/");
        let is_terminal = match streams {
            Streams::Pipes { stdin, stdout, stderr } => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
                false
            }
            Streams::Terminal { size } => {
                let (master, near) = terminal::carrying_pair(size).map_err(fail)?;
                let copy = || near.try_clone().map(Stdio::from).map_err(fail);
                command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
                ends.terminal = Some(master);
                true
            }
        };
        let parent = rustix::process::getpid();
        // SAFETY: system calls only, between fork and exec, on a descriptor that outlives them.
        unsafe {
            command.pre_exec(move || {
                process::end_with(parent)?;
                rustix::process::setsid()?;
                if is_terminal {
                    rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                }
                rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
                Ok(())
            });
        }
        let child = command.spawn().map_err(fail)?;
        let id = process::identify(child.id()).ok_or_else(|| {
            BackendError::new(ErrorKind::Failed, "the machine's monitor ended before it began")
        })?;
        Ok((id, BufReader::new(ours)))
    }

    /// Waits for the machine, writes the record, has the workload started.
    fn begin(
        &self,
        record: &mut InstanceRecord,
        process: ProcessId,
        monitor: &mut BufReader<UnixStream>,
    ) -> Result<(), BackendError> {
        let (published, addresses) = match news(monitor)? {
            News::Failed(failure) => return Err(failure.into()),
            News::Ready { ports, addresses } => (ports, addresses),
            News::Started => (Vec::new(), Vec::new()),
        };
        let health = record.spec.health.as_ref().map(|_| HealthStatus {
            state: HealthState::Starting,
            failing: 0,
            last_output: String::new(),
        });
        *record = self.instances.update(&self.id, |record| {
            record.status = InstanceStatus::Running;
            record.started = Some(Timestamp::now());
            record.exit = None;
            record.process = Some(process);
            record.ports = published;
            record.addresses = addresses;
            record.health = health;
            Ok(())
        })?;
        monitor
            .get_mut()
            .write_all(GO.as_bytes())
            .map_err(|error| BackendError::caused("cannot talk to the machine's monitor", error))?;
        match news(monitor)? {
            News::Failed(failure) => Err(failure.into()),
            News::Ready { .. } | News::Started => Ok(()),
        }
    }
}

fn news(monitor: &mut BufReader<UnixStream>) -> Result<News, BackendError> {
    let mut line = String::new();
    monitor
        .read_line(&mut line)
        .map_err(|error| BackendError::caused("cannot hear the machine's monitor", error))?;
    if line.is_empty() {
        return Err(BackendError::new(
            ErrorKind::Failed,
            "the machine's monitor ended before the machine ran",
        ));
    }
    serde_json::from_str(&line)
        .map_err(|error| BackendError::caused("cannot read what the machine's monitor says", error))
}

/// All of a machine at once, through its door.
#[derive(Debug)]
struct Door {
    instances: Instances,
    id: InstanceId,
    /// The machine outlives this run.
    keeps_disk: bool,
    /// What the monitor says.
    monitor: Mutex<BufReader<UnixStream>>,
}

impl Door {
    fn ask(&self, question: &Ask) -> Result<(), BackendError> {
        let dir = self.instances.dir(&self.id);
        stream::runtime()?.block_on(door::ask(&dir, question)).map(drop)
    }
}

impl Hold for Door {
    fn freeze(&self) -> Result<(), BackendError> {
        self.ask(&Ask::Pause)
    }

    fn thaw(&self) -> Result<(), BackendError> {
        self.ask(&Ask::Resume)
    }

    fn end(&self) -> Option<Duration> {
        if !self.keeps_disk {
            return None;
        }
        let dir = self.instances.dir(&self.id);
        // A monitor that does not even answer is killed.
        let asked = stream::runtime().is_ok_and(|runtime| {
            let ask = async { tokio::time::timeout(TO_ANSWER, door::ask(&dir, &Ask::End)).await };
            matches!(runtime.block_on(ask), Ok(Ok(_)))
        });
        asked.then_some(TO_END)
    }

    fn why_it_ended(&self) -> Option<String> {
        let mut monitor = self.monitor.lock().ok()?;
        // It is gone: all that it said is there.
        monitor.get_mut().set_nonblocking(true).ok()?;
        match news(&mut monitor) {
            Ok(News::Failed(failure)) => {
                let error = BackendError::from(failure);
                let hint = error.hint_text().map(|hint| format!("\n{hint}")).unwrap_or_default();
                Some(format!("{error}{hint}"))
            }
            _ => None,
        }
    }

    fn kill(&self) -> Result<(), BackendError> {
        // The monitor was killed, and its hypervisor with it.
        Ok(())
    }

    fn out_of_memory(&self) -> bool {
        false
    }
}
