//! The back ends over one home, as one: every verb goes to the back end of the instance that it is for.

#[cfg_attr(target_os = "linux", path = "backends/linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "backends/macos.rs")]
mod platform;

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use kiln_contract::{
    AttachEnd, AttachOptions, BackendError, Capabilities, Change, CommitOptions, Digest, ExecSpec,
    ExitStatus, Home, InstanceId, InstanceRecord, InstanceSpec, Isolation, LogLine, LogQuery, ProcessTable,
    PublishSpec, RemoveOptions, RuntimeBackend, Snapshot, SnapshotOptions, StartMode, Stats, Stdio, Update,
};
use kiln_instance::Verbs;
use kiln_machine::Machines;

pub(crate) use platform::{KINDS, in_views, prepare};

/// All instances of a home, of whatever kind.
pub(crate) struct Backends {
    all: Verbs,
    containers: Box<dyn RuntimeBackend>,
    /// Made when the first machine is asked for.
    machines: OnceLock<Machines>,
    home: Home,
    /// Nothing is shown of what is made for a machine.
    quiet: bool,
}

impl std::fmt::Debug for Backends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backends").field("home", &self.home).finish_non_exhaustive()
    }
}

impl Backends {
    /// Those of `home`. Nothing is read or made by this.
    pub(crate) fn open(home: &Home) -> Result<Self, BackendError> {
        Ok(Self {
            all: Verbs::open(home, KINDS),
            containers: platform::containers(home)?,
            machines: OnceLock::new(),
            home: home.clone(),
            quiet: false,
        })
    }

    /// The same, showing nothing of what is made for a machine.
    pub(crate) fn quietly(mut self, quiet: bool) -> Self {
        self.quiet = quiet;
        self
    }

    /// The machines.
    pub(crate) fn machines(&self) -> &Machines {
        self.machines
            .get_or_init(|| Machines::open(&self.home, KINDS, crate::progress::new(self.quiet).into()))
    }

    /// The back end that isolates in this way.
    fn backend(&self, isolation: Isolation) -> Result<&dyn RuntimeBackend, BackendError> {
        match isolation {
            Isolation::Container => Ok(&*self.containers),
            Isolation::Machine => Ok(self.machines()),
        }
    }

    /// The back end of an instance.
    fn backend_for(&self, id: &InstanceId) -> Result<&dyn RuntimeBackend, BackendError> {
        self.backend(self.all.instances().read(id)?.spec.isolation)
    }
}

impl RuntimeBackend for Backends {
    /// What can be done with containers, which is what an instance is unless asked otherwise.
    fn capabilities(&self) -> Capabilities {
        self.containers.capabilities()
    }

    fn create(&self, spec: &InstanceSpec) -> Result<InstanceRecord, BackendError> {
        self.backend(spec.isolation)?.create(spec)
    }

    fn start(&self, id: &InstanceId, mode: StartMode) -> Result<Option<ExitStatus>, BackendError> {
        self.backend_for(id)?.start(id, mode)
    }

    fn exec(
        &self,
        id: &InstanceId,
        spec: &ExecSpec,
        stdio: Stdio,
    ) -> Result<Option<ExitStatus>, BackendError> {
        self.backend_for(id)?.exec(id, spec, stdio)
    }

    fn attach(&self, id: &InstanceId, options: AttachOptions) -> Result<AttachEnd, BackendError> {
        self.backend_for(id)?.attach(id, options)
    }

    fn signal(&self, id: &InstanceId, signal: i32) -> Result<(), BackendError> {
        self.backend_for(id)?.signal(id, signal)
    }

    fn stop(&self, id: &InstanceId, timeout: Option<Duration>) -> Result<(), BackendError> {
        self.backend_for(id)?.stop(id, timeout)
    }

    fn pause(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.backend_for(id)?.pause(id)
    }

    fn resume(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.backend_for(id)?.resume(id)
    }

    fn wait(&self, id: &InstanceId) -> Result<ExitStatus, BackendError> {
        self.backend_for(id)?.wait(id)
    }

    fn logs(
        &self,
        id: &InstanceId,
        query: &LogQuery,
        each: &mut dyn FnMut(LogLine) -> ControlFlow<()>,
    ) -> Result<(), BackendError> {
        self.backend_for(id)?.logs(id, query, each)
    }

    fn stats(&self, id: &InstanceId) -> Result<Stats, BackendError> {
        self.backend_for(id)?.stats(id)
    }

    fn top(&self, id: &InstanceId) -> Result<ProcessTable, BackendError> {
        self.backend_for(id)?.top(id)
    }

    fn changes(&self, id: &InstanceId) -> Result<Vec<Change>, BackendError> {
        self.backend_for(id)?.changes(id)
    }

    fn commit(&self, id: &InstanceId, options: &CommitOptions) -> Result<Digest, BackendError> {
        self.backend_for(id)?.commit(id, options)
    }

    fn copy_out(
        &self,
        id: &InstanceId,
        path: &Path,
        follow: bool,
        archive: &mut dyn Write,
    ) -> Result<(), BackendError> {
        self.backend_for(id)?.copy_out(id, path, follow, archive)
    }

    fn copy_in(&self, id: &InstanceId, path: &Path, archive: &mut dyn Read) -> Result<(), BackendError> {
        self.backend_for(id)?.copy_in(id, path, archive)
    }

    fn rename(&self, id: &InstanceId, name: &str) -> Result<(), BackendError> {
        self.backend_for(id)?.rename(id, name)
    }

    fn ports(&self, id: &InstanceId) -> Result<Vec<PublishSpec>, BackendError> {
        self.backend_for(id)?.ports(id)
    }

    fn snapshot(&self, id: &InstanceId, options: &SnapshotOptions) -> Result<(), BackendError> {
        self.backend_for(id)?.snapshot(id, options)
    }

    fn snapshots(&self, id: &InstanceId) -> Result<Vec<Snapshot>, BackendError> {
        self.backend_for(id)?.snapshots(id)
    }

    fn restore(&self, id: &InstanceId, snapshot: &str, force: bool) -> Result<(), BackendError> {
        self.backend_for(id)?.restore(id, snapshot, force)
    }

    fn remove_snapshot(&self, id: &InstanceId, snapshot: &str) -> Result<(), BackendError> {
        self.backend_for(id)?.remove_snapshot(id, snapshot)
    }

    fn resize(&self, id: &InstanceId, disk: u64) -> Result<(), BackendError> {
        self.backend_for(id)?.resize(id, disk)
    }

    fn update(&self, id: &InstanceId, update: &Update) -> Result<InstanceRecord, BackendError> {
        self.backend_for(id)?.update(id, update)
    }

    fn fork(&self, id: &InstanceId, name: &str, memory: bool) -> Result<InstanceRecord, BackendError> {
        self.backend_for(id)?.fork(id, name, memory)
    }

    fn remove(&self, id: &InstanceId, options: RemoveOptions) -> Result<(), BackendError> {
        self.backend_for(id)?.remove(id, options)
    }

    fn list(&self) -> Result<Vec<InstanceRecord>, BackendError> {
        self.all.list()
    }

    fn find(&self, name_or_id: &str) -> Result<InstanceRecord, BackendError> {
        self.all.find(name_or_id)
    }
}
