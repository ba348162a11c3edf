//! A further process in a running container, with the command that asked for it as its parent.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use jiff::Timestamp;
use kiln_contract::{
    BackendError, ExecSpec, ExitStatus, InstanceDir, InstanceRecord, LogStream, ProcessId, Stdio,
};
use kiln_instance::signals::{self, Signals};
use kiln_instance::streams::{Ends, null, set_nonblocking};
use kiln_instance::terminal::{self, RawTerminal};
use kiln_instance::{DetachKeys, process};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};

use crate::runtime::{self, Streams};

/// Runs it, with the caller's streams for its own; how it ended, or `None` if the caller does not wait for that (any
/// more).
pub(crate) fn exec(
    record: &InstanceRecord,
    dir: &InstanceDir,
    spec: &ExecSpec,
    stdio: Stdio,
) -> Result<Option<ExitStatus>, BackendError> {
    let fail = |error: io::Error| BackendError::caused("cannot make the streams of the new process", error);
    let keys = DetachKeys::parse(&spec.detach_keys)?;
    let runtime = runtime::choose(&record.spec.runtime)?;
    if spec.detach {
        let streams = if spec.tty {
            Streams::Terminal { size: None }
        } else {
            Streams::Pipes {
                stdin: null().map_err(fail)?,
                stdout: null().map_err(fail)?,
                stderr: null().map_err(fail)?,
            }
        };
        let executed = runtime.exec(record, dir, spec, streams)?;
        if let Some(terminal) = executed.terminal {
            keep_open(&terminal).map_err(fail)?;
        }
        return Ok(None);
    }
    // From before the process is there, so that its end is not missed.
    let signals = Signals::take().map_err(fail)?;
    if !spec.tty {
        let stdin = if spec.stdin { stdio.stdin } else { null().map_err(fail)? };
        let streams = Streams::Pipes { stdin, stdout: stdio.stdout, stderr: stdio.stderr };
        let executed = runtime.exec(record, dir, spec, streams)?;
        return wait(executed.process, &signals).map(Some);
    }
    let executed = runtime.exec(record, dir, spec, Streams::Terminal { size: terminal::size_of(&stdio) })?;
    let Some(terminal) = executed.terminal else {
        return wait(executed.process, &signals).map(Some);
    };
    show(executed.process, terminal, &stdio, spec.stdin, keys, signals)
}

/// Waits for a process that has the caller's own streams. Signals that would end the caller are its.
fn wait(process: ProcessId, signals: &Signals) -> Result<ExitStatus, BackendError> {
    loop {
        if let Some(status) = reap(process) {
            return Ok(status);
        }
        let mut fds = [PollFd::from_borrowed_fd(signals.fd().as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                return Err(BackendError::caused("cannot wait for the process", io::Error::from(error)));
            }
        }
        while let Some(signal) = signals.next() {
            if !matches!(signal, libc::SIGCHLD | libc::SIGWINCH) {
                let _ = process::signal(process, signal);
            }
        }
    }
}

/// Shows its terminal until it ends, or the user types the detach keys.
fn show(
    process: ProcessId,
    terminal: OwnedFd,
    stdio: &Stdio,
    stdin: bool,
    mut keys: DetachKeys,
    signals: Signals,
) -> Result<Option<ExitStatus>, BackendError> {
    let fail = |error: io::Error| BackendError::caused("lost the terminal of the process", error);
    set_nonblocking(&terminal).map_err(fail)?;
    let raw = if stdin { RawTerminal::enter(&stdio.stdin).map_err(fail)? } else { None };
    let mut ends = Ends { terminal: Some(terminal), ..Ends::default() };
    let mut input = stdin.then_some(&stdio.stdin);
    let mut stdout = Some(std::fs::File::from(stdio.stdout.try_clone().map_err(fail)?));
    let mut buffer = [0; 16 << 10];
    // So many blocks at the most: what writes faster than it is shown must not keep this from all else.
    // `false` if nobody reads it any more.
    let mut show = |ends: &mut Ends, most: usize| {
        for _ in 0..most {
            let Some(bytes) = ends.read(LogStream::Stdout, &mut buffer) else { break };
            if let Some(Err(error)) = stdout.as_mut().map(|file| io::Write::write_all(file, bytes)) {
                stdout = None;
                if error.kind() == io::ErrorKind::BrokenPipe {
                    return false;
                }
            }
        }
        true
    };
    loop {
        if let Some(status) = reap(process) {
            // More than a terminal holds.
            show(&mut ends, 16);
            return Ok(Some(status));
        }
        let mut fds = vec![PollFd::from_borrowed_fd(signals.fd().as_fd(), PollFlags::IN)];
        if let Some(input) = input.filter(|_| !ends.input.is_full()) {
            fds.push(PollFd::new(input, PollFlags::IN));
        }
        let typed_at = fds.len() - 1;
        if let Some(terminal) = &ends.terminal {
            let flags = if ends.input.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            fds.push(PollFd::new(terminal, flags));
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(fail(error.into())),
        }
        let typed = typed_at > 0 && !fds[typed_at].revents().is_empty();
        drop(fds);
        while let Some(signal) = signals.next() {
            match signal {
                libc::SIGWINCH => {
                    if let (Some(size), Some(terminal)) = (terminal::size_of(stdio), &ends.terminal) {
                        terminal::resize(terminal, size);
                    }
                }
                libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM => {
                    drop(raw);
                    drop(signals);
                    signals::die(signal);
                    return Ok(None);
                }
                _ => {}
            }
        }
        if typed && let Some(fd) = input {
            let mut buffer = [0; 4096];
            match rustix::io::read(fd, &mut buffer) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok(read) if read > 0 => {
                    let (bytes, detach) = keys.filter(&buffer[..read]);
                    ends.input.push(&bytes);
                    if detach {
                        if let Some(terminal) = ends.terminal.take() {
                            keep_open(&terminal).map_err(fail)?;
                        }
                        return Ok(None);
                    }
                }
                _ => input = None,
            }
        }
        ends.write_input();
        if !show(&mut ends, 1) {
            // Its terminal goes with this command, and so does the process.
            drop(raw);
            drop(signals);
            signals::die(libc::SIGPIPE);
            return Ok(None);
        }
    }
}

/// How it ended, if it has.
fn reap(process: ProcessId) -> Option<ExitStatus> {
    let status = match waitpid(process::raw(process.pid), WaitOptions::NOHANG) {
        Ok(Some((_, status))) => status,
        Ok(None) => return None,
        // Not a child of this process after all: all that can be told is that it is gone.
        Err(_) if process::alive(process) => return None,
        Err(_) => return Some(ended(125)),
    };
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some(ended(code)),
        (None, Some(signal)) => Some(ended(128 + signal)),
        _ => None,
    }
}

fn ended(code: i32) -> ExitStatus {
    let code = u8::try_from(code).unwrap_or(u8::MAX);
    ExitStatus { code, out_of_memory: false, at: Timestamp::now(), error: None }
}

/// Leaves a terminal to a process of its own, which reads what nobody sees any more. Without one the terminal would hang
/// up as soon as this command ends, and the process on it with it.
fn keep_open(terminal: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(terminal)?;
    rustix::fs::fcntl_setfl(terminal, flags - rustix::fs::OFlags::NONBLOCK)?;
    // SAFETY: the child makes system calls only, on descriptors and memory that it has, and never returns.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let _ = rustix::process::setsid();
            let mut buffer = [0; 4096];
            // SAFETY: plain system calls. Everything but the terminal is closed, the command's own streams too, whose
            // readers wait for their end; and the process ends without running what belongs to the parent.
            unsafe {
                libc::dup2(std::os::fd::AsRawFd::as_raw_fd(terminal), 0);
                libc::close_range(1, libc::c_uint::MAX, 0);
                loop {
                    let read = libc::read(0, buffer.as_mut_ptr().cast(), buffer.len());
                    if read == 0 || (read < 0 && *libc::__errno_location() != libc::EINTR) {
                        libc::_exit(0);
                    }
                }
            }
        }
        _ => Ok(()),
    }
}
