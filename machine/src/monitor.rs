//! The process that a machine runs below: `kiln monitor <id> <socket>`, a child of the instance's supervisor.
//!
//! To the supervisor it *is* the workload: its streams, its exit code, and what it does when it gets a signal are those of the
//! machine's first process. It owns the hypervisor, which ends with it, as it ends with its supervisor.
//!
//! ```text
//! supervisor                      monitor
//!    |-- starts it ---------------->|   restores the machine, tells the guest who it is
//!    |<----------- ready ("failed") |
//!    |   writes the record          |
//!    |-- go ----------------------->|   starts the workload
//!    |<--------- started ("failed") |   carries its streams, answers the door
//! ```

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as Blocking;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_contract::{BackendError, ErrorKind, Home, InstanceDir, InstanceId, PublishSpec, Stdio, VmState};
use kiln_instance::signals::Signals;
use kiln_instance::{DetachKeys, Failure, terminal};
use kiln_link::message::{self, Input, Request, TerminalSize, WORKLOAD};
use kiln_link::{Opener, Parker, Stream};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Notify, mpsc};

use crate::beginning::{Found, Ground, find};
use crate::boot::INITRAMFS;
use crate::carry::{End, Event, carry};
use crate::door::{self, Ask, Reply};
use crate::last_words::LastWords;
use crate::life::{Life, ask, start};
use crate::services::Services;
use crate::{clock, console, plan, stream};

/// How long a guest may take to hold still.
const TO_PARK: Duration = Duration::from_secs(30);
/// How long a guest may take to write everything to its disk and power off.
const TO_POWER_OFF: Duration = Duration::from_secs(20);
/// How long a guest may take to set its clock.
const TO_TELL: Duration = Duration::from_secs(5);

/// The exit code of what SIGKILL has ended.
const KILLED: u8 = 128 + 9;

/// What a monitor tells its supervisor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum News {
    /// The machine runs and is who it should be.
    Ready {
        /// Published ports, with the host's chosen.
        ports: Vec<PublishSpec>,
        /// Addresses by which others on its network reach it.
        addresses: Vec<IpAddr>,
    },
    /// The workload runs.
    Started,
    /// Neither.
    Failed(Failure),
}

/// The word that starts the workload.
pub(crate) const GO: &str = "go\n";

/// Runs the machine `id` until its workload has ended: what `kiln monitor <id> <socket>` does. `socket` is the number of an
/// inherited socket to the supervisor. Gives the workload's exit code.
///
/// # Errors
/// Only if that socket is none. Every other failure is told over it.
pub fn monitor(home: &Home, id: &InstanceId, socket: i32) -> Result<u8, BackendError> {
    if socket < 3 {
        return Err(BackendError::new(ErrorKind::Invalid, format!("{socket} is no inherited socket")));
    }
    // SAFETY: by this command's contract the number is a descriptor that was inherited for this very use.
    let supervisor = Blocking::from(unsafe { OwnedFd::from_raw_fd(socket) });
    rustix::io::fcntl_setfd(&supervisor, rustix::io::FdFlags::CLOEXEC)
        .map_err(|error| BackendError::caused("cannot use the inherited socket", io::Error::from(error)))?;
    let outcome = begin(home, id, &supervisor);
    match outcome {
        Ok(code) => Ok(code),
        Err(error) => {
            tell(&supervisor, &News::Failed(Failure::from(&error)));
            tracing::error!("{error}");
            Ok(125)
        }
    }
}

fn begin(home: &Home, id: &InstanceId, supervisor: &Blocking) -> Result<u8, BackendError> {
    let signals =
        Signals::take().map_err(|error| BackendError::caused("cannot take signals as events", error))?;
    let found = find(home, id)?;
    let runtime = stream::runtime()?;
    let code = runtime.block_on(run(found, &signals, supervisor));
    // Threads that wait for input that never comes are not waited for.
    runtime.shutdown_background();
    code
}

fn tell(mut supervisor: &Blocking, news: &News) {
    let mut line = serde_json::to_string(news).unwrap_or_default();
    line.push('\n');
    // A supervisor that is gone takes this process with it.
    let _ = supervisor.write_all(line.as_bytes());
}

async fn run(mut found: Found, signals: &Signals, supervisor: &Blocking) -> Result<u8, BackendError> {
    let services = Services::prepare(&found.home, &found.ground.record)?;
    found.paths.network = services.device();
    let life = found.begin().await?;
    let outcome = live(&found.ground, life, services, supervisor, signals).await;
    door::close(&found.ground.dir);
    outcome
}

async fn live(
    ground: &Ground,
    mut life: Life,
    mut services: Services,
    supervisor: &Blocking,
    signals: &Signals,
) -> Result<u8, BackendError> {
    let spec = &ground.record.spec;
    let log = ground.dir.path().join(console::LOG);
    let console = LastWords::from_here(&log);
    let inbound = life.session().session.take_inbound();
    services.serve(life.opener(), inbound)?;
    let disk = (!ground.is_own).then_some(ground.disk_size);
    let configure = plan::configure(&ground.record, disk, services.place())?;
    let configured = life.configure(configure).await;
    // A machine that is gone has not refused anything.
    configured.map_err(|error| life.vm().last_words().map_or(error, |ended| console.explain(ended)))?;
    for used_up in [plan::cold(&ground.dir), ground.dir.path().join(INITRAMFS)] {
        let _ = std::fs::remove_file(used_up);
    }
    if ground.is_own {
        // From here on its disk is another: what was saved fits it no more.
        crate::saved::remove(&plan::saved(&ground.dir))?;
    }
    let listener = door::listen(&ground.dir)?;
    tell(supervisor, &News::Ready { ports: services.ports().to_vec(), addresses: services.addresses() });
    wait_for_go(supervisor)?;
    let opener = life.opener();
    let stdio = own_streams(&ground.dir)?;
    let watched = stdio.stdout.try_clone();
    let watched =
        watched.map_err(|error| BackendError::caused("cannot use the workload's streams", error))?;
    let size = terminal::size_of(&stdio);
    let process = Box::new(plan::process(spec, size)?);
    let first = match (ground.is_own, spec.machine.system) {
        (true, _) => Input::Attach { number: WORKLOAD },
        (false, true) => Input::BecomeInit { process },
        (false, false) => Input::Start { number: WORKLOAD, process },
    };
    let workload = start(&opener, first).await?;
    tell(supervisor, &News::Started);
    if let Some(next) = &ground.next {
        next.make();
    }
    let keeper = Arc::new(Keeper {
        parker: life.parker(),
        opener: opener.clone(),
        life: Mutex::new(life),
        told_to_end: Notify::new(),
    });
    let (events, resized) = mpsc::channel(1);
    let carried = async {
        if spec.machine.system {
            return until_it_ends(workload, &console).await;
        }
        let stdin = spec.process.stdin;
        match carry(workload, stdio, stdin, DetachKeys::parse("")?, resized).await {
            Ok(End::Exited(code)) => Ok(code),
            Ok(End::Detached) => Ok(0),
            Err(error) => Err(error),
        }
    };
    let code = tokio::select! {
        code = carried => code,
        failed = pass_on(signals, &keeper, events, &watched, spec.machine.system) => Err(failed),
        failed = answer(&listener, ground, &keeper) => Err(failed),
        never = crate::console_log::bound(&log) => match never {},
        never = clock::follow(async || told_the_time(&keeper).await) => match never {},
        () = keeper.told_to_end.notified() => {
            // What is suspended writes nothing.
            keeper.life.lock().await.vm().resume().map(|()| KILLED)
        }
    };
    match code {
        Ok(code) => {
            if !spec.remove {
                power_off(&opener).await;
            }
            Ok(code)
        }
        Err(error) => Err(console.explain(error)),
    }
}

fn wait_for_go(supervisor: &Blocking) -> Result<(), BackendError> {
    let mut word = String::new();
    let heard = BufReader::new(supervisor).read_line(&mut word);
    match heard {
        Ok(_) if word == GO => Ok(()),
        _ => Err(BackendError::new(ErrorKind::Failed, "the supervisor changed its mind")),
    }
}

/// This process's own streams, which are the workload's.
fn own_streams(dir: &InstanceDir) -> Result<Stdio, BackendError> {
    let own = |fd: std::os::fd::BorrowedFd<'_>| {
        fd.try_clone_to_owned()
            .map_err(|error| BackendError::caused("cannot use the workload's streams", error))
    };
    let stdio = Stdio {
        stdin: own(io::stdin().as_fd())?,
        stdout: own(io::stdout().as_fd())?,
        stderr: own(io::stderr().as_fd())?,
    };
    // Nothing else of this process may keep them open or write to them.
    let dup = || {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let words = File::options().append(true).create(true).open(dir.supervisor_log())?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&words)?;
        Ok(())
    };
    dup().map_err(|error: io::Error| BackendError::caused("cannot use the workload's streams", error))?;
    Ok(stdio)
}

/// A system ends with its machine, which it powers off; it may have restarted it as well, which ends it too.
async fn until_it_ends(mut workload: Stream, console: &LastWords) -> Result<u8, BackendError> {
    let _ = message::receive::<_, message::Output>(&mut workload).await;
    console.panicked().map_or(Ok(0), Err)
}

/// What several tasks use of the machine.
struct Keeper {
    life: Mutex<Life>,
    parker: Parker,
    opener: Opener,
    told_to_end: Notify,
}

/// Passes signals on to the workload, for ever.
async fn pass_on(
    signals: &Signals,
    keeper: &Keeper,
    events: mpsc::Sender<Event>,
    terminal: &OwnedFd,
    system: bool,
) -> BackendError {
    let fail = |error: io::Error| BackendError::caused("cannot wait for signals", error);
    let copy = match signals.fd().as_fd().try_clone_to_owned() {
        Ok(copy) => File::from(copy),
        Err(error) => return fail(error),
    };
    // SAFETY: a `File` gives the same open descriptor for as long as it lives, and lives in the `AsyncFd`.
    let watched = match unsafe { AsyncFd::register(copy) } {
        Ok(watched) => watched,
        Err(error) => return fail(error.into()),
    };
    loop {
        match watched.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(error) => return fail(error),
        }
        while let Some(signal) = signals.next() {
            match signal {
                libc::SIGCHLD => {}
                libc::SIGWINCH => {
                    if let Some((rows, columns)) = terminal::size([terminal.as_fd()]) {
                        let _ = events.send(Event::Resized(TerminalSize { rows, columns })).await;
                    }
                }
                signal => {
                    let signal = if system { to_init(signal) } else { signal };
                    let request = Request::Signal { process: WORKLOAD, signal };
                    if let Err(error) = ask(&keeper.opener, request).await {
                        tracing::warn!("cannot pass signal {signal} on: {error}");
                    }
                }
            }
        }
    }
}

/// What a system's init is told where a process would be told to end: to power off (`SIGRTMIN+4`, systemd(1)). An image's own
/// idea may be `SIGRTMIN+3`: as good in a container, but a machine that has only halted is still there.
fn to_init(signal: i32) -> i32 {
    const HALT: i32 = 37;
    const POWER_OFF: i32 = 38;
    match signal {
        libc::SIGTERM | libc::SIGINT | HALT => POWER_OFF,
        other => other,
    }
}

/// Answers the door, for ever.
async fn answer(listener: &tokio::net::UnixListener, ground: &Ground, keeper: &Arc<Keeper>) -> BackendError {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => return BackendError::caused("cannot answer the door", error),
        };
        if !door::may_ask(&stream) {
            continue;
        }
        if let Err(error) = serve(stream, ground, keeper).await {
            tracing::debug!("at the door: {error}");
        }
    }
}

async fn serve(mut stream: UnixStream, ground: &Ground, keeper: &Arc<Keeper>) -> Result<(), BackendError> {
    let question = match tokio::time::timeout(Duration::from_secs(5), message::receive(&mut stream)).await {
        Ok(Ok(Some(question))) => question,
        _ => return Ok(()),
    };
    let outcome = match question {
        Ask::Dial { service } => {
            let opener = keeper.opener.clone();
            // Carried beside everything else, for as long as both ends like.
            tokio::spawn(async move {
                let mut inner = match opener.open(service).await {
                    Ok(inner) => inner,
                    Err(error) => {
                        let failure = door::failure(&crate::life::lost(error));
                        let _ = message::send(&mut stream, &Reply::Failed(failure)).await;
                        return;
                    }
                };
                if message::send(&mut stream, &Reply::Done).await.is_ok() {
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut inner).await;
                }
            });
            return Ok(());
        }
        Ask::Pause => keeper.life.lock().await.vm().pause().map(|()| Reply::Done),
        Ask::Resume => resume(keeper).await.map(|()| Reply::Done),
        Ask::Save { directory, disk } => save(ground, keeper, directory.as_deref().map(Path::new), &disk)
            .await
            .map(|paused| Reply::Saved { paused: u64::try_from(paused.as_micros()).unwrap_or(u64::MAX) }),
        Ask::Grown { size } => grown(keeper, size).await.map(|()| Reply::Done),
        Ask::End => {
            keeper.told_to_end.notify_one();
            Ok(Reply::Done)
        }
    };
    let reply = outcome.unwrap_or_else(|error| Reply::Failed(door::failure(&error)));
    message::send(&mut stream, &reply).await.map_err(crate::life::lost)
}

async fn resume(keeper: &Keeper) -> Result<(), BackendError> {
    keeper.life.lock().await.vm().resume()?;
    // Its clock stood still.
    ask(&keeper.opener, Request::Clock { now: plan::now() }).await.map(drop)
}

/// Tells the guest the time, if it runs; whether it has been told.
async fn told_the_time(keeper: &Keeper) -> bool {
    // As long as this is held nobody pauses it: a time that it heard only afterwards would be wrong.
    let mut life = keeper.life.lock().await;
    if !matches!(life.vm().state(), Ok(VmState::Running)) {
        return false;
    }
    let told = ask(&keeper.opener, Request::Clock { now: plan::now() });
    match tokio::time::timeout(TO_TELL, told).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => {
            tracing::warn!("the host's time has jumped, and the guest does not hear of it: {error}");
            false
        }
        Err(_) => false,
    }
}

async fn grown(keeper: &Keeper, size: u64) -> Result<(), BackendError> {
    keeper.life.lock().await.vm().disk_resized(size)?;
    ask(&keeper.opener, Request::Grow { size }).await.map(drop)
}

/// Copies the running machine's disk, and saves its memory of the same instant if there is a `directory` for it; how long it
/// did not run.
async fn save(
    ground: &Ground,
    keeper: &Keeper,
    directory: Option<&Path>,
    copy: &door::Copy,
) -> Result<Duration, BackendError> {
    ground.disks.flush(&ground.disk)?;
    let mut life = keeper.life.lock().await;
    let begun = Instant::now();
    // What has memory goes on elsewhere, so nothing may be under way over the link.
    let parked = match directory {
        Some(_) => Some(keeper.parker.park(TO_PARK).await.map_err(cannot_save)?),
        None => None,
    };
    let taken = take(ground, life.vm(), directory, copy);
    // Whatever came of it, the original goes on.
    let resumed = life.vm().resume();
    let went_on = match parked {
        Some(parked) => parked.resume().await,
        None => Ok(()),
    };
    let paused = begun.elapsed();
    resumed?;
    went_on.map_err(|error| BackendError::caused("cannot let the machine go on", error))?;
    let taken = taken?;
    if let Some(directory) = directory {
        ground.base.lay_under(directory)?;
    }
    // Last: whoever finds the disk finds all of it.
    taken.finish()?;
    Ok(paused)
}

fn cannot_save(error: kiln_link::LinkError) -> BackendError {
    BackendError::caused("cannot save the machine", error)
}

fn take(
    ground: &Ground,
    vm: &mut dyn kiln_contract::Vm,
    directory: Option<&Path>,
    copy: &door::Copy,
) -> Result<Box<dyn kiln_contract::PendingDisk>, BackendError> {
    vm.pause()?;
    if let Some(directory) = directory {
        vm.save(directory)?;
    }
    copy.start(&*ground.disks, &ground.disk)
}

/// Lets the guest end in order. It is not trusted to do so.
pub(crate) async fn power_off(opener: &Opener) {
    match tokio::time::timeout(TO_POWER_OFF, ask(opener, Request::PowerOff)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!("the guest does not power off: {error}"),
        Err(_) => tracing::warn!("the guest does not power off"),
    }
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}
