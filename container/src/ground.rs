//! How one run of a workload begins and ends.
//!
//! The order makes sure that whoever looks after a `kill -9`, at whatever moment, finds what is to be cleaned up: the
//! record names the supervisor before anything is made, and the process and its cgroup before the workload's command
//! runs; everything else is found by the instance's id.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kiln_contract::{
    Attachment, BackendError, ErrorKind, ExecSpec, InstanceDir, InstanceId, InstanceRecord, NetworkBackend,
    NetworkRequest, ProcessId, ViewBackend,
};
use kiln_instance::streams::{Streams, Wiring, set_nonblocking};
use kiln_instance::{Ground, Hold, Instances, Run, Volumes, process};
use kiln_net::ContainerNetwork;
use kiln_store::Store;
use kiln_view::Overlay;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;

use crate::cgroup::Cgroup;
use crate::host_files;
use crate::runtime::{self, Launch, NetworkNamespace, OciRuntime};

/// Where a container is made: a mount namespace of this process, in which its root is mounted.
pub(crate) struct ContainerGround {
    instances: Instances,
    id: InstanceId,
    dir: InstanceDir,
    runtime: Box<dyn OciRuntime>,
    /// Holds the servers of FUSE views.
    overlay: Overlay,
    mounted: bool,
    /// Of the run that there is.
    network: Option<ContainerNetwork>,
}

impl ContainerGround {
    /// Moves the calling process into a mount namespace of its own. The first view of it: nothing is mounted.
    pub(crate) fn enter(instances: &Instances, record: &InstanceRecord) -> Result<Self, BackendError> {
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
            network: None,
        })
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
        mounts.extend(crate::mounts::resolve(&volumes, &record.spec, &self.dir.root())?);
        let (streams, mut ends) = wiring
            .connect(&record.spec.process)
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
            hold: created.cgroup.as_deref().map(|path| Box::new(Cgroup::at(path)) as Box<dyn Hold>),
        });
        let attachment = if peer.is_some() {
            Attachment::default()
        } else {
            let network = self.network.insert(ContainerNetwork::new(self.instances.home()));
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
        *record = self.instances.begin_run(&self.id, created.process, created.cgroup.clone(), attachment)?;
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

    fn clear(&mut self, record: &InstanceRecord) -> Result<(), BackendError> {
        let left = match self.network.take() {
            Some(mut network) => network.teardown(&self.id),
            None => Ok(()),
        };
        self.runtime.delete(record, &self.dir)?;
        left
    }
}

impl Ground for ContainerGround {
    fn launch(&mut self, record: &mut InstanceRecord, wiring: Wiring) -> Result<Run, BackendError> {
        let mut run = None;
        let launched = self.try_launch(record, wiring, &mut run);
        match (launched, run) {
            (Ok(()), Some(run)) => Ok(run),
            (Ok(()), None) => Err(BackendError::new(ErrorKind::Failed, "the container was not made")),
            (Err(error), run) => {
                if let Some(run) = &run {
                    process::kill_and_wait(run.process, Duration::from_secs(10));
                    process::reap(run.process.pid);
                }
                drop(run);
                self.clear(record)?;
                Err(error)
            }
        }
    }

    fn end(&mut self, record: &InstanceRecord, _run: Run) -> Result<(), BackendError> {
        self.clear(record)
    }

    fn exec(
        &self,
        record: &InstanceRecord,
        spec: &ExecSpec,
        streams: Streams,
    ) -> Result<ProcessId, BackendError> {
        Ok(self.runtime.exec(record, &self.dir, spec, streams)?.process)
    }

    fn unmount(&mut self) -> Result<(), BackendError> {
        if std::mem::take(&mut self.mounted) {
            self.overlay.unmount(&self.dir.root())?;
        }
        Ok(())
    }
}
