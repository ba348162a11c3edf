//! The first process of a view that the router shows.
//!
//! It is an ancestor of all that runs in the view and stays for as long as any of that does. Whoever loses its parent
//! gets it for a parent (prctl(2), `PR_SET_CHILD_SUBREAPER`) instead of init, so that also a daemon that has forked twice descends
//! from it and sees the view; and when it has no children left, nobody is in the view any more.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use kiln_contract::{BackendError, ErrorKind};
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::Result;
use super::enter::{PassedOn, run_and_wait};

/// How a command of a view ended.
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    /// Whether something that it started is still there.
    pub(super) others: bool,
}

const KINDS: [ErrorKind; 3] =
    [ErrorKind::Failed, ErrorKind::CommandNotFound, ErrorKind::CommandNotExecutable];

/// Runs a command below a monitor, to whose process `show` shows the view first. This process must have one thread only.
pub(super) fn run(command: &[String], view: &str, show: impl FnOnce(u32) -> Result<()>) -> Result<Ended> {
    let failed = |error: io::Error| BackendError::caused("cannot start the first process of a view", error);
    let (mut ours, theirs) = UnixStream::pair().map_err(failed)?;
    // SAFETY: this process has one thread, so that the child may do everything; it does not return from here.
    match unsafe { fork() }.map_err(|error| failed(error.into()))? {
        ForkResult::Child => {
            drop(ours);
            let watched = std::panic::catch_unwind(|| monitor(command, view, theirs));
            // SAFETY: ends the child without running what the parent has registered for its own end.
            unsafe { libc::_exit(i32::from(!matches!(watched, Ok(Ok(()))))) }
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let passed_on = PassedOn::to(child.as_raw());
            let ran = show(child.as_raw().cast_unsigned()).and_then(|()| {
                let mut told = Vec::new();
                ours.write_all(b"\n").map_err(failed)?;
                (&ours).read_to_end(&mut told).map_err(failed)?;
                parse(&told)
            });
            drop(passed_on);
            // It ends with the socket if it was not to go on.
            drop(ours);
            if !matches!(ran, Ok(Ended { others: true, .. })) {
                let _ = waitpid(child, None);
            }
            ran
        }
    }
}

/// What the monitor tells: a byte, and the status or the error.
fn parse(told: &[u8]) -> Result<Ended> {
    let ended = || BackendError::new(ErrorKind::Failed, "the first process of the view was ended");
    match told.split_first().ok_or_else(ended)? {
        (b'+' | b'-', status) => {
            let status: [u8; 4] = status.try_into().map_err(|_| ended())?;
            let status = ExitStatus::from_raw(i32::from_ne_bytes(status));
            Ok(Ended { status, others: told[0] == b'+' })
        }
        (kind, message) => {
            let kind = KINDS.get(usize::from(*kind)).copied().unwrap_or(ErrorKind::Failed);
            Err(BackendError::new(kind, String::from_utf8_lossy(message)))
        }
    }
}

fn monitor(command: &[String], view: &str, mut socket: UnixStream) -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)?;
    let _ = nix::sys::prctl::set_name(c"kiln-view");
    if socket.read(&mut [0])? == 0 {
        return Ok(());
    }
    let ran = run_and_wait(command, view, |child| {
        let child = Pid::from_raw(child.id().cast_signed());
        loop {
            // Whoever has lost its parent and ended is not kept waiting.
            match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                    return Ok(ExitStatus::from_raw(code << 8));
                }
                Ok(WaitStatus::Signaled(pid, signal, core)) if pid == child => {
                    return Ok(ExitStatus::from_raw(signal as i32 | if core { 0x80 } else { 0 }));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    });
    // Others may wait for the end of what this process holds, and it outlives the command.
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    let others = loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => break true,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => break false,
        }
    };
    let told = match ran {
        Ok(status) => {
            let mark = if others { b"+" } else { b"-" };
            [&mark[..], &status.into_raw().to_ne_bytes()].concat()
        }
        Err(error) => {
            let kind = KINDS.iter().position(|kind| *kind == error.kind()).unwrap_or(0);
            [&[kind as u8][..], error.with_causes().as_bytes()].concat()
        }
    };
    // Nobody may be left to be told.
    let _ = socket.write_all(&told);
    drop(socket);
    crate::fuse::leave_caller(c"kiln-view", &[]);
    loop {
        match waitpid(None, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Ok(()),
        }
    }
}
