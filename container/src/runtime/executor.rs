//! The last steps of a container's process before it becomes the workload.
//!
//! `libcontainer` calls [`libcontainer::workload::Executor`] when namespaces, mounts and user are the container's:
//!
//! 1. `validate`: the working directory is made if it is missing, and checked to be the container's; terminals and
//!    pipes become the user's; the process asks to be killed with its supervisor. Errors come back from `create`.
//! 2. `exec`: waits for the byte that `start` sends; gives up capabilities; loads the system call filter, as late as it
//!    can be, so that it has only to allow `execve`; looks for the command along the container's `PATH`. Errors go
//!    into a pipe that `execve` closes, so that the caller knows of success too.
//!
//! The filter is loaded before capabilities are given up where the workload may gain privileges: without
//! `no_new_privs` the kernel wants `CAP_SYS_ADMIN` for it.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::Spec;
use rustix::io::Errno;

use super::init_shim;
use super::privileges::{exit, keep_only};
use super::surroundings::{enter_directory, own_streams};
use super::{NATIVE, RuntimeError};
use crate::capabilities::CapabilitySet;
use crate::seccomp::Program;
use crate::spec::ProcessPlan;

/// What is left to do before the command runs.
#[derive(Debug)]
pub(super) struct Workload {
    command: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    /// Where to look for a command without a slash.
    path: Vec<String>,
    cwd: PathBuf,
    uid: u32,
    terminal: bool,
    capabilities: CapabilitySet,
    no_new_privileges: bool,
    pub(super) seccomp: Option<Program>,
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
    pub(super) fn new(plan: &ProcessPlan, go: OwnedFd, report: OwnedFd) -> Result<Self, RuntimeError> {
        let text = |text: &String| {
            CString::new(text.as_str()).map_err(|_| {
                RuntimeError::Invalid(format!("`{}` has a NUL byte in it", text.replace('\0', "\\0")))
            })
        };
        let path = plan.env.iter().find_map(|line| line.strip_prefix("PATH=")).unwrap_or_default();
        Ok(Self {
            command: text(&plan.args[0])?,
            args: plan.args.iter().map(text).collect::<Result<_, _>>()?,
            env: plan.env.iter().map(text).collect::<Result<_, _>>()?,
            path: path.split(':').map(str::to_owned).collect(),
            cwd: PathBuf::from(&plan.cwd),
            uid: plan.user.uid,
            terminal: plan.terminal,
            capabilities: plan.capabilities,
            no_new_privileges: plan.no_new_privileges,
            seccomp: None,
            init: false,
            loopback: false,
            go,
            report,
        })
    }
}

/// How an error after `go` reads in the pipe: a byte for its kind, then its text.
const NOT_FOUND: u8 = b'N';
const NOT_EXECUTABLE: u8 = b'X';
const OTHER: u8 = b'E';

/// Reads what a process of `command` reported until it became its command.
pub(super) fn read_report(report: OwnedFd, command: &str) -> Result<(), RuntimeError> {
    let mut bytes = Vec::new();
    File::from(report).read_to_end(&mut bytes).map_err(|source| RuntimeError::System {
        doing: "read what the container's process reports",
        source,
    })?;
    let command = command.to_owned();
    let reason = String::from_utf8_lossy(bytes.get(1..).unwrap_or_default()).into_owned();
    match bytes.first() {
        None => Ok(()),
        Some(&NOT_FOUND) => Err(RuntimeError::CommandNotFound { command }),
        Some(&NOT_EXECUTABLE) => Err(RuntimeError::CommandNotExecutable { command, reason }),
        Some(_) => Err(RuntimeError::Runtime { runtime: NATIVE.into(), doing: "start", reason }),
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
        enter_directory(&self.cwd)?;
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
            // Signals are passed on to a child that may become another user.
            let needed = self.capabilities.common(CapabilitySet::KILL);
            init_shim::become_parent_of(self.terminal, || keep_only(needed));
        }
        let (kind, text) = match self.restrict() {
            Err(text) => (OTHER, text),
            Ok(()) => self.execute(),
        };
        let _ = File::from(self.report.try_clone().unwrap_or_else(|_| exit(1)))
            .write_all(&[&[kind], text.as_bytes()].concat());
        exit(if kind == NOT_FOUND { 127 } else { 126 })
    }

    /// Gives up what the workload is not to have.
    fn restrict(&self) -> Result<(), String> {
        let load = || match &self.seccomp {
            Some(program) => {
                program.load().map_err(|error| format!("cannot load the system call filter: {error}"))
            }
            None => Ok(()),
        };
        let drop =
            || keep_only(self.capabilities).map_err(|errno| format!("cannot give up capabilities: {errno}"));
        if self.no_new_privileges {
            drop()?;
            load()
        } else {
            load()?;
            drop()
        }
    }

    /// Becomes the command; returns why it could not.
    fn execute(&self) -> (u8, String) {
        let name = self.command.to_bytes();
        if name.contains(&b'/') {
            return self.explain(self.try_execute(&self.command), &self.command);
        }
        let mut refused = None;
        for directory in &self.path {
            let directory = if directory.is_empty() { "." } else { directory };
            let Ok(path) = CString::new([directory.as_bytes(), b"/", name].concat()) else { continue };
            match self.try_execute(&path) {
                Errno::NOENT if !exists(&path) => {}
                Errno::NOTDIR => {}
                // As execvp(3): what may not be executed is passed over, and told of if nothing else is found.
                Errno::ACCESS => refused = refused.or(Some(path)),
                errno => return self.explain(errno, &path),
            }
        }
        match refused {
            Some(path) => self.explain(Errno::ACCESS, &path),
            None => (NOT_FOUND, String::new()),
        }
    }

    fn explain(&self, errno: Errno, path: &CStr) -> (u8, String) {
        let text = match errno {
            Errno::NOENT | Errno::NOTDIR if !exists(path) => return (NOT_FOUND, String::new()),
            Errno::NOENT => "the interpreter that it names is not in the container".to_owned(),
            Errno::ACCESS if is_directory(path) => "it is a directory".to_owned(),
            Errno::ACCESS => "permission denied".to_owned(),
            Errno::NOEXEC => {
                "it is neither a program for this processor nor a script that names its interpreter"
                    .to_owned()
            }
            other => io::Error::from(other).to_string(),
        };
        (NOT_EXECUTABLE, text)
    }

    fn try_execute(&self, path: &CStr) -> Errno {
        let pointers = |texts: &[CString]| {
            texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        // SAFETY: both arrays end with null and point to texts that outlive the call.
        unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
    }
}

fn metadata(path: &CStr) -> io::Result<fs::Metadata> {
    fs::metadata(Path::new(std::ffi::OsStr::new(&*path.to_string_lossy())))
}

fn exists(path: &CStr) -> bool {
    metadata(path).is_ok()
}

fn is_directory(path: &CStr) -> bool {
    metadata(path).is_ok_and(|metadata| metadata.is_dir())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_come_back_as_the_errors_that_decide_exit_codes() {
        let read = |bytes: &[u8]| {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            File::from(writer).write_all(bytes).unwrap();
            read_report(reader, "cmd")
        };
        assert!(read(b"").is_ok());
        assert!(matches!(read(b"N"), Err(RuntimeError::CommandNotFound { command }) if command == "cmd"));
        assert!(
            matches!(read(b"Xwhy"), Err(RuntimeError::CommandNotExecutable { reason, .. }) if reason == "why")
        );
        assert!(matches!(read(b"Ewhy"), Err(RuntimeError::Runtime { reason, .. }) if reason == "why"));
    }
}
