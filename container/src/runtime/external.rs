//! OCI runtimes as programs: runc, crun, and whatever has their command line.
//!
//! The program gets a bundle (`config.json` with an absolute root path) and a state directory of the instance's own.
//! `create` and `exec --detach` end at once and leave the container's process to the nearest subreaper above, which
//! the calling process makes itself first: so it can be waited for like a child. What these programs have to say
//! goes to a log file, since their standard error is already the container's.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_contract::{ExecSpec, InstanceDir, InstanceRecord};
use rustix::event::{PollFd, PollFlags, poll};

use super::birth::{reap, receive_terminal};
use super::{Created, Executed, Launch, OciRuntime, RuntimeError, Streams, Waiting};
use crate::cgroup::{self, Cgroup, Hierarchies, Prepared};
use crate::spec::{self, Identity, Ingredients};
use crate::{devices, host, seccomp};

/// A runtime's program.
#[derive(Debug)]
pub(super) struct External {
    /// Looked for along `PATH` if it has no slash.
    pub(super) program: PathBuf,
}

impl External {
    /// crun refuses to work with the control groups of hybrid hosts, and can be told to leave them alone. Its containers
    /// are then made as native ones are: it runs in the group that what it makes is to be in.
    fn leaves_groups_to_us(&self) -> bool {
        self.is_crun() && Hierarchies::detect() == Hierarchies::V1
    }

    fn is_crun(&self) -> bool {
        self.program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("crun"))
    }
}

impl OciRuntime for External {
    fn create(&self, launch: Launch<'_>) -> Result<Created, RuntimeError> {
        let Launch { record, dir, root, mounts, network, streams } = launch;
        if record.spec.init {
            return Err(RuntimeError::Unsupported(format!(
                "an init is part of the native runtime only, and the container is made by {}",
                self.program.display()
            )));
        }
        let identity = Identity::resolve(record, root)?;
        let plan = spec::plan(record, &identity)?;
        let devices = devices::resolve(&record.spec.security.devices, record.spec.security.privileged)?;
        let host_root = host::is_host_root();
        let resources = &record.spec.resources;
        let (group, prepared) = if self.leaves_groups_to_us() {
            let prepared = cgroup::create(&record.id, resources, devices.rules.as_deref(), host_root)?;
            (prepared.as_ref().map(|prepared| prepared.cgroup.clone()), prepared)
        } else {
            (cgroup::left_to_runtime(&record.id, resources, host_root)?, None)
        };
        let runtime_makes_cgroup = prepared.is_none();
        let makes_no_group = group.is_none() || prepared.is_some();
        let call = Call { external: self, record, dir, join: prepared, makes_no_group };
        let made = seccomp::policy(record, plan.capabilities)
            .and_then(|seccomp| {
                spec::build(&Ingredients {
                    record,
                    root,
                    mounts: &mounts,
                    network: &network,
                    process: &plan,
                    devices: &devices,
                    cgroup: group.as_ref(),
                    runtime_makes_cgroup,
                    seccomp,
                    user_namespace: host::in_user_namespace(),
                })
            })
            .and_then(|config| call.create(&config, &plan.args[0], streams));
        let (pid, terminal) = match made {
            Ok(made) => made,
            Err(error) => {
                // The first error is the one to tell.
                let _ = call.remove_state();
                let _ = group.map(|group| group.kill().and_then(|()| group.remove()));
                return Err(error);
            }
        };
        Ok(Created {
            process: pid,
            terminal,
            cgroup: group.map(|group| group.path().to_owned()),
            waiting: Waiting::External {
                program: self.program.clone(),
                dir: dir.clone(),
                record: Box::new(record.clone()),
            },
        })
    }

    fn exec(
        &self,
        record: &InstanceRecord,
        dir: &InstanceDir,
        exec: &ExecSpec,
        streams: Streams,
    ) -> Result<Executed, RuntimeError> {
        let target =
            record.process.ok_or_else(|| RuntimeError::Invalid("the container does not run".into()))?;
        let root = PathBuf::from(format!("/proc/{}/root", target.pid));
        let who = exec.user.as_deref().unwrap_or(&record.spec.process.user);
        let user = kiln_accounts::resolve(&root, who, &record.spec.process.groups)?;
        let plan = spec::exec_plan(record, exec, user, spec::exec_capabilities(record, exec)?)?;
        let process = tempfile::NamedTempFile::new_in(dir.runtime_state()).map_err(|source| {
            RuntimeError::Io { doing: "make a file in", path: dir.runtime_state(), source }
        })?;
        write_json(process.path(), &plan.to_oci()?)?;
        let group = record.cgroup.as_deref().filter(|_| self.leaves_groups_to_us());
        let join = group.map(|path| cgroup::existing(&Cgroup::at(path)));
        let makes_no_group = record.cgroup.is_none() || join.is_some();
        let call = Call { external: self, record, dir, join, makes_no_group };
        let (process, terminal) = call.spawn("exec", &plan.args[0], streams, |command| {
            command.arg("--detach").arg("--process").arg(process.path());
        })?;
        Ok(Executed { process, terminal })
    }

    fn brings_up_loopback(&self) -> bool {
        false
    }

    fn delete(&self, record: &InstanceRecord, dir: &InstanceDir) -> Result<(), RuntimeError> {
        let removed =
            Call { external: self, record, dir, join: None, makes_no_group: record.cgroup.is_none() }
                .remove_state();
        if let Some(path) = &record.cgroup {
            let cgroup = Cgroup::at(path);
            cgroup.kill()?;
            cgroup.remove()?;
        }
        removed
    }
}

/// Lets a created container go on.
pub(super) fn start(program: &Path, dir: &InstanceDir, record: &InstanceRecord) -> Result<(), RuntimeError> {
    let external = External { program: program.to_owned() };
    let call = Call { external: &external, record, dir, join: None, makes_no_group: record.cgroup.is_none() };
    let log = call.log()?;
    let mut command = call.command("start", log.path());
    command.arg(record.id.as_str()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let command_name = record.spec.process.args.first().map_or("", String::as_str);
    call.run("start", command_name, &mut command, log.path())
}

/// A call of the program for one instance.
struct Call<'a> {
    external: &'a External,
    record: &'a InstanceRecord,
    dir: &'a InstanceDir,
    /// The control group in which the program is to run, and so what it makes.
    join: Option<Prepared>,
    /// The program is to make no control group: there can be none, or there is one.
    makes_no_group: bool,
}

impl Call<'_> {
    fn program(&self) -> String {
        self.external.program.display().to_string()
    }

    fn log(&self) -> Result<tempfile::NamedTempFile, RuntimeError> {
        tempfile::NamedTempFile::new_in(self.dir.runtime_state()).map_err(|source| RuntimeError::Io {
            doing: "make a log file in",
            path: self.dir.runtime_state(),
            source,
        })
    }

    fn command(&self, verb: &str, log: &Path) -> Command {
        let mut command = Command::new(&self.external.program);
        command.arg("--root").arg(self.dir.runtime_state());
        command.arg("--log").arg(log).args(["--log-format", "json"]);
        if self.external.is_crun() && self.makes_no_group {
            command.arg("--cgroup-manager=disabled");
        }
        if self.external.is_crun() && is_hybrid_with_controllers() {
            // SAFETY: system calls only, in a process of one thread.
            unsafe { command.pre_exec(hide_unified) };
        }
        // SAFETY: a system call only.
        unsafe { command.pre_exec(unblock_signals) };
        command.arg(verb);
        command
    }

    fn create(
        &self,
        config: &oci_spec::runtime::Spec,
        command_name: &str,
        streams: Streams,
    ) -> Result<(kiln_contract::ProcessId, Option<OwnedFd>), RuntimeError> {
        let bundle = self.dir.bundle();
        for directory in [&bundle, &self.dir.runtime_state()] {
            make_directory(directory)?;
        }
        write_json(&bundle.join("config.json"), config)?;
        self.spawn("create", command_name, streams, |command| {
            command.arg("--bundle").arg(&bundle);
        })
    }

    /// Runs a verb that makes a process with `streams`.
    fn spawn(
        &self,
        verb: &'static str,
        command_name: &str,
        streams: Streams,
        more: impl FnOnce(&mut Command),
    ) -> Result<(kiln_contract::ProcessId, Option<OwnedFd>), RuntimeError> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(|errno| {
            RuntimeError::System { doing: "adopt the container's process", source: errno.into() }
        })?;
        let log = self.log()?;
        let pid_file = tempfile::NamedTempFile::new_in(self.dir.runtime_state()).map_err(|source| {
            RuntimeError::Io { doing: "make a file in", path: self.dir.runtime_state(), source }
        })?;
        let mut command = self.command(verb, log.path());
        command.arg("--pid-file").arg(pid_file.path());
        more(&mut command);
        let console = match streams {
            Streams::Pipes { stdin, stdout, stderr } => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
                None
            }
            Streams::Terminal { size } => {
                let console = Console::listen(&self.dir.runtime_state())?;
                command.arg("--console-socket").arg(&console.path);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                Some((console, size))
            }
        };
        command.arg(self.record.id.as_str());
        if let Some(join) = self.join.clone() {
            // SAFETY: opens and writes to files whose names are ready, in a process of one thread.
            unsafe { command.pre_exec(move || join.join()) };
        }
        self.run(verb, command_name, &mut command, log.path())?;
        // The command holds the container's ends of the pipes, whose end nobody would see.
        drop(command);
        let terminal = console.map(|(console, size)| console.receive(size)).transpose()?;
        let text = fs::read_to_string(pid_file.path()).unwrap_or_default();
        let process =
            text.trim().parse().ok().and_then(host::process_id).ok_or_else(|| RuntimeError::Runtime {
                runtime: self.program(),
                doing: verb,
                reason: format!("it named no process (`{}`)", text.trim()),
            })?;
        Ok((process, terminal))
    }

    fn run(
        &self,
        verb: &'static str,
        command_name: &str,
        command: &mut Command,
        log: &Path,
    ) -> Result<(), RuntimeError> {
        let status = command.status().map_err(|source| RuntimeError::Io {
            doing: "run",
            path: self.external.program.clone(),
            source,
        })?;
        if status.success() {
            return Ok(());
        }
        self.reap_remains();
        let reason = last_words(&fs::read_to_string(log).unwrap_or_default())
            .unwrap_or_else(|| format!("it ended with {status}"));
        Err(explain(&self.program(), verb, command_name, reason))
    }

    /// Reaps what the program left to this process when it failed. Nobody else would, and the kernel lets the first
    /// process of a container end only after all others were reaped.
    fn reap_remains(&self) {
        let name = self.external.program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for pid in ended_children() {
            let Ok(command) = fs::read_to_string(format!("/proc/{pid}/comm")) else { continue };
            // As the program calls itself, `runc:[2:INIT]` for one; the kernel keeps 15 bytes.
            let command = command.trim_end();
            if command.split(':').next().is_some_and(|own| !own.is_empty() && name.starts_with(own)) {
                reap(pid);
            }
        }
    }

    /// Makes the program forget the instance.
    fn remove_state(&self) -> Result<(), RuntimeError> {
        if !self.dir.runtime_state().join(self.record.id.as_str()).exists() {
            return Ok(());
        }
        let log = self.log()?;
        let mut command = self.command("delete", log.path());
        command.args(["--force", self.record.id.as_str()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.run("delete", "", &mut command, log.path())
    }
}

/// A socket to which the program sends the terminal's master.
struct Console {
    listener: UnixListener,
    path: PathBuf,
    file: PathBuf,
    /// Keeps `path` alive.
    _directory: OwnedFd,
}

impl Console {
    fn listen(directory: &Path) -> Result<Self, RuntimeError> {
        let name = format!("console-{}.sock", std::process::id());
        let file = directory.join(&name);
        let failed =
            |source| RuntimeError::Io { doing: "make a socket at", path: directory.join(&name), source };
        let handle: OwnedFd = File::open(directory).map_err(failed)?.into();
        // A socket's path may have 107 bytes; this way every path is short, for the program too.
        let path =
            PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), handle.as_raw_fd())).join(&name);
        let _ = fs::remove_file(&file);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        Ok(Self { listener, path, file, _directory: handle })
    }

    /// The program has ended well, so it has connected.
    fn receive(self, size: Option<(u16, u16)>) -> Result<OwnedFd, RuntimeError> {
        let mut ready = [PollFd::new(&self.listener, PollFlags::IN)];
        let failed =
            |source| RuntimeError::Io { doing: "receive a terminal at", path: self.file.clone(), source };
        let patience = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        if poll(&mut ready, Some(&patience)).map_err(|errno| failed(errno.into()))? == 0 {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        let (stream, _) = self.listener.accept().map_err(failed)?;
        receive_terminal(stream.as_fd(), size)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// Children of this process that have ended and were not waited for.
fn ended_children() -> Vec<u32> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
        })
        .collect()
}

/// The v2 hierarchy of a hybrid host.
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// A v2 hierarchy beside those of v1 that has controllers of its own.
fn is_hybrid_with_controllers() -> bool {
    fs::read(Path::new(UNIFIED).join("cgroup.controllers")).is_ok_and(|text| !text.trim_ascii().is_empty())
}

/// Signals that the supervisor takes as events are blocked in it; a runtime, and so the workload, would inherit that and
/// never hear a SIGTERM.
fn unblock_signals() -> io::Result<()> {
    nix::sys::signal::SigSet::empty().thread_set_mask().map_err(io::Error::from)
}

/// crun refuses such hosts altogether, even if it is to leave groups alone: it gets not to see what it dislikes.
fn hide_unified() -> io::Result<()> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    // SAFETY: only this process, which is about to become another program, has the new namespace.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    mount("tmpfs", UNIFIED, "tmpfs", MountFlags::RDONLY, None)?;
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), RuntimeError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| RuntimeError::Io {
        doing: "make",
        path: path.to_owned(),
        source,
    })
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), RuntimeError> {
    serde_json::to_vec(value)
        .map_err(io::Error::from)
        .and_then(|bytes| fs::write(path, bytes))
        .map_err(|source| RuntimeError::Io { doing: "write", path: path.to_owned(), source })
}

/// The last error in a log of JSON lines.
fn last_words(log: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        #[serde(default)]
        level: String,
        msg: String,
    }
    log.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| line.level.is_empty() || line.level == "error" || line.level == "fatal")
        .map(|line| line.msg)
}

/// What is wrong with the command is told apart from everything else by the program's words alone.
fn explain(program: &str, verb: &'static str, command_name: &str, reason: String) -> RuntimeError {
    let command = command_name.to_owned();
    let lower = reason.to_lowercase();
    let about_command = ["exec", "executable", "entrypoint"].iter().any(|word| lower.contains(word));
    let missing = lower.contains("not found in $path") || lower.contains("no such file or directory");
    let refused = ["permission denied", "exec format error", "is a directory", "operation not permitted"]
        .into_iter()
        .find(|text| lower.contains(text));
    match (about_command && !command.is_empty(), missing, refused) {
        (true, true, _) => RuntimeError::CommandNotFound { command },
        (true, false, Some(reason)) => {
            RuntimeError::CommandNotExecutable { command, reason: reason.to_owned() }
        }
        _ => RuntimeError::Runtime { runtime: program.to_owned(), doing: verb, reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_about_the_command_are_told_apart() {
        let explain = |reason: &str| explain("runc", "create", "cmd", reason.to_owned());
        let missing = [
            "runc create failed: unable to start container process: exec: \"cmd\": executable file not found in $PATH",
            "executable file `cmd` not found in $PATH: No such file or directory",
            "unable to start container process: exec: \"/cmd\": stat /cmd: no such file or directory",
        ];
        for reason in missing {
            assert!(matches!(explain(reason), RuntimeError::CommandNotFound { .. }), "{reason}");
        }
        let refused = [
            "unable to start container process: exec: \"/etc/passwd\": permission denied",
            "open executable: Permission denied",
            "open executable: Operation not permitted",
            "exec /x: exec format error",
        ];
        for reason in refused {
            assert!(matches!(explain(reason), RuntimeError::CommandNotExecutable { .. }), "{reason}");
        }
        let other = "mount /x: no such file or directory";
        assert!(matches!(explain(other), RuntimeError::Runtime { reason, .. } if reason == other));
    }

    #[test]
    fn the_last_error_of_a_log_counts() {
        let log = "{\"level\":\"warning\",\"msg\":\"a\"}\n{\"level\":\"error\",\"msg\":\"b\"}\nnoise\n\
            {\"level\":\"debug\",\"msg\":\"c\"}\n";
        assert_eq!(last_words(log).as_deref(), Some("b"));
        assert_eq!(last_words(""), None);
    }
}
