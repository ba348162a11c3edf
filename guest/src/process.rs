//! Processes that the host starts: each is owned by a task, which outlives the stream it was started over.
//!
//! While nobody is attached (the machine was forked, or the host's end broke), a process's output stays in its pipes: a
//! workload waits until somebody takes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;

use kiln_link::message::{self, Input, MAX_CHUNK, Output, Process, TerminalSize};
use kiln_link::{LinkError, Stream};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf};
use tokio::sync::{mpsc, watch};

use crate::agent::{Entry, Machine, Who, aside};
use crate::failure::{Doing as _, Failure, FailureKind, failed, invalid, say};
use crate::spawn::{self, Start, Started};

/// How long an init may take until it hears signals.
const INIT_BEGINS: std::time::Duration = std::time::Duration::from_secs(30);

/// Somebody who takes a process's output and gives it input.
pub(crate) struct Attachment {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
}

impl Attachment {
    /// By messages over a stream.
    pub(crate) fn over(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self { reader: Box::new(reader), writer: Box::new(writer) }
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachment").finish_non_exhaustive()
    }
}

/// A process that was started.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: u32,
    /// Where to send who wants to attach. When all of these are gone and nobody is attached, so are the process's streams.
    pub(crate) attach: mpsc::Sender<Attachment>,
    /// Its status, once it has ended.
    pub(crate) ended: watch::Receiver<Option<ExitStatus>>,
    /// The near side of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Serves one stream to the process service.
pub(crate) async fn serve(machine: &Arc<Machine>, stream: Stream) -> Result<(), LinkError> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let Some(first) = message::receive(&mut reader).await? else { return Ok(()) };
    // The lock is not held while somebody waits.
    let entry = |number| machine.processes().get(&number).cloned();
    let outcome = match first {
        Input::Start { number, process } => match start(machine, number, process).await {
            Ok(attach) => {
                message::send(&mut writer, &Output::Started).await?;
                Ok(attach)
            }
            Err(failure) => Err(failure),
        },
        Input::Rehearse { process } => match rehearse(machine, *process).await {
            Ok(attach) => {
                message::send(&mut writer, &Output::Started).await?;
                Ok(attach)
            }
            Err(failure) => Err(failure),
        },
        Input::Attach { number } => match entry(number) {
            Some(Entry { who: Who::Init, .. }) => return as_long_as_the_machine(&mut reader).await,
            Some(entry) => Ok(entry.attach),
            None => Err(Failure {
                kind: FailureKind::NotFound,
                what: format!("there is no process {number} in this machine"),
            }),
        },
        Input::BecomeInit { process } => {
            let answer = match machine.pid_one.execute(&process) {
                Ok(()) => {
                    // It only gets signals.
                    let (attach, _) = mpsc::channel(1);
                    machine.processes().insert(message::WORKLOAD, Entry { who: Who::Init, attach });
                    Output::Started
                }
                Err(failure) => Output::Failed(failure),
            };
            message::send(&mut writer, &answer).await?;
            return as_long_as_the_machine(&mut reader).await;
        }
        other => Err(invalid(format!("{} is no beginning", name_of(&other)))),
    };
    match outcome {
        Ok(attach) => {
            // A process that has just ended has sent its status to somebody else.
            let attachment = Attachment { reader: Box::new(reader), writer: Box::new(writer) };
            let _ = attach.send(attachment).await;
            Ok(())
        }
        Err(failure) => message::send(&mut writer, &Output::Failed(failure)).await,
    }
}

/// A system's init has no streams here, and its end is the machine's.
async fn as_long_as_the_machine(reader: &mut ReadHalf<Stream>) -> Result<(), LinkError> {
    let _ = reader.read_u8().await;
    Ok(())
}

fn name_of(input: &Input) -> &'static str {
    match input {
        Input::Start { .. } => "a start",
        Input::Attach { .. } => "an attachment",
        Input::Bytes(_) => "input",
        Input::Close => "the end of input",
        Input::Resize(_) => "a terminal's size",
        Input::BecomeInit { .. } => "an init",
        Input::Rehearse { .. } => "a rehearsal",
    }
}

/// Starts a process and the task that owns it.
async fn start(
    machine: &Arc<Machine>,
    number: u32,
    process: Box<Process>,
) -> Result<mpsc::Sender<Attachment>, Failure> {
    let (attach, attachments) = mpsc::channel(1);
    // Taken before the process is there: nobody else gets the number meanwhile.
    let taken = Entry { who: Who::Nobody, attach: attach.clone() };
    match machine.processes().entry(number) {
        std::collections::hash_map::Entry::Occupied(_) => {
            return Err(invalid(format!("there is a process {number} already")));
        }
        std::collections::hash_map::Entry::Vacant(place) => drop(place.insert(taken)),
    }
    let asking = Arc::clone(machine);
    // Its directory and its program may be on a share.
    let begun = aside(move || {
        if number == message::WORKLOAD {
            make_directory_of(&process)?;
        }
        launch(asking.workload.group(), asking.workload.namespace(), *process)
    });
    match begun.await {
        Ok((started, ends)) => {
            let who = Who::Process(Arc::new(started.handle));
            machine.processes().insert(number, Entry { who, attach: attach.clone() });
            tokio::spawn(own(ends, attachments));
            Ok(attach)
        }
        Err(failure) => {
            machine.processes().remove(&number);
            Err(failure)
        }
    }
}

/// Starts a process that nobody asks for by a number, in the control group whose directory is `group` and in this process's
/// namespaces.
pub(crate) async fn begin(group: Arc<OwnedFd>, process: Process) -> Result<Running, Failure> {
    let begun = aside(move || {
        make_directory_of(&process)?;
        launch(group.as_fd(), None, process)
    });
    let (started, ends) = begun.await?;
    let terminal = match &ends.terminal {
        Some(terminal) => Some(terminal.try_clone().doing("keep the terminal")?),
        None => None,
    };
    let (attach, attachments) = mpsc::channel(1);
    let running = Running { pid: started.pid, attach, ended: ends.ended.clone(), terminal };
    tokio::spawn(own(ends, attachments));
    Ok(running)
}

/// Starts a process that is none of the workload. Nothing of it stays.
async fn rehearse(machine: &Arc<Machine>, process: Process) -> Result<mpsc::Sender<Attachment>, Failure> {
    let Running { attach, mut ended, .. } = begin(machine.workload.apart()?, process).await?;
    let machine = Arc::clone(machine);
    tokio::spawn(async move {
        let _ = ended.wait_for(Option::is_some).await;
        if let Err(failure) = machine.workload.forget_apart() {
            say(failure);
        }
    });
    Ok(attach)
}

/// This end of a process's streams.
struct Ends {
    input: Option<Pipe>,
    output: Option<Pieces>,
    errors: Option<Pieces>,
    /// The process's status, once it has ended: what it wrote is there then.
    ended: watch::Receiver<Option<ExitStatus>>,
    /// The terminal, for its size.
    terminal: Option<OwnedFd>,
}

/// What comes out of a stream, piece by piece; one waits until it is taken.
type Pieces = mpsc::Receiver<Vec<u8>>;

/// Reads a stream in a task. What was spliced into a pipe from a share is only there when the share's server has answered, so
/// the reading itself is done aside.
fn pieces(from: OwnedFd, mut ended: watch::Receiver<Option<ExitStatus>>) -> io::Result<Pieces> {
    let from = Arc::new(pipe(from)?);
    let (read, pieces) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut draining = false;
        loop {
            let mut ready = tokio::select! {
                ready = from.readable() => match ready {
                    Ok(ready) => Some(ready),
                    Err(_) => return,
                },
                // What its descendants keep open is theirs: what it wrote itself is there already.
                _ = ended.wait_for(Option::is_some), if !draining => { draining = true; None }
            };
            let reading = Arc::clone(&from);
            let outcome = tokio::task::spawn_blocking(move || {
                let mut buffer = vec![0; MAX_CHUNK];
                let count = io::Read::read(&mut reading.get_ref(), &mut buffer)?;
                buffer.truncate(count);
                Ok::<_, io::Error>(buffer)
            });
            match outcome.await {
                Ok(Ok(piece)) if !piece.is_empty() => {
                    if read.send(piece).await.is_err() {
                        return;
                    }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock && !draining => {
                    if let Some(ready) = &mut ready {
                        ready.clear_ready();
                    }
                }
                // Its end, or that of a terminal that nobody has open any more, or nothing more to drain.
                _ => return,
            }
        }
    });
    Ok(pieces)
}

/// One end of a pipe or the near side of a terminal.
type Pipe = tokio::io::unix::AsyncFd<File>;

fn pipe(end: OwnedFd) -> io::Result<Pipe> {
    rustix::io::ioctl_fionbio(&end, true)?;
    crate::port::watched(File::from(end))
}

/// Where it begins.
fn directory_of(process: &Process) -> &str {
    if process.cwd.is_empty() { "/" } else { &process.cwd }
}

fn make_directory_of(process: &Process) -> Result<(), Failure> {
    let cwd = directory_of(process);
    std::fs::create_dir_all(cwd).doing(format_args!("make the working directory {cwd}"))
}

/// Starts a process in the control group whose directory is `group`, and in another control group namespace if it needs one.
fn launch(
    group: BorrowedFd<'_>,
    namespace: Option<BorrowedFd<'_>>,
    process: Process,
) -> Result<(Started, Ends), Failure> {
    let user = kiln_accounts::resolve(Path::new("/"), &process.user, &process.groups)
        .map_err(|error| invalid(error.to_string()))?;
    let cwd = directory_of(&process).to_owned();
    let mut env = process.env;
    if !env.iter().any(|variable| variable.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    let (ended, watched) = watch::channel(None);
    let mut ends = Ends { input: None, output: None, errors: None, ended: watched.clone(), terminal: None };
    let made = "make its streams";
    let streams = if let Some(size) = process.terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .doing("make a terminal")?;
        grantpt(&master).and_then(|()| unlockpt(&master)).doing("make a terminal")?;
        let near = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .doing("make a terminal")?;
        set_size(&near, size).doing("size the terminal")?;
        let _ = rustix::fs::fchown(&near, Some(rustix::fs::Uid::from_raw(user.uid)), None);
        let copy = || near.try_clone().doing("make a terminal");
        ends.terminal = Some(master.try_clone().doing("make a terminal")?);
        ends.input = Some(pipe(master.try_clone().doing(made)?).doing(made)?);
        ends.output = Some(pieces(master, watched).doing(made)?);
        [copy()?, copy()?, near]
    } else {
        let new = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).doing(made);
        let input = if process.stdin {
            let (theirs, ours) = new()?;
            ends.input = Some(pipe(ours).doing(made)?);
            theirs
        } else {
            File::open("/dev/null").doing(made)?.into()
        };
        let (ours, output) = new()?;
        ends.output = Some(pieces(ours, watched.clone()).doing(made)?);
        let (ours, errors) = new()?;
        ends.errors = Some(pieces(ours, watched).doing(made)?);
        [input, output, errors]
    };
    let start = Start {
        args: process.args,
        env,
        cwd,
        streams,
        terminal: process.terminal.is_some(),
        namespace: namespace.map(|namespace| namespace.as_raw_fd()),
        uid: user.uid,
        gid: user.gid,
        groups: user.groups,
        capabilities: process.capabilities,
        limits: process.limits,
        no_new_privileges: process.no_new_privileges,
    };
    let Started { pid, handle } = start.start(group.as_raw_fd())?;
    let watched = crate::port::watched(File::from(handle.try_clone().doing("watch a process")?))
        .doing("watch a process")?;
    tokio::spawn(async move {
        let status = match watched.readable().await {
            Ok(_) => spawn::wait(watched.get_ref().as_fd()),
            Err(error) => Err(error),
        };
        ended.send_replace(Some(status.unwrap_or_else(|_| ExitStatus::from_raw(LOST))));
    });
    Ok((Started { pid, handle }, ends))
}

/// What is told of a process whose end was not seen: that it exited with 255.
const LOST: i32 = 255 << 8;

pub(crate) fn set_size(terminal: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).map_err(io::Error::from)
}

/// What comes of having somebody attached.
enum Came {
    /// The process has ended, and they know.
    Over,
    /// They have gone.
    Alone,
}

/// Owns a process: whoever is attached gets its output, one after the other, and one of them its status.
async fn own(mut ends: Ends, mut attachments: mpsc::Receiver<Attachment>) {
    while let Some(attachment) = attachments.recv().await {
        if let Ok(Came::Over) = carry(&mut ends, attachment).await {
            break;
        }
    }
}

/// Carries streams until the process or whoever is attached has gone.
async fn carry(ends: &mut Ends, attachment: Attachment) -> Result<Came, LinkError> {
    let Attachment { reader, mut writer } = attachment;
    let (inputs, mut input) = mpsc::channel(4);
    let listening = tokio::spawn(listen(reader, inputs));
    let mut pending: Vec<u8> = Vec::new();
    let mut closing = false;
    let mut listens = true;
    let mut status = *ends.ended.borrow();
    let came = loop {
        if closing && pending.is_empty() && ends.terminal.is_none() {
            ends.input = None;
        }
        let drained = ends.output.is_none() && ends.errors.is_none();
        if let (Some(status), true) = (status, drained) {
            message::send(&mut writer, &Output::Exited(code_of(status))).await?;
            let _ = writer.shutdown().await;
            break Came::Over;
        }
        tokio::select! {
            piece = next(&mut ends.output) => match piece {
                Some(piece) => message::send(&mut writer, &Output::Stdout(piece)).await?,
                None => ends.output = None,
            },
            piece = next(&mut ends.errors) => match piece {
                Some(piece) => message::send(&mut writer, &Output::Stderr(piece)).await?,
                None => ends.errors = None,
            },
            written = write_some(&ends.input, &pending), if !pending.is_empty() => match written {
                Ok(count) => drop(pending.drain(..count)),
                // Nobody reads it any more.
                Err(_) => { pending.clear(); ends.input = None; }
            },
            // One piece at a time, so that a process that does not read makes its writer wait.
            message = input.recv(), if listens && pending.is_empty() => match message {
                Some(Input::Bytes(bytes)) if ends.input.is_some() => pending = bytes,
                Some(Input::Close) => closing = true,
                Some(Input::Resize(size)) => if let Some(terminal) = &ends.terminal {
                    let _ = set_size(terminal, size);
                },
                Some(_) => {}
                // The stream has ended on their side, so nobody would hear the rest.
                None => { listens = false; if status.is_none() { break Came::Alone; } }
            },
            ended = end(&mut ends.ended), if status.is_none() => status = Some(ended),
        }
    };
    listening.abort();
    Ok(came)
}

/// A process's status, when it has ended.
async fn end(ended: &mut watch::Receiver<Option<ExitStatus>>) -> ExitStatus {
    match ended.wait_for(Option::is_some).await {
        Ok(status) => status.unwrap_or_default(),
        Err(_) => ExitStatus::from_raw(LOST),
    }
}

/// The next piece; `None` at the end. Never, if there is no stream.
async fn next(pieces: &mut Option<Pieces>) -> Option<Vec<u8>> {
    match pieces {
        Some(pieces) => pieces.recv().await,
        None => std::future::pending().await,
    }
}

async fn write_some(end: &Option<Pipe>, bytes: &[u8]) -> io::Result<usize> {
    let Some(pipe) = end else { return Err(Errno::PIPE.into()) };
    loop {
        let mut ready = pipe.writable().await?;
        if let Ok(written) = ready.try_io(|pipe| io::Write::write(&mut pipe.get_ref(), bytes)) {
            return written;
        }
    }
}

/// Reads messages for who must be able to stop waiting for them.
async fn listen<R: AsyncRead + Unpin>(mut reader: R, inputs: mpsc::Sender<Input>) {
    while let Ok(Some(input)) = message::receive(&mut reader).await {
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

/// As a shell tells it.
fn code_of(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code.to_le_bytes()[0],
        (None, Some(signal)) => 128_u8.wrapping_add(signal.to_le_bytes()[0]),
        (None, None) => 255,
    }
}

/// Waits until process 1 takes a signal: it is spared what it has not asked for, and an init that has just begun has asked for
/// nothing yet. Not for ever: it may never ask.
async fn until_init_takes(signal: i32) {
    let bit = 1_u64 << (signal - 1).clamp(0, 63);
    let begun = std::time::Instant::now();
    while begun.elapsed() < INIT_BEGINS {
        let status = std::fs::read_to_string("/proc/1/status").unwrap_or_default();
        let takes = ["SigBlk:", "SigCgt:"].iter().any(|name| {
            let set = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & bit != 0)
        });
        if takes {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// Sends a signal to a process that was started over the link.
pub(crate) async fn signal(machine: &Machine, number: u32, signal: i32) -> Result<(), Failure> {
    let entry = machine.processes().get(&number).cloned();
    let sent = match entry.map(|entry| entry.who) {
        Some(Who::Process(handle)) => {
            let none = std::ptr::null::<libc::siginfo_t>();
            // SAFETY: takes two numbers, nothing and a number. The handle is the process's, and nobody's once that has ended.
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, handle.as_raw_fd(), signal, none, 0) }
        }
        Some(Who::Init) => {
            until_init_takes(signal).await;
            // SAFETY: takes two numbers.
            unsafe { libc::kill(1, signal) }.into()
        }
        Some(Who::Nobody) | None => {
            let what = format!("there is no process {number}");
            return Err(Failure { kind: FailureKind::NotFound, what });
        }
    };
    if sent == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(failed(format_args!("send signal {signal}"), error)),
    }
}
