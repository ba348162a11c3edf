//! How one run of a workload begins and ends.
//!
//! The order makes sure that whoever looks after a `kill -9`, at whatever moment, finds what is to be cleaned up: the
//! record names the supervisor before anything is made, and the process and its cgroup before the workload's command
//! runs; everything else is found by the instance's id.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_contract::{
    Attachment, BackendError, ErrorKind, HealthState, HealthStatus, InstanceDir, InstanceId, InstanceRecord,
    InstanceStatus, NetworkBackend, NetworkRequest, ProcessId, ViewBackend,
};
use kiln_net::ContainerNetwork;
use kiln_store::Store;
use kiln_view::Overlay;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;

use super::streams::{Ends, null, pipe, set_nonblocking};
use crate::Volumes;
use crate::cgroup::Cgroup;
use crate::host_files;
use crate::instances::Instances;
use crate::process;
use crate::runtime::{self, Launch, NetworkNamespace, OciRuntime, Streams};

/// Where a workload is made: a mount namespace of this process, in which its root is mounted.
pub(super) struct Ground {
    instances: Instances,
    id: InstanceId,
    dir: InstanceDir,
    runtime: Box<dyn OciRuntime>,
    /// Holds the servers of FUSE views.
    overlay: Overlay,
    mounted: bool,
}

/// What the workload's streams are to be.
pub(super) enum Wiring {
    /// These themselves: nothing passes through the supervisor, and nothing is logged.
    Direct {
        /// Taken as they are.
        stdin: std::os::fd::OwnedFd,
        /// Taken as they are.
        stdout: std::os::fd::OwnedFd,
        /// Taken as they are.
        stderr: std::os::fd::OwnedFd,
    },
    /// Pipes, or a terminal of this size, as the specification says.
    Pumped {
        /// Rows and columns.
        size: Option<(u16, u16)>,
    },
}

/// A workload that runs.
pub(super) struct Run {
    /// Its first process, a child of this one.
    pub(super) process: ProcessId,
    /// Our ends of its streams.
    pub(super) ends: Ends,
    /// When it was let go.
    pub(super) since: Instant,
    /// Its cgroup, where it has one.
    pub(super) cgroup: Option<Cgroup>,
    network: Option<ContainerNetwork>,
}

impl Ground {
    /// Moves the calling process into a mount namespace of its own. The first view of it: nothing is mounted.
    pub(super) fn enter(instances: &Instances, record: &InstanceRecord) -> Result<Self, BackendError> {
        let runtime = runtime::choose(&record.spec.runtime)?;
        let fail = |error: nix::Error| {
            BackendError::caused("cannot make a mount namespace for the container", io::Error::from(error))
        };
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(fail)?;
        // What the host mounts later is seen here, what is mounted here is not seen there, and goes with this process.
        nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
            .map_err(fail)?;
        Ok(Self {
            instances: instances.clone(),
            id: record.id.clone(),
            dir: instances.dir(&record.id),
            runtime,
            overlay: Overlay::new(),
            mounted: false,
        })
    }

    /// What makes its processes.
    pub(super) fn runtime(&self) -> &dyn OciRuntime {
        &*self.runtime
    }

    /// Its directory.
    pub(super) fn dir(&self) -> &InstanceDir {
        &self.dir
    }

    /// Makes the workload and lets it go. On failure nothing is left of it, and the record says nothing of it.
    pub(super) fn launch(
        &mut self,
        record: &mut InstanceRecord,
        wiring: Wiring,
    ) -> Result<Run, BackendError> {
        let mut run = None;
        let launched = self.try_launch(record, wiring, &mut run);
        match (launched, run) {
            (Ok(()), Some(run)) => Ok(run),
            (Ok(()), None) => Err(BackendError::new(ErrorKind::Failed, "the container was not made")),
            (Err(error), run) => {
                if let Some(run) = &run {
                    process::kill_and_wait(run.process, Duration::from_secs(10));
                    reap(run.process.pid);
                }
                let network = run.and_then(|run| run.network);
                self.clear(record, network)?;
                Err(error)
            }
        }
    }

    fn try_launch(
        &mut self,
        record: &mut InstanceRecord,
        wiring: Wiring,
        run: &mut Option<Run>,
    ) -> Result<(), BackendError> {
        self.mount_root(record)?;
        let peer = self.network_peer(record)?;
        let (mut mounts, namespace) = match &peer {
            Some((dir, process)) => {
                let namespace = PathBuf::from(format!("/proc/{}/ns/net", process.pid));
                (host_files::share(dir), NetworkNamespace::Join(namespace))
            }
            None if kiln_net::needs_namespace(&record.spec.network.mode) => {
                (host_files::prepare(record, &self.dir)?, NetworkNamespace::New)
            }
            None => (host_files::prepare(record, &self.dir)?, NetworkNamespace::Host),
        };
        let volumes = Volumes::open(self.instances.home());
        mounts.extend(volumes.resolve(&record.spec, &self.dir.root())?);
        let (streams, mut ends) = wire(record, wiring)
            .map_err(|error| BackendError::caused("cannot make the container's streams", error))?;
        let root = self.dir.root();
        let launch =
            Launch { record, dir: &self.dir, root: &root, mounts, network: namespace.clone(), streams };
        let mut created = self.runtime.create(launch)?;
        // Known here from now on, whatever fails next; on disk before the command runs.
        record.process = Some(created.process);
        record.cgroup.clone_from(&created.cgroup);
        if let Some(terminal) = created.terminal.take() {
            set_nonblocking(&terminal)
                .map_err(|error| BackendError::caused("cannot use the container's terminal", error))?;
            ends.terminal = Some(terminal);
        }
        let run = run.insert(Run {
            process: created.process,
            ends,
            since: Instant::now(),
            cgroup: created.cgroup.as_deref().map(Cgroup::at),
            network: None,
        });
        let attachment = if peer.is_some() {
            Attachment::default()
        } else {
            let network = run.network.insert(ContainerNetwork::new(self.instances.home()));
            // Without a network there is nothing to do in the namespace but that.
            let ready = record.spec.network.mode == "none" && self.runtime.brings_up_loopback();
            let own = namespace == NetworkNamespace::New && !ready;
            let attachment = network.setup(&NetworkRequest {
                id: self.id.clone(),
                name: record.spec.name.clone(),
                hostname: host_files::hostname(record),
                network: record.spec.network.clone(),
                ports: record.spec.ports.clone(),
                namespace: own.then(|| format!("/proc/{}/ns/net", created.process.pid).into()),
            })?;
            host_files::complete(&self.dir, &attachment)?;
            attachment
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
            record.process = Some(created.process);
            record.cgroup = created.cgroup.clone();
            record.addresses = attachment.addresses;
            record.ports = attachment.ports;
            record.health = health;
            Ok(())
        })?;
        created.start()?;
        run.since = Instant::now();
        Ok(())
    }

    fn mount_root(&mut self, record: &InstanceRecord) -> Result<(), BackendError> {
        if self.mounted {
            return Ok(());
        }
        let home = self.instances.home();
        // Let go as soon as the root is mounted: it needs nothing of this process any more.
        let store =
            Store::open(home).map_err(|error| BackendError::caused("cannot open the store", error))?;
        self.overlay.mount(&crate::root::request(&store, home, record)?)?;
        self.mounted = true;
        Ok(())
    }

    /// The container whose network this one shares (`container:<name or id>`).
    fn network_peer(
        &self,
        record: &InstanceRecord,
    ) -> Result<Option<(InstanceDir, ProcessId)>, BackendError> {
        let Some(name) = record.spec.network.mode.strip_prefix("container:") else { return Ok(None) };
        let peer = self.instances.find(name)?;
        match peer.process.filter(|process| process::alive(*process)) {
            Some(process) => Ok(Some((self.instances.dir(&peer.id), process))),
            None => Err(BackendError::new(
                ErrorKind::State,
                format!("cannot share the network of `{name}`: it does not run"),
            )
            .hint(format!("start it first: kiln start {name}"))),
        }
    }

    /// Takes away what a run had, after its first process was reaped.
    pub(super) fn end(&self, record: &InstanceRecord, run: Run) -> Result<(), BackendError> {
        self.clear(record, run.network)
    }

    fn clear(&self, record: &InstanceRecord, network: Option<ContainerNetwork>) -> Result<(), BackendError> {
        let left = match network {
            Some(mut network) => network.teardown(&self.id),
            None => Ok(()),
        };
        self.runtime.delete(record, &self.dir)?;
        left
    }

    /// Takes the root away; to be called before the instance's files are removed.
    pub(super) fn unmount(&mut self) -> Result<(), BackendError> {
        if std::mem::take(&mut self.mounted) {
            self.overlay.unmount(&self.dir.root())?;
        }
        Ok(())
    }
}

/// Collects the exit status of a child that has ended, so that nothing of it is left.
fn reap(pid: u32) {
    let options = rustix::process::WaitOptions::empty();
    let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(process::raw(pid), options));
}

fn wire(record: &InstanceRecord, wiring: Wiring) -> io::Result<(Streams, Ends)> {
    let spec = &record.spec.process;
    match wiring {
        Wiring::Direct { stdin, stdout, stderr } => {
            let stdin = if spec.stdin { stdin } else { null()? };
            Ok((Streams::Pipes { stdin, stdout, stderr }, Ends::default()))
        }
        Wiring::Pumped { size } if spec.tty => Ok((Streams::Terminal { size }, Ends::default())),
        Wiring::Pumped { .. } => {
            let (stdin, our_stdin) = if spec.stdin {
                let (read, write) = pipe()?;
                set_nonblocking(&write)?;
                (read, Some(write))
            } else {
                (null()?, None)
            };
            let (our_stdout, stdout) = pipe()?;
            let (our_stderr, stderr) = pipe()?;
            set_nonblocking(&our_stdout)?;
            set_nonblocking(&our_stderr)?;
            let ends = Ends {
                stdin: our_stdin,
                stdout: Some(our_stdout),
                stderr: Some(our_stderr),
                ..Ends::default()
            };
            Ok((Streams::Pipes { stdin, stdout, stderr }, ends))
        }
    }
}
