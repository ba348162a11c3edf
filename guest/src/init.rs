//! PID 1: starts the agent, reaps, and does for it what only PID 1 can.
//!
//! ```text
//! agent                        PID 1
//!   |-- SWITCH ------------------>|  moves the root to / and into it
//!   |<-------- empty, or an error |
//!   |-- EXECUTE, Process -------->|  becomes a system's init; the socket closes
//!   |<------------------ an error |  unless that failed
//! ```

use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use kiln_link::message::{self, Process};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::failure::{Doing as _, Failure, say};
use crate::{agent, cgroup, modules, root};

/// First byte of a message: the root is ready.
const SWITCH: u8 = b'S';
/// First byte of a message: a system's init is to be executed.
const EXECUTE: u8 = b'E';
/// The longest message: arguments and environment.
const LONGEST: usize = 256 << 10;

/// Never returns: when the agent is gone, so is the machine.
pub(crate) fn main() -> ExitCode {
    if let Err(failure) = run() {
        say(failure);
    }
    rustix::fs::sync();
    let _ = crate::told::off();
    ExitCode::FAILURE
}

fn run() -> Result<(), Failure> {
    mount_basics()?;
    modules::load()?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .doing("make a socket for the agent")?;
    // The `@` tells a system's init to leave the process alone when it ends all others.
    Command::new("/init")
        .arg0("@kiln-guest")
        .arg(agent::ARGUMENT)
        .stdin(Stdio::from(theirs))
        .spawn()
        .doing("start the agent")?;
    // SAFETY: no handler is installed, and this process has one thread. With the signal ignored, the kernel reaps for us.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    serve(&ours)
}

fn mount_basics() -> Result<(), Failure> {
    for (kind, target) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("cgroup2", cgroup::MOUNT)]
    {
        std::fs::create_dir_all(target).doing(format_args!("make {target}"))?;
        mount(kind, target, kind, MountFlags::empty(), None)
            .doing(format_args!("mount {kind} at {target}"))?;
    }
    Ok(())
}

fn serve(agent: &OwnedFd) -> Result<(), Failure> {
    let mut buffer = vec![0; LONGEST];
    loop {
        let (count, _) = rustix::io::retry_on_intr(|| recv(agent, &mut buffer[..], RecvFlags::empty()))
            .doing("hear the agent")?;
        let outcome = match buffer[..count].split_first() {
            None => return Err(crate::failure::invalid("the agent has ended")),
            Some((&SWITCH, _)) => switch_root(),
            Some((&EXECUTE, process)) => execute(process),
            Some(_) => Err(crate::failure::invalid("the agent made no sense")),
        };
        let words = outcome.err().map(|failure| failure.what).unwrap_or_default();
        // A packet of no bytes would look like the end.
        send(agent, format!(".{words}").as_bytes(), SendFlags::empty()).doing("answer the agent")?;
    }
}

/// Moves the mounted root to `/`, and this process into it.
fn switch_root() -> Result<(), Failure> {
    rustix::process::chdir(root::MOUNT).doing("enter the root")?;
    mount_move(".", "/").doing("move the root to /")?;
    rustix::process::chroot(".").doing("change the root")?;
    rustix::process::chdir("/").doing("enter the root")
}

/// Becomes a system's init. Returns only if it cannot.
fn execute(process: &[u8]) -> Result<(), Failure> {
    let process: Process = message::decode(process).doing("read what to execute")?;
    let (program, arguments) =
        process.args.split_first().ok_or_else(|| crate::failure::invalid("no command"))?;
    let console =
        std::fs::OpenOptions::new().read(true).write(true).open("/dev/console").doing("open the console")?;
    let end = || console.as_fd().try_clone_to_owned().map(Stdio::from).doing("use the console");
    let mut command = Command::new(program);
    command.args(arguments).env_clear().stdin(end()?).stdout(end()?).stderr(end()?);
    command.envs(process.env.iter().filter_map(|variable| variable.split_once('=')));
    rustix::process::chdir(if process.cwd.is_empty() { "/" } else { &process.cwd })
        .doing("enter the directory")?;
    // SAFETY: as in `run`. What is executed expects the default.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let error = command.exec();
    // SAFETY: as in `run`.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    Err(crate::failure::failed(format_args!("execute {program}"), error))
}

/// The agent's end.
#[derive(Debug)]
pub(crate) struct PidOne(OwnedFd);

impl PidOne {
    /// PID 1, behind this process's standard input.
    pub(crate) fn at_stdin() -> Result<Self, Failure> {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().doing("keep the socket to PID 1")?;
        Ok(Self(socket))
    }

    /// Has the root moved to `/`. The calling process must be in it with its working directory, and follows.
    pub(crate) fn switch_root(&self) -> Result<(), Failure> {
        rustix::process::chdir(root::MOUNT).doing("enter the root")?;
        self.ask(&[SWITCH])?;
        rustix::process::chroot(".").doing("change the root")?;
        rustix::process::chdir("/").doing("enter the root")
    }

    /// Has a system's init executed.
    pub(crate) fn execute(&self, process: &Process) -> Result<(), Failure> {
        let program = process.args.first().map_or("", String::as_str);
        CString::new(program).doing("name the init")?;
        if !Path::new(program).is_absolute() {
            return Err(crate::failure::invalid(format!("`{program}` is no init: its path is not absolute")));
        }
        let mut words = vec![EXECUTE];
        words.extend(message::encode(process));
        self.ask(&words)
    }

    /// Asks; success is an empty answer, or the end of the socket: then the process is another program.
    fn ask(&self, words: &[u8]) -> Result<(), Failure> {
        send(&self.0, words, SendFlags::NOSIGNAL).doing("speak to PID 1")?;
        let mut buffer = [0; 4096];
        let (count, _) = rustix::io::retry_on_intr(|| recv(&self.0, &mut buffer[..], RecvFlags::empty()))
            .doing("hear PID 1")?;
        match &buffer[..count] {
            [] | [_] => Ok(()),
            [_, words @ ..] => Err(crate::failure::invalid(String::from_utf8_lossy(words))),
        }
    }
}
