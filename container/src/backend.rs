//! The verbs of containers.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use kiln_contract::{
    AttachEnd, AttachOptions, BackendError, Capabilities, Change, CommitOptions, Digest, ErrorKind, ExecSpec,
    ExitStatus, Home, InstanceId, InstanceRecord, InstanceSpec, InstanceStatus, LogLine, LogQuery,
    ProcessTable, PublishSpec, RemoveOptions, RuntimeBackend, StartMode, Stats, Stdio,
};
use kiln_instance::{Instances, Request, Verbs, Volumes, signals};

use crate::cgroup::{self, Cgroup};
use crate::kind::KINDS;
use crate::{commit, copy, exec};

/// Containers of one home: the native [`RuntimeBackend`].
///
/// No state is kept in the value: everything is in the home, and every process may open it.
#[derive(Debug)]
pub struct Containers {
    verbs: Verbs,
}

impl Containers {
    /// The containers of a home. Nothing is read or made by this.
    ///
    /// # Errors
    /// None today.
    pub fn open(home: &Home) -> Result<Self, BackendError> {
        Ok(Self { verbs: Verbs::open(home, KINDS) })
    }

    fn instances(&self) -> &Instances {
        self.verbs.instances()
    }
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
        let volumes = Volumes::open(self.instances().home());
        let mut spec = spec.clone();
        let anonymous = volumes.claim(&mut spec)?;
        self.instances().create(&spec, anonymous.clone()).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = volumes.release(&anonymous);
        })
    }

    fn start(&self, id: &InstanceId, mode: StartMode) -> Result<Option<ExitStatus>, BackendError> {
        self.verbs.start(id, mode)
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
        let record = self.verbs.ready_for_exec(id)?;
        exec::exec(&record, &self.instances().dir(id), spec, stdio)
    }

    fn attach(&self, id: &InstanceId, options: AttachOptions) -> Result<AttachEnd, BackendError> {
        self.verbs.attach(id, options)
    }

    fn signal(&self, id: &InstanceId, signal: i32) -> Result<(), BackendError> {
        self.verbs.signal(id, signal)
    }

    fn stop(&self, id: &InstanceId, timeout: Option<Duration>) -> Result<(), BackendError> {
        self.verbs.stop(id, timeout)
    }

    fn pause(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.verbs.pause(id)
    }

    fn resume(&self, id: &InstanceId) -> Result<(), BackendError> {
        self.verbs.resume(id)
    }

    fn wait(&self, id: &InstanceId) -> Result<ExitStatus, BackendError> {
        self.verbs.wait(id)
    }

    fn logs(
        &self,
        id: &InstanceId,
        query: &LogQuery,
        each: &mut dyn FnMut(LogLine) -> ControlFlow<()>,
    ) -> Result<(), BackendError> {
        self.verbs.logs(id, query, each)
    }

    fn stats(&self, id: &InstanceId) -> Result<Stats, BackendError> {
        let record = self.verbs.running(id, "measure")?;
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
        let record = self.verbs.running(id, "list the processes of")?;
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
        commit::changes(self.instances().home(), &self.verbs.truth(id)?)
    }

    fn commit(&self, id: &InstanceId, options: &CommitOptions) -> Result<Digest, BackendError> {
        let record = self.verbs.truth(id)?;
        // Where it cannot be suspended, what is committed may be from several moments.
        let suspended = options.pause
            && record.status == InstanceStatus::Running
            && self.verbs.ask(id, &Request::Pause).is_ok();
        let committed = commit::commit(self.instances().home(), &record, options);
        if suspended {
            self.verbs.ask(id, &Request::Resume)?;
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
        copy::copy_out(self.instances().home(), &self.verbs.truth(id)?, path, follow, archive)
    }

    fn copy_in(&self, id: &InstanceId, path: &Path, archive: &mut dyn Read) -> Result<(), BackendError> {
        copy::copy_in(self.instances().home(), &self.verbs.truth(id)?, path, archive)
    }

    fn rename(&self, id: &InstanceId, name: &str) -> Result<(), BackendError> {
        self.verbs.rename(id, name)
    }

    fn ports(&self, id: &InstanceId) -> Result<Vec<PublishSpec>, BackendError> {
        self.verbs.ports(id)
    }

    fn remove(&self, id: &InstanceId, options: RemoveOptions) -> Result<(), BackendError> {
        self.verbs.remove(id, options)
    }

    fn list(&self) -> Result<Vec<InstanceRecord>, BackendError> {
        self.verbs.list()
    }

    fn find(&self, name_or_id: &str) -> Result<InstanceRecord, BackendError> {
        self.verbs.find(name_or_id)
    }
}
