//! A container to test with: a root of busybox, a record, pipes.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::Timestamp;
use kiln_contract::{
    ExecSpec, Home, InstanceDir, InstanceId, InstanceRecord, InstanceSpec, InstanceStatus, ProcessId,
    ProcessSpec, RuntimeChoice,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions};

use crate::cgroup::Cgroup;
use crate::runtime::{Created, Launch, NetworkNamespace, ResolvedMount, RuntimeError, Streams, choose};

/// What a process did.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Exit code, or 128 + signal.
    pub(super) code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) out_of_memory: bool,
}

/// A container that has not been started; its directory and control group vanish with it.
pub(super) struct Bed {
    pub(super) record: InstanceRecord,
    pub(super) dir: InstanceDir,
    pub(super) root: PathBuf,
    pub(super) mounts: Vec<ResolvedMount>,
    pub(super) network: NetworkNamespace,
    _home: tempfile::TempDir,
}

impl Bed {
    /// `None`, loudly, where this host cannot have containers.
    pub(super) fn new(runtime: &RuntimeChoice, args: &[&str]) -> Option<Self> {
        if !kiln_fixtures::require_root() {
            return None;
        }
        let rootfs = kiln_fixtures::busybox_rootfs()?;
        let home = tempfile::tempdir().unwrap();
        let id = InstanceId::random();
        let dir = Home::at(home.path()).instance(&id);
        let root = dir.root();
        fs::create_dir_all(dir.path()).unwrap();
        let copied = Command::new("cp")
            .args(["-r", "--no-dereference", "--preserve=mode"])
            .arg(&rootfs)
            .arg(&root)
            .status()
            .unwrap();
        assert!(copied.success());
        Some(Self {
            record: record(id, runtime, args),
            dir,
            root,
            mounts: Vec::new(),
            network: NetworkNamespace::New,
            _home: home,
        })
    }

    /// Makes and starts it with `streams`.
    pub(super) fn launch(&mut self, streams: Streams) -> Result<Created, RuntimeError> {
        let mut created = choose(&self.record.spec.runtime)?.create(Launch {
            record: &self.record,
            dir: &self.dir,
            root: &self.root,
            mounts: self.mounts.clone(),
            network: self.network.clone(),
            streams,
        })?;
        self.record.process = Some(created.process);
        self.record.cgroup.clone_from(&created.cgroup);
        if let Err(error) = created.start() {
            wait(created.process);
            return Err(error);
        }
        Ok(created)
    }

    /// Runs it to its end.
    pub(super) fn run(&mut self) -> Result<Outcome, RuntimeError> {
        let (streams, ours) = pipes();
        let created = self.launch(streams)?;
        let (stdout, stderr) = read_both(ours);
        let code = wait(created.process);
        let out_of_memory = self.cgroup().is_some_and(|cgroup| cgroup.out_of_memory());
        Ok(Outcome { code, stdout, stderr, out_of_memory })
    }

    /// Runs a further process in it.
    pub(super) fn exec(
        &self,
        args: &[&str],
        change: impl FnOnce(&mut ExecSpec),
    ) -> Result<Outcome, RuntimeError> {
        let mut spec = ExecSpec { args: own(args), ..ExecSpec::default() };
        change(&mut spec);
        let (streams, ours) = pipes();
        let executed = choose(&self.record.spec.runtime)?.exec(&self.record, &self.dir, &spec, streams)?;
        let (stdout, stderr) = read_both(ours);
        Ok(Outcome { code: wait(executed.process), stdout, stderr, out_of_memory: false })
    }

    pub(super) fn cgroup(&self) -> Option<Cgroup> {
        self.record.cgroup.as_deref().map(Cgroup::at)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(process) =
            self.record.process.filter(|process| crate::host::process_id(process.pid) == Some(*process))
        {
            let pid = Pid::from_raw(process.pid.cast_signed()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            wait(process);
        }
        let deleted =
            choose(&self.record.spec.runtime).and_then(|runtime| runtime.delete(&self.record, &self.dir));
        if let (Err(error), false) = (deleted, std::thread::panicking()) {
            panic!("{error}");
        }
    }
}

pub(super) fn own(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

fn record(id: InstanceId, runtime: &RuntimeChoice, args: &[&str]) -> InstanceRecord {
    let process = ProcessSpec { args: own(args), cwd: "/".into(), ..ProcessSpec::default() };
    let name = format!("test-{}", id.short());
    InstanceRecord {
        format: InstanceRecord::FORMAT,
        spec: InstanceSpec { process, runtime: runtime.clone(), ..kiln_fixtures::instance_spec(&name) },
        id,
        status: InstanceStatus::Created,
        created: Timestamp::now(),
        started: None,
        exit: None,
        process: None,
        supervisor: None,
        maker: None,
        boot: None,
        addresses: Vec::new(),
        ports: Vec::new(),
        cgroup: None,
        restarts: 0,
        health: None,
        volumes: Vec::new(),
        stopped_by_user: false,
        parent: None,
    }
}

/// `/dev/null` to read from, and our ends of both outputs.
pub(super) fn pipes() -> (Streams, [OwnedFd; 2]) {
    let (out, stdout) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (err, stderr) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let stdin = File::open("/dev/null").unwrap().into();
    (Streams::Pipes { stdin, stdout, stderr }, [out, err])
}

fn read_both([out, err]: [OwnedFd; 2]) -> (String, String) {
    let read = |descriptor: OwnedFd| {
        let mut text = String::new();
        File::from(descriptor).read_to_string(&mut text).unwrap();
        text
    };
    std::thread::scope(|scope| {
        let err = scope.spawn(|| read(err));
        (read(out), err.join().unwrap())
    })
}

/// The exit code of a child.
pub(super) fn wait(process: ProcessId) -> i32 {
    let pid = Pid::from_raw(process.pid.cast_signed()).unwrap();
    let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap()
}

/// The native runtime and every program that is there.
pub(super) fn runtimes() -> Vec<RuntimeChoice> {
    let programs =
        ["runc", "crun"].into_iter().filter_map(kiln_fixtures::require).map(RuntimeChoice::External);
    [RuntimeChoice::Native].into_iter().chain(programs).collect()
}

/// Whether this host has v1 hierarchies, loudly if not.
pub(super) fn require_v1() -> bool {
    let there = Path::new("/sys/fs/cgroup/memory").exists();
    if !there {
        kiln_fixtures::skip("control groups of version 1");
    }
    there
}
