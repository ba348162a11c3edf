//! The last steps of the first process of a container before it becomes the workload.
//!
//! `libcontainer` calls [`libcontainer::workload::Executor`] when namespaces, mounts and user are the container's:
//!
//! 1. `validate`: the working directory is made if it is missing, and checked to be the container's; terminals and
//!    pipes become the user's; the process asks to be killed with its supervisor. Errors come back from `create`.
//! 2. `exec`: waits for the byte that `start` sends, gives up capabilities, and becomes the [`Launcher`], which loads the
//!    system call filter, as late as it can be, so that it has only to allow `execve`; and looks for the command along
//!    the container's `PATH`. Errors go into a pipe that `execve` closes, so that the caller knows of success too.
//!
//! Until then nobody else is in the container who could look into this process. With `--init` it forks first, and
//! becomes the launcher twice: process 1 reaps and passes signals on, its child becomes the command. The child waits until
//! process 1 is done: a command that finds it half made could look into Kiln through it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::Spec;
use rustix::pipe::{PipeFlags, pipe_with};

use super::RuntimeError;
use super::launcher::{Launcher, Part};
use super::privileges::exit;
use super::surroundings::{enter_directory, own_streams};
use crate::capabilities::CapabilitySet;
use crate::seccomp::Program;
use crate::spec::ProcessPlan;

/// What is left to do before the command runs.
#[derive(Debug)]
pub(super) struct Workload {
    launcher: Launcher,
    cwd: PathBuf,
    uid: u32,
    terminal: bool,
    capabilities: CapabilitySet,
    /// Process 1 is an init of ours, and the command its child.
    pub(super) init: bool,
    /// The network is new, and its loopback interface to be set up.
    pub(super) loopback: bool,
    /// A byte comes when the command may run; end of file means that nobody wants it any more.
    pub(super) go: OwnedFd,
    /// Where errors after `go` are written to; closed by `execve`.
    pub(super) report: OwnedFd,
}

impl Workload {
    /// The workload of `plan`; `go` and `report` are the container's ends of their pipes.
    pub(super) fn new(
        plan: &ProcessPlan,
        seccomp: Option<Program>,
        go: OwnedFd,
        report: OwnedFd,
    ) -> Result<Self, RuntimeError> {
        Ok(Self {
            launcher: Launcher::new(plan, seccomp)?,
            cwd: PathBuf::from(&plan.cwd),
            uid: plan.user.uid,
            terminal: plan.terminal,
            capabilities: plan.capabilities,
            init: false,
            loopback: false,
            go,
            report,
        })
    }
}

/// [`Workload`] as `libcontainer` wants it.
#[derive(Clone)]
pub(super) struct WorkloadExecutor(pub(super) Rc<Workload>);

impl Executor for WorkloadExecutor {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        self.0.prepare().map_err(ExecutorValidationError::ArgValidationError)
    }

    /// The environment goes to `execve` as it is: this process must not read it.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        self.0.run()
    }
}

impl Workload {
    fn prepare(&self) -> Result<(), String> {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(|errno| format!("cannot ask to be killed with the supervisor: {errno}"))?;
        if self.loopback {
            set_loopback_up().map_err(|error| format!("cannot set the loopback interface up: {error}"))?;
        }
        enter_directory(&self.cwd, true)?;
        own_streams(self.uid, self.terminal);
        Ok(())
    }

    fn run(&self) -> ! {
        let mut go = [0];
        match rustix::io::read(&self.go, &mut go) {
            Ok(1) => {}
            // Whoever made this process is gone.
            _ => exit(1),
        }
        if self.init {
            let Ok((confined, ready)) = pipe_with(PipeFlags::CLOEXEC) else { exit(126) };
            if let Some(child) = become_parent(self.terminal) {
                // Signals are passed on to a child that may become another user.
                let keep = self.capabilities.common(CapabilitySet::KILL);
                self.launcher.run(Part::Init { child, ready: ready.as_fd() }, keep)
            }
            drop(ready);
            // The end of the pipe. If it comes because process 1 failed, its end is this process's, too.
            let _ = rustix::io::retry_on_intr(|| rustix::io::read(&confined, &mut go));
        }
        self.launcher.run(Part::Command { report: self.report.as_fd() }, self.capabilities)
    }
}

/// Forks: `None` in the new child, which is to be the workload. In its parent, which is to be init, all signals are
/// blocked: they are its to pass on.
fn become_parent(terminal: bool) -> Option<i32> {
    // SAFETY: plain calls on sets that live on the stack; this process has one thread, so that the child's memory is
    // whole.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before = all;
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        match libc::fork() {
            -1 => exit(126),
            0 => {
                // A process group of its own, so that signals that a terminal sends reach it once.
                libc::setpgid(0, 0);
                if terminal {
                    // SIGTTOU, which this would raise in a background group, is blocked.
                    libc::tcsetpgrp(0, libc::getpgrp());
                }
                libc::sigprocmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
                None
            }
            child => Some(child),
        }
    }
}

/// Sets the interface `lo` of this process's network up, as every OCI runtime does.
fn set_loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all zeros are an interface request of no name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: this request takes a pointer to such a structure, which outlives the call.
    let result = unsafe {
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS, &raw const request)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
