//! Further processes in a running machine.

use kiln_contract::{
    BackendError, ErrorKind, ExecSpec, ExitStatus, InstanceDir, InstanceId, InstanceRecord, ProcessId, Stdio,
};
use kiln_instance::streams::Streams;
use kiln_instance::terminal::{self, RawTerminal};
use kiln_instance::{DetachKeys, Instances, process};
use kiln_link::message::{self, Input, Output, Process, TerminalSize};
use kiln_link::service;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::carry::{End, Event, carry};
use crate::life::{lost, refused};
use crate::{door, plan, stream};

/// What a process of an `exec` is started as.
fn process_of(
    record: &InstanceRecord,
    spec: &ExecSpec,
    size: Option<(u16, u16)>,
) -> Result<Process, BackendError> {
    let own = &record.spec.process;
    let mut env = own.env.clone();
    for variable in &spec.env {
        let name = variable.split('=').next().unwrap_or_default();
        env.retain(|other| other.split('=').next() != Some(name));
        env.push(variable.clone());
    }
    let (rows, columns) = size.unwrap_or((24, 80));
    let mut confined = plan::confined(&record.spec)?;
    if spec.privileged {
        confined.capabilities = None;
    }
    Ok(Process {
        args: spec.args.clone(),
        env: plan::with_defaults(&env, spec.tty),
        cwd: spec.cwd.clone().unwrap_or_else(|| own.cwd.clone()),
        user: spec.user.clone().unwrap_or_else(|| own.user.clone()),
        groups: own.groups.clone(),
        terminal: spec.tty.then_some(TerminalSize { rows, columns }),
        stdin: spec.stdin,
        ..confined
    })
}

/// Starts a process; the stream then carries it.
async fn begin(dir: &InstanceDir, process: Process) -> Result<UnixStream, BackendError> {
    let mut stream = door::dial(dir, service::PROCESS).await?;
    // Nobody asks for it by its number.
    let number = random_number()?;
    message::send(&mut stream, &Input::Start { number, process: Box::new(process) }).await.map_err(lost)?;
    match message::receive(&mut stream).await.map_err(lost)? {
        Some(Output::Started) => Ok(stream),
        Some(Output::Failed(failure)) => Err(refused(&failure)),
        _ => Err(BackendError::new(ErrorKind::Failed, "the guest does not start the process")),
    }
}

fn random_number() -> Result<u32, BackendError> {
    let drawn = getrandom::u32().map_err(|error| {
        BackendError::new(ErrorKind::Failed, format!("cannot draw random bytes: {error}"))
    })?;
    // The lowest are the workload's and whatever comes to be named.
    Ok(drawn | 1 << 16)
}

/// Runs a process with the caller's streams.
pub(crate) fn exec(
    record: &InstanceRecord,
    dir: &InstanceDir,
    spec: &ExecSpec,
    stdio: Stdio,
) -> Result<Option<ExitStatus>, BackendError> {
    let keys = DetachKeys::parse(&spec.detach_keys)?;
    // Only somebody at a terminal types them: what comes from a file may hold the same bytes.
    let keys = if spec.tty { keys } else { DetachKeys::default() };
    let size = terminal::size_of(&stdio);
    let runtime = stream::runtime()?;
    let ended = runtime.block_on(async {
        let stream = begin(dir, process_of(record, spec, size)?).await?;
        if spec.detach {
            return Ok(None);
        }
        let fail = |error| BackendError::caused("cannot use the terminal", error);
        let raw = if spec.tty && spec.stdin { RawTerminal::enter(&stdio.stdin).map_err(fail)? } else { None };
        let (events, resized) = mpsc::channel(1);
        let watched = stdio.stdout.try_clone().map_err(fail)?;
        let mut changes = signal(SignalKind::window_change()).map_err(fail)?;
        let watching = tokio::spawn(async move {
            use std::os::fd::AsFd as _;
            while changes.recv().await.is_some() {
                if let Some((rows, columns)) = terminal::size([watched.as_fd()]) {
                    let _ = events.send(Event::Resized(TerminalSize { rows, columns })).await;
                }
            }
        });
        let ended = carry(stream, stdio, spec.stdin, keys, resized).await;
        watching.abort();
        drop(raw);
        ended.map(Some)
    });
    runtime.shutdown_background();
    Ok(match ended? {
        Some(End::Exited(code)) => {
            Some(ExitStatus { code, out_of_memory: false, at: jiff::Timestamp::now(), error: None })
        }
        Some(End::Detached) | None => None,
    })
}

/// Starts a process as a child of this one, whose exit code is that process's: this program's own `exec`.
pub(crate) fn spawn(
    instances: &Instances,
    id: &InstanceId,
    spec: &ExecSpec,
    streams: Streams,
) -> Result<ProcessId, BackendError> {
    let Streams::Pipes { stdin, stdout, stderr } = streams else {
        return Err(BackendError::unsupported("a check of a machine's health has no terminal"));
    };
    let fail = |error| BackendError::caused("cannot start a check of the machine's health", error);
    let program = process::program().map_err(fail)?;
    let mut command = std::process::Command::new(program);
    command.args(["exec", id.as_str()]).args(&spec.args).env("KILN_HOME", instances.home().path());
    let child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().map_err(fail)?;
    process::identify(child.id())
        .ok_or_else(|| BackendError::new(ErrorKind::Failed, "the check ended before it began"))
}
