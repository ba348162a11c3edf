//! The verbs of machines.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_contract::{
    AttachEnd, AttachOptions, BackendError, Capabilities, Capability, Change, CommitOptions, Digest, DiskId,
    ErrorKind, ExecSpec, ExitStatus, Home, InstanceId, InstanceRecord, InstanceSpec, LogLine, LogQuery,
    ProcessTable, Progress, PublishSpec, RemoveOptions, RuntimeBackend, Snapshot, SnapshotOptions, StartMode,
    Stats, Stdio, Update,
};
use kiln_instance::{Instances, Kinds, Verbs, Volumes, is_supervised, signals};
use kiln_link::message::{self, Answer, MAX_CHUNK, Request};
use kiln_link::service;

use crate::beginning::{disks, image, is_cold, template};
use crate::door::{self, Ask, Copy};
use crate::life::{lost, refused};
use crate::saved::Saved;
use crate::snapshots::never_started;
use crate::template::{failed, in_utf8};
use crate::visit::Duplex;
use crate::{exec, plan, refusal, stream};

/// Machines of one home: the [`RuntimeBackend`] over a hypervisor.
pub struct Machines {
    verbs: Verbs,
    progress: Arc<dyn Progress>,
}

impl std::fmt::Debug for Machines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machines").field("verbs", &self.verbs).finish_non_exhaustive()
    }
}

impl Machines {
    /// The machines of a home. Nothing is read or made by this. `progress` is told when a template or an image disk is made.
    pub fn open(home: &Home, kinds: Kinds, progress: Arc<dyn Progress>) -> Self {
        Self { verbs: Verbs::open(home, kinds), progress }
    }

    pub(crate) fn verbs(&self) -> &Verbs {
        &self.verbs
    }

    pub(crate) fn instances(&self) -> &Instances {
        self.verbs.instances()
    }

    pub(crate) fn home(&self) -> &Home {
        self.instances().home()
    }

    /// Makes what a start would otherwise make without anybody seeing how far it is.
    pub(crate) fn prepare(&self, record: &InstanceRecord) -> Result<(), BackendError> {
        // Said before anything is made, and also where nothing boots this time.
        crate::life::to_boot()?;
        let hypervisor = kiln_vmm::open(record.spec.machine.hypervisor)?;
        crate::admission::check(&record.spec)?;
        let image = image(self.home(), record, &*self.progress)?;
        let dir = self.instances().dir(&record.id);
        if Saved::load(&plan::saved(&dir)).is_none() && !is_cold(&dir, record) {
            let disks = disks(self.home())?;
            template(self.home(), record, &*hypervisor, (&*disks, &image), &*self.progress)?;
        }
        Ok(())
    }

    /// Has the next start of a machine that does not run boot its kernel. What was saved of its memory is forgotten.
    ///
    /// # Errors
    /// It runs, or is none.
    pub fn boot_next(&self, id: &InstanceId) -> Result<(), BackendError> {
        let still = self.still(id, "boot")?;
        if still.record.spec.isolation != kiln_contract::Isolation::Machine {
            return Err(BackendError::unsupported(format!(
                "instance {} is a container: it has no kernel to boot",
                still.record.spec.name
            )));
        }
        let dir = self.instances().dir(id);
        crate::saved::remove(&plan::saved(&dir))?;
        let path = plan::cold(&dir);
        std::fs::write(&path, []).map_err(failed("write", &path))
    }

    /// Asks the guest of a running machine.
    pub(crate) fn ask(&self, id: &InstanceId, request: &Request) -> Result<Answer, BackendError> {
        self.verbs.ready_for_exec(id)?;
        let dir = self.instances().dir(id);
        stream::runtime()?.block_on(async {
            let mut stream = door::dial(&dir, service::CONTROL).await?;
            question(&mut stream, request).await
        })
    }

    /// Asks for what comes as a body.
    fn fetch(
        &self,
        id: &InstanceId,
        request: &Request,
        to: &mut dyn Write,
        writing: &str,
    ) -> Result<(), BackendError> {
        self.speak(id, async |mut stream| {
            question(&mut stream, request).await?;
            loop {
                let chunk = message::receive_chunk(&mut stream).await.map_err(lost)?;
                if chunk.is_empty() {
                    break;
                }
                to.write_all(&chunk)
                    .map_err(|error| BackendError::caused(format!("cannot write {writing}"), error))?;
            }
            answer(&mut stream).await.map(drop)
        })
    }
}

async fn question(stream: &mut impl Duplex, request: &Request) -> Result<Answer, BackendError> {
    message::send(stream, request).await.map_err(lost)?;
    answer(stream).await
}

async fn answer(stream: &mut impl Duplex) -> Result<Answer, BackendError> {
    match message::receive(stream).await.map_err(lost)? {
        Some(Answer::Failed(failure)) => Err(refused(&failure)),
        Some(answer) => Ok(answer),
        None => Err(lost(kiln_link::LinkError::Closed)),
    }
}

fn nonsense(answer: &Answer) -> BackendError {
    let word = match answer {
        Answer::Done => "done",
        Answer::Failed(_) => "a failure",
        Answer::Stats(_) => "figures",
        Answer::Processes(_) => "processes",
    };
    BackendError::new(ErrorKind::Failed, format!("the guest answers with {word}, which was not asked for"))
}

impl RuntimeBackend for Machines {
    fn capabilities(&self) -> Capabilities {
        match kiln_vmm::open(None) {
            Ok(hypervisor) => hypervisor.capabilities(),
            Err(error) => Capabilities::all().without(Capability::ForkLive, error.to_string()),
        }
    }

    fn create(&self, spec: &InstanceSpec) -> Result<InstanceRecord, BackendError> {
        if spec.process.args.is_empty() {
            return Err(BackendError::new(
                ErrorKind::Invalid,
                "cannot make a machine: there is no command to run",
            )
            .hint("the image names none: give one after the image"));
        }
        signals::parse(&spec.stop.signal)?;
        refusal::check(spec)?;
        crate::life::to_boot()?;
        crate::services::check_device(spec)?;
        if let Some(driver) = spec.machine.hypervisor {
            // One that was chosen is there, or that is said before anything is made.
            kiln_vmm::open(Some(driver))?;
        }
        crate::services::policy(spec)?;
        let volumes = Volumes::open(self.home());
        let mut spec = spec.clone();
        let anonymous = volumes.claim(&mut spec)?;
        self.instances().create(&spec, anonymous.clone()).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = volumes.release(&anonymous);
        })
    }

    fn start(&self, id: &InstanceId, mode: StartMode) -> Result<Option<ExitStatus>, BackendError> {
        let record = self.verbs.truth(id)?;
        if !is_supervised(&record)
            && let Err(error) = self.prepare(&record)
        {
            // As if it had been tried: what was made for one run only goes.
            if record.spec.remove {
                self.remove(id, RemoveOptions { force: true, volumes: true })?;
            }
            return Err(error);
        }
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
        let stats = match self.ask(id, &Request::Stats)? {
            Answer::Stats(stats) => stats,
            other => return Err(nonsense(&other)),
        };
        Ok(Stats {
            cpu: Duration::from_micros(stats.cpu),
            memory: stats.memory,
            memory_limit: Some(stats.memory_total),
            pids: stats.tasks,
            pids_limit: None,
            network_received: stats.received,
            network_sent: stats.sent,
            block_read: stats.read,
            block_written: stats.written,
        })
    }

    fn top(&self, id: &InstanceId) -> Result<ProcessTable, BackendError> {
        match self.ask(id, &Request::Processes)? {
            Answer::Processes(mut rows) if !rows.is_empty() => {
                let titles = rows.remove(0);
                // The guest's words: no row is longer than the titles, and nothing in them moves a terminal's cursor.
                let clean = |cell: String| cell.chars().filter(|c| !c.is_control()).take(4096).collect();
                let rows =
                    rows.into_iter().map(|row| row.into_iter().take(titles.len()).map(clean).collect());
                Ok(ProcessTable { rows: rows.collect(), titles })
            }
            other => Err(nonsense(&other)),
        }
    }

    fn changes(&self, id: &InstanceId) -> Result<Vec<Change>, BackendError> {
        let mut tar = tempfile::tempfile()
            .map_err(|error| BackendError::caused("cannot make a temporary file", error))?;
        self.fetch(id, &Request::Layer, &mut tar, "a temporary file")?;
        crate::commit::changes(self.home(), &self.instances().read(id)?, tar)
    }

    fn commit(&self, id: &InstanceId, options: &CommitOptions) -> Result<Digest, BackendError> {
        let mut tar = tempfile::tempfile()
            .map_err(|error| BackendError::caused("cannot make a temporary file", error))?;
        self.fetch(id, &Request::Layer, &mut tar, "a temporary file")?;
        crate::commit::commit(self.home(), &self.instances().read(id)?, tar, options)
    }

    fn copy_out(
        &self,
        id: &InstanceId,
        path: &Path,
        follow: bool,
        archive: &mut dyn Write,
    ) -> Result<(), BackendError> {
        let request = Request::Pack { path: path.as_os_str().as_bytes().to_vec(), follow };
        self.fetch(id, &request, archive, "the archive")
    }

    fn copy_in(&self, id: &InstanceId, path: &Path, archive: &mut dyn Read) -> Result<(), BackendError> {
        self.speak(id, async |mut stream| {
            let request = Request::Unpack { path: path.as_os_str().as_bytes().to_vec() };
            message::send(&mut stream, &request).await.map_err(lost)?;
            let mut buffer = vec![0; MAX_CHUNK];
            loop {
                let count = archive
                    .read(&mut buffer)
                    .map_err(|error| BackendError::caused("cannot read the archive", error))?;
                message::send_chunk(&mut stream, &buffer[..count]).await.map_err(lost)?;
                if count == 0 {
                    break;
                }
            }
            answer(&mut stream).await.map(drop)
        })
    }

    fn rename(&self, id: &InstanceId, name: &str) -> Result<(), BackendError> {
        self.verbs.rename(id, name)
    }

    fn ports(&self, id: &InstanceId) -> Result<Vec<PublishSpec>, BackendError> {
        self.verbs.ports(id)
    }

    fn fork(&self, id: &InstanceId, name: &str, memory: bool) -> Result<InstanceRecord, BackendError> {
        let source = self.verbs.truth(id)?;
        if memory && !is_supervised(&source) {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("machine {} has no memory to copy: it does not run", source.spec.name),
            )
            .hint("leave out --memory to copy its disk"));
        }
        let mut spec = source.spec.clone();
        name.clone_into(&mut spec.name);
        spec.transient = false;
        // Nor can two have one address.
        spec.network.address = None;
        // A fork is somebody else: it gets a host name of its own unless one was chosen.
        // Volumes are shared, as by any two instances that name the same: those without a name stay until neither is there.
        let fork = self.instances().create(&spec, source.volumes.clone())?;
        let fork = self.instances().update(&fork.id, |record| {
            record.parent = Some(source.id.clone());
            Ok(())
        })?;
        let copied = if memory { self.copy_live(&source, &fork) } else { self.copy_disk(&source, &fork) };
        if let Err(error) = copied {
            self.remove(&fork.id, RemoveOptions { force: true, volumes: true })?;
            return Err(error);
        }
        Ok(fork)
    }

    fn snapshot(&self, id: &InstanceId, options: &SnapshotOptions) -> Result<(), BackendError> {
        self.make_snapshot(id, options)
    }

    fn snapshots(&self, id: &InstanceId) -> Result<Vec<Snapshot>, BackendError> {
        self.list_snapshots(id)
    }

    fn restore(&self, id: &InstanceId, snapshot: &str, force: bool) -> Result<(), BackendError> {
        self.restore_snapshot(id, snapshot, force)
    }

    fn remove_snapshot(&self, id: &InstanceId, snapshot: &str) -> Result<(), BackendError> {
        self.delete_snapshot(id, snapshot)
    }

    fn resize(&self, id: &InstanceId, disk: u64) -> Result<(), BackendError> {
        self.grow(id, disk)
    }

    fn update(&self, id: &InstanceId, update: &Update) -> Result<InstanceRecord, BackendError> {
        self.check_update(id, update)?;
        self.verbs.update(id, update)
    }

    fn remove(&self, id: &InstanceId, options: RemoveOptions) -> Result<(), BackendError> {
        self.verbs.remove(id, options)?;
        disks(self.home())?.remove(&DiskId::from(id))
    }

    fn list(&self) -> Result<Vec<InstanceRecord>, BackendError> {
        self.verbs.list()
    }

    fn find(&self, name_or_id: &str) -> Result<InstanceRecord, BackendError> {
        self.verbs.find(name_or_id)
    }
}

fn copy_for(fork: &InstanceId) -> Copy {
    Copy::Disk(DiskId::from(fork).as_str().to_owned())
}

impl Machines {
    /// Copies a running machine as it is at one instant: its memory, its devices, its disk.
    fn copy_live(&self, source: &InstanceRecord, fork: &InstanceRecord) -> Result<(), BackendError> {
        self.verbs.ready_for_exec(&source.id)?;
        let saved = plan::saved(&self.instances().dir(&fork.id));
        std::fs::create_dir(&saved).map_err(failed("make", &saved))?;
        let question = Ask::Save { directory: Some(in_utf8(&saved)?), disk: copy_for(&fork.id) };
        let dir = self.instances().dir(&source.id);
        let (_, reply) = stream::runtime()?.block_on(door::ask(&dir, &question))?;
        if let door::Reply::Saved { paused } = reply {
            tracing::info!(paused_microseconds = paused, "forked");
        }
        Ok(())
    }

    /// Copies the disk of a machine that does not run, or as it is on the disk of one that does.
    fn copy_disk(&self, source: &InstanceRecord, fork: &InstanceRecord) -> Result<(), BackendError> {
        if is_supervised(source) {
            self.ask(&source.id, &Request::Sync)?;
            let dir = self.instances().dir(&source.id);
            let question = Ask::Save { directory: None, disk: copy_for(&fork.id) };
            return stream::runtime()?.block_on(door::ask(&dir, &question)).map(drop);
        }
        // It does not start while its disk is copied.
        let still = self.still(&source.id, "fork")?;
        let disks = disks(self.home())?;
        if disks.path(&still.disk).is_err() {
            return Err(never_started(&still.record, "copy"));
        }
        disks.clone_disk(&still.disk, None, &DiskId::from(&fork.id)).map(drop)
    }
}
