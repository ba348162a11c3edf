//! The agent: the process that the host talks to.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use kiln_link::message::{self, Hello};
use kiln_link::{GuestLink, Hold, LinkError, Opener, Session, VERSION, service};
use tokio::sync::mpsc;

use crate::cgroup::Workload;
use crate::failure::{Doing as _, Failure, say};
use crate::init::PidOne;
use crate::port::Port;
use crate::process::Attachment;
use crate::ready::Ready;
use crate::{control, process, ssh};

/// What makes this program the agent.
pub(crate) const ARGUMENT: &str = "agent";

/// What lives as long as the machine.
pub(crate) struct Machine {
    pub(crate) pid_one: PidOne,
    pub(crate) workload: Arc<Workload>,
    /// Processes that were started over the link, by number.
    pub(crate) processes: Mutex<HashMap<u32, Entry>>,
    /// What the root and the network are made of, until they are.
    pub(crate) ready: Ready,
    /// The network, once there is one.
    pub(crate) network: Mutex<Option<crate::network::Network>>,
    /// What to look after in the root, once there is one.
    pub(crate) root: Mutex<Option<crate::root::Root>>,
}

/// A process that was started over the link.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) who: Who,
    pub(crate) attach: mpsc::Sender<Attachment>,
}

/// Who is behind a number of the host's.
#[derive(Debug, Clone)]
pub(crate) enum Who {
    /// Nobody yet: the process is being started.
    Nobody,
    /// A process, by its pidfd.
    Process(Arc<OwnedFd>),
    /// A system's init.
    Init,
}

impl Machine {
    /// The lock, whoever held it last.
    pub(crate) fn processes(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Entry>> {
        self.processes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The lock, whoever held it last.
    pub(crate) fn network(&self) -> std::sync::MutexGuard<'_, Option<crate::network::Network>> {
        self.network.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The lock, whoever held it last.
    pub(crate) fn root(&self) -> std::sync::MutexGuard<'_, Option<crate::root::Root>> {
        self.root.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Does on a thread of its own what may wait for a share of the host's: its answers are carried by the agent's thread.
pub(crate) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.doing("do something beside the link")?
}

/// Runs until the link breaks; then PID 1 powers off.
pub(crate) fn main() -> ExitCode {
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        // Those that were made before the machine was saved are there when it is restored.
        .thread_keep_alive(Duration::from_secs(u64::from(u32::MAX)))
        .build()
        .doing("start")
        .and_then(|runtime| runtime.block_on(run()));
    if let Err(failure) = ended {
        say(failure);
    }
    ExitCode::FAILURE
}

async fn run() -> Result<(), Failure> {
    let pid_one = PidOne::at_stdin()?;
    let workload = Arc::new(Workload::make()?);
    let ready = Ready::make()?;
    make_threads().await?;
    let port = Port::open()?;
    let uname = rustix::system::uname();
    let hello = Hello {
        version: VERSION,
        kernel: uname.release().to_string_lossy().into_owned(),
        uptime: crate::identity::uptime_millis(),
    };
    let mut link = GuestLink::holding(port, hello, Arc::new(Freeze(Arc::clone(&workload))));
    let machine = Arc::new(Machine {
        pid_one,
        workload,
        processes: Mutex::default(),
        ready,
        network: Mutex::default(),
        root: Mutex::default(),
    });
    loop {
        let session = link.next_session().await.doing("speak to the host")?;
        tokio::spawn(serve(Arc::clone(&machine), session));
    }
}

/// Makes the threads that the first process of a workload needs: for being started, and for two streams.
async fn make_threads() -> Result<(), Failure> {
    let all = Arc::new(Barrier::new(3));
    let wait = || {
        let all = Arc::clone(&all);
        tokio::task::spawn_blocking(move || all.wait())
    };
    for thread in [wait(), wait(), wait()] {
        thread.await.doing("make threads")?;
    }
    Ok(())
}

/// Holds the workload by freezing its control group.
struct Freeze(Arc<Workload>);

impl Hold for Freeze {
    async fn hold(&self) {
        if let Err(failure) = self.0.freeze().await {
            say(failure);
        }
    }

    async fn release(&self) {
        if let Err(failure) = self.0.thaw() {
            say(failure);
        }
    }
}

/// One life: until the host begins another.
async fn serve(machine: Arc<Machine>, mut session: Session) {
    let opener = session.opener();
    while let Some((number, stream)) = session.accept().await {
        let (machine, opener) = (Arc::clone(&machine), opener.clone());
        tokio::spawn(async move {
            if let Err(error) = dispatch(machine, opener, number, stream).await {
                say(format_args!("service {number}: {error}"));
            }
        });
    }
}

async fn dispatch(
    machine: Arc<Machine>,
    opener: Opener,
    number: u16,
    mut stream: kiln_link::Stream,
) -> Result<(), LinkError> {
    match number {
        service::CONTROL => match message::receive(&mut stream).await? {
            Some(request) => control::answer(&machine, &opener, request, &mut stream).await,
            None => Ok(()),
        },
        service::PROCESS => process::serve(&machine, stream).await,
        service::TCP => {
            kiln_usernet::guest::serve_tcp(stream, &kiln_usernet::guest::TunConfig::default()).await;
            Ok(())
        }
        service::UDP => {
            kiln_usernet::guest::serve_udp(stream, &kiln_usernet::guest::TunConfig::default()).await;
            Ok(())
        }
        service::SSH => {
            ssh::carry(&machine, stream).await;
            Ok(())
        }
        // A stream that is dropped is reset: the host sees that nobody is there.
        _ => Ok(()),
    }
}
