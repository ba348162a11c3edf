//! A home with an image, and the ways in which tests use it.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use kiln_container::Containers;
use kiln_contract::{
    Digest, Home, InstanceRecord, InstanceSpec, InstanceStatus, Isolation, LogQuery, NetworkSpec, ProcessId,
    ProcessSpec, RemoveOptions, Resources, RestartPolicy, RuntimeBackend, RuntimeChoice, SecuritySpec,
    StartMode, StopSpec,
};
use kiln_store::{ImportLimits, Store};

/// A sentence and what checks it.
pub(crate) type Test = (&'static str, fn());

/// A home with busybox in its store.
pub(crate) struct Bed {
    pub(crate) containers: Containers,
    pub(crate) home: Home,
    layer: Digest,
    _directory: tempfile::TempDir,
}

impl Bed {
    pub(crate) fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("kiln-supervisor-").tempdir().unwrap();
        let home = Home::at(directory.path());
        let rootfs = kiln_fixtures::busybox_rootfs().unwrap();
        let layer = Store::open(&home).unwrap().import_tar(archive(&rootfs), None, ImportLimits::default());
        let layer = layer.unwrap().layer;
        Self { containers: Containers::open(&home).unwrap(), home, layer, _directory: directory }
    }

    /// A container without a network that runs `args`.
    pub(crate) fn spec(&self, name: &str, args: &[&str]) -> InstanceSpec {
        InstanceSpec {
            name: name.into(),
            isolation: Isolation::Container,
            image: "busybox".into(),
            image_id: self.layer,
            layers: vec![self.layer],
            process: ProcessSpec {
                args: args.iter().map(|&arg| arg.to_owned()).collect(),
                env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
                cwd: "/".into(),
                ..ProcessSpec::default()
            },
            hostname: None,
            mounts: Vec::new(),
            network: NetworkSpec { mode: "none".into(), ..NetworkSpec::default() },
            ports: Vec::new(),
            resources: Resources::default(),
            security: SecuritySpec::default(),
            restart: RestartPolicy::No,
            stop: StopSpec::default(),
            health: None,
            labels: BTreeMap::new(),
            init: false,
            remove: false,
            transient: false,
            runtime: RuntimeChoice::Native,
            machine: kiln_contract::MachineSpec::default(),
        }
    }

    /// Makes a container and starts it detached.
    pub(crate) fn run(&self, spec: &InstanceSpec) -> InstanceRecord {
        let record = self.containers.create(spec).unwrap();
        self.containers.start(&record.id, StartMode::Detached).unwrap();
        record
    }

    /// Its record as it is now.
    pub(crate) fn look(&self, record: &InstanceRecord) -> InstanceRecord {
        self.containers.find(record.id.as_str()).unwrap()
    }

    /// One of the commands that this program is, in this home.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.args(words).env("KILN_HOME", self.home.path()).stdin(Stdio::null());
        command
    }

    /// All that a container has written.
    pub(crate) fn log(&self, record: &InstanceRecord) -> String {
        let mut all = Vec::new();
        self.containers
            .logs(&record.id, &LogQuery::default(), &mut |line| {
                all.extend(line.bytes);
                ControlFlow::Continue(())
            })
            .unwrap();
        String::from_utf8_lossy(&all).into_owned()
    }

    /// Waits until a container has written something.
    pub(crate) fn wait_for_log(&self, record: &InstanceRecord, text: &str) {
        wait_until(&format!("the log has {text:?}"), || self.log(record).contains(text));
    }

    /// What of an instance is left on the host: cgroups, mounts, processes, files.
    pub(crate) fn traces(&self, record: &InstanceRecord) -> Vec<String> {
        let id = record.id.as_str();
        let mut found = Vec::new();
        let mut directories = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    if entry.file_name().to_string_lossy().contains(id) {
                        found.push(format!("cgroup {}", entry.path().display()));
                    }
                    directories.push(entry.path());
                }
            }
        }
        if fs::read_to_string("/proc/self/mountinfo").unwrap().contains(id) {
            found.push("a mount".into());
        }
        for process in [record.process, record.supervisor].into_iter().flatten() {
            if runs(process) {
                found.push(format!("process {}", process.pid));
            }
        }
        if self.home.instance(&record.id).path().exists() {
            found.push("its directory".into());
        }
        if self.home.names().join(&record.spec.name).symlink_metadata().is_ok() {
            found.push("its name".into());
        }
        found
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let force = RemoveOptions { force: true, volumes: true };
        for record in self.containers.list().unwrap_or_default() {
            let removed = self.containers.remove(&record.id, force);
            let mut left = self.traces(&record);
            // A process that was killed, or a supervisor that has said its last word, may still be on its way out.
            let patience = std::time::Instant::now() + std::time::Duration::from_secs(5);
            while !left.is_empty() && std::time::Instant::now() < patience {
                thread::sleep(std::time::Duration::from_millis(10));
                left = self.traces(&record);
            }
            if !thread::panicking() {
                removed.unwrap();
                assert!(left.is_empty(), "left of {}: {left:?}", record.spec.name);
            }
        }
    }
}

/// A root file system as the tar archive that a registry would give. Read from the disk once.
fn archive(rootfs: &Path) -> &'static [u8] {
    static ARCHIVE: OnceLock<Vec<u8>> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let mut archive = tar::Builder::new(Vec::new());
        archive.follow_symlinks(false);
        archive.append_dir_all("", rootfs).unwrap();
        archive.into_inner().unwrap()
    })
}

/// Whether a process runs that is neither another one nor a zombie.
pub(crate) fn runs(process: ProcessId) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", process.pid)) else { return false };
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    fields[0] != "Z" && fields[0] != "X" && fields[19] == process.start.to_string()
}

/// Ends a process at once.
pub(crate) fn kill(process: ProcessId) {
    let pid = rustix::process::Pid::from_raw(process.pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait_until("the process is gone", || !runs(process));
}

/// Waits for something that will surely come.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a state.
pub(crate) fn wait_for_status(bed: &Bed, record: &InstanceRecord, status: InstanceStatus) {
    wait_until(&format!("{} is {status}", record.spec.name), || bed.look(record).status == status);
}

/// The names of the files in a directory.
pub(crate) fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
