//! Sessions: a shell, a command or the subsystem for files, each a process as any other.

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;

use kiln_accounts::User;
use kiln_link::message::{self, Input, MAX_CHUNK, Output, Process, TerminalSize};
use kiln_ssh::{Channel, Closed, Event, Request, Size};
use tokio::io::{AsyncWrite, DuplexStream, ReadHalf};
use tokio::sync::mpsc;

use crate::failure::{Doing as _, Failure, FailureKind};
use crate::process::{self, Attachment, Running};

/// Variables that a client may set.
const MOST_VARIABLES: usize = 128;

/// A session of a user.
pub(super) struct Session {
    pub(super) user: String,
    pub(super) process: Arc<Process>,
    pub(super) group: Arc<OwnedFd>,
}

/// What a client has asked for before it starts something.
#[derive(Default)]
struct Wishes {
    terminal: Option<(String, TerminalSize)>,
    variables: Vec<String>,
}

/// What is to be started.
enum Start {
    Shell,
    Command(String),
    Files,
}

impl Session {
    /// Serves a channel to its end.
    pub(super) async fn serve(self, channel: Channel) {
        let mut wishes = Wishes::default();
        let (start, wants_answer) = loop {
            let (request, wants_answer) = match channel.next(false).await {
                Event::Request(request, wants_answer) => (request, wants_answer),
                Event::Closed => return,
                Event::Data(_) | Event::End => continue,
            };
            match request {
                Request::Shell => break (Start::Shell, wants_answer),
                Request::Command(command) => break (Start::Command(command), wants_answer),
                Request::Subsystem(name) if name == "sftp" => break (Start::Files, wants_answer),
                request => {
                    let good = wishes.hear(request);
                    channel.answer(wants_answer, good);
                }
            }
        };
        let started = match self.process_for(start, wishes) {
            Ok(process) => process::begin(Arc::clone(&self.group), process).await,
            Err(failure) => Err(failure),
        };
        channel.answer(wants_answer, true);
        match started {
            Ok(running) => carry(&channel, running).await,
            Err(failure) => {
                let _ = channel.send_error(format!("{failure}\r\n").as_bytes()).await;
                channel.end();
                channel.exited(match failure.kind {
                    FailureKind::CommandNotFound => 127,
                    FailureKind::CommandNotExecutable => 126,
                    _ => 255,
                });
            }
        }
    }

    fn process_for(&self, start: Start, wishes: Wishes) -> Result<Process, Failure> {
        let user = kiln_accounts::resolve(Path::new("/"), &self.user, &self.process.groups)
            .doing("find the user")?;
        let args = match start {
            Start::Files => vec![super::ITSELF.to_owned(), super::FILES_ARGUMENT.to_owned()],
            Start::Shell => vec![shell(&user).unwrap_or(&user.shell).to_owned(), "-l".to_owned()],
            Start::Command(command) => match shell(&user) {
                Some(shell) => vec![shell.to_owned(), "-c".to_owned(), command],
                // An image without any shell: the words themselves.
                None => command.split_ascii_whitespace().map(str::to_owned).collect(),
            },
        };
        let mut env = self.process.env.clone();
        let home = if Path::new(&user.home).is_dir() { user.home.as_str() } else { "/" };
        set(&mut env, format!("HOME={}", user.home));
        set(&mut env, format!("SHELL={}", user.shell));
        for name in ["USER", "LOGNAME"] {
            set(&mut env, format!("{name}={}", self.user));
        }
        for variable in wishes.variables {
            set(&mut env, variable);
        }
        let terminal = wishes.terminal.map(|(name, size)| {
            set(&mut env, format!("TERM={name}"));
            size
        });
        Ok(Process {
            args,
            env,
            cwd: home.to_owned(),
            user: self.user.clone(),
            terminal,
            stdin: true,
            ..Process::clone(&self.process)
        })
    }
}

/// The user's shell, or what every system has; `None` if there is neither.
fn shell(user: &User) -> Option<&str> {
    [user.shell.as_str(), "/bin/sh"].into_iter().find(|shell| Path::new(shell).exists())
}

/// Sets a variable, over what it was.
fn set(env: &mut Vec<String>, variable: String) {
    let name = variable.split('=').next().unwrap_or_default();
    env.retain(|other| other.split('=').next() != Some(name));
    env.push(variable);
}

fn size_of(size: Size) -> TerminalSize {
    let clamp = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    TerminalSize { rows: clamp(size.rows), columns: clamp(size.columns) }
}

impl Wishes {
    /// Notes a wish; false for what is not granted.
    fn hear(&mut self, request: Request) -> bool {
        match request {
            Request::Terminal { name, size } => {
                let plain = name.bytes().all(|byte| byte.is_ascii_graphic());
                let name = if plain && !name.is_empty() { name } else { "xterm".to_owned() };
                self.terminal = Some((name, size_of(size)));
                true
            }
            Request::Resize(size) => match &mut self.terminal {
                Some((_, known)) => {
                    *known = size_of(size);
                    true
                }
                None => false,
            },
            Request::Variable { name, value } => {
                let first =
                    name.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
                let good = first && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                let good = good && self.variables.len() < MOST_VARIABLES;
                if good {
                    self.variables.push(format!("{name}={value}"));
                }
                good
            }
            _ => false,
        }
    }
}

/// Carries a process's streams until it has ended or the client has gone.
async fn carry(channel: &Channel, running: Running) {
    let Running { pid, attach, ended, terminal } = running;
    let (ours, theirs) = tokio::io::duplex(2 * MAX_CHUNK);
    // It has just been started, and nobody else knows of it.
    if attach.send(Attachment::over(theirs)).await.is_err() {
        return;
    }
    drop(attach);
    let (from_process, to_process) = tokio::io::split(ours);
    let (pieces, waiting) = mpsc::channel(1);
    let signals = |name: &str| {
        if let Some(signal) = number_of(name).filter(|_| ended.borrow().is_none()) {
            hit(pid, signal);
        }
    };
    let code = tokio::select! {
        code = give(channel, from_process) => code,
        () = take(channel, pieces, terminal.as_ref(), signals) => return,
        () = pass_on(to_process, waiting) => return,
    };
    let Ok(code) = code else { return };
    channel.end();
    let status = *ended.borrow();
    match status.and_then(|status| status.signal()).and_then(name_of) {
        Some(name) => channel.killed(name, status.is_some_and(|status: ExitStatus| status.core_dumped())),
        None => channel.exited(code),
    }
}

/// Gives the client what the process writes; the exit code.
async fn give(channel: &Channel, mut from_process: ReadHalf<DuplexStream>) -> Result<u8, Closed> {
    loop {
        match message::receive(&mut from_process).await {
            Ok(Some(Output::Stdout(bytes))) => channel.send(&bytes).await?,
            Ok(Some(Output::Stderr(bytes))) => channel.send_error(&bytes).await?,
            Ok(Some(Output::Exited(code))) => return Ok(code),
            Ok(Some(Output::Started)) => {}
            Ok(Some(Output::Failed(_)) | None) | Err(_) => return Err(Closed),
        }
    }
}

/// Takes what the client sends: data as fast as the process reads it, everything else at once. Returns when the client has gone.
async fn take(
    channel: &Channel,
    pieces: mpsc::Sender<Input>,
    terminal: Option<&OwnedFd>,
    signal: impl Fn(&str),
) {
    let mut pieces = Some(pieces);
    let mut place = None;
    loop {
        let event = tokio::select! {
            event = channel.next(place.is_some()) => event,
            reserved = reserve(pieces.as_ref()), if place.is_none() => match reserved {
                Some(reserved) => { place = Some(reserved); continue }
                None => return,
            },
        };
        match event {
            Event::Data(data) => {
                if let Some(place) = place.take() {
                    place.send(Input::Bytes(data));
                }
            }
            Event::End => {
                if let Some(place) = place.take() {
                    place.send(Input::Close);
                }
                // Nothing more is wanted.
                pieces = None;
            }
            Event::Request(Request::Resize(size), wants_answer) => {
                let done =
                    terminal.is_some_and(|terminal| process::set_size(terminal, size_of(size)).is_ok());
                channel.answer(wants_answer, done);
            }
            Event::Request(Request::Signal(name), wants_answer) => {
                signal(&name);
                channel.answer(wants_answer, true);
            }
            Event::Request(_, wants_answer) => channel.answer(wants_answer, false),
            Event::Closed => return,
        }
    }
}

/// A place for one more piece, that does not borrow; never, after the last.
async fn reserve(pieces: Option<&mpsc::Sender<Input>>) -> Option<mpsc::OwnedPermit<Input>> {
    match pieces {
        Some(pieces) => pieces.clone().reserve_owned().await.ok(),
        None => std::future::pending().await,
    }
}

/// Passes input on, piece by piece. Returns only if the process's task has gone.
async fn pass_on(mut to_process: impl AsyncWrite + Unpin, mut waiting: mpsc::Receiver<Input>) {
    while let Some(input) = waiting.recv().await {
        let sent = match input {
            Input::Bytes(bytes) => send(&mut to_process, &bytes).await,
            other => message::send(&mut to_process, &other).await,
        };
        if sent.is_err() {
            return;
        }
    }
    std::future::pending::<()>().await;
}

async fn send(to_process: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), kiln_link::LinkError> {
    for piece in bytes.chunks(MAX_CHUNK) {
        message::send(to_process, &Input::Bytes(piece.to_vec())).await?;
    }
    Ok(())
}

/// The names that RFC 4254 §6.10 has.
const SIGNALS: [(&str, i32); 13] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("TERM", libc::SIGTERM),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
];

fn number_of(name: &str) -> Option<i32> {
    SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

fn name_of(number: i32) -> Option<&'static str> {
    SIGNALS.iter().find(|(_, known)| *known == number).map(|(name, _)| *name)
}

/// Sends a signal to a session's process group.
fn hit(pid: u32, signal: i32) {
    if let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1) {
        // SAFETY: takes two numbers. The process began a group of its own, and has not been waited for.
        unsafe { libc::kill(-pid, signal) };
    }
}
