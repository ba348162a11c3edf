//! The service: one process that mounts and serves the views of a home, for as long as there are any.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiln_contract::{BackendError, ErrorKind, Home};
use rustix::fs::FlockOperation;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use super::api::{
    MountReply, MountRequest, RemountReply, RemountRequest, Router, RouterServer, ShutdownReply,
    ShutdownRequest, StatusReply, StatusRequest, UnmountReply, UnmountRequest, from_change, to_status,
    unmount_request,
};
use super::client::Client;
use super::routes::{Routes, Watched};
use super::{Process, SOCKET, stale};
use crate::sockets::ShortPath;
use crate::views::Views;

type Result<T> = std::result::Result<T, BackendError>;

/// How often, and how far apart, it is looked whether a service that was started answers: for half a minute.
const ATTEMPTS: u32 = 10_000;
const STEP: Duration = Duration::from_millis(3);
/// How often a service is started that ends at once.
const LAUNCHES: u32 = 3;

/// How long who is connected may take to notice that the service ends.
const PARTING: Duration = Duration::from_secs(1);

/// How long a service that shows nothing waits for somebody who asks.
pub const IDLE: Duration = Duration::from_secs(10);

/// How a program becomes the service of a home that ends when it has shown nothing for so long. It is to call [`serve`].
pub type Launch = fn(&Home, Duration) -> Command;

/// This program, if it is `kiln`.
pub fn this_program(home: &Home, idle: Duration) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(["fs", "service", "start", "--foreground", "--idle"]).arg(idle.as_secs().to_string());
    command.env("KILN_HOME", home.path());
    command
}

/// Connects to the service of a home, and starts it first if none runs.
///
/// # Errors
/// As [`start`] and [`Client::connect`].
pub fn connect_or_start(home: &Home, launch: Launch) -> Result<Client> {
    // Two may want to start it at once, and one that is about to end may answer last.
    for _ in 0..3 {
        if let Some(client) = Client::connect(home)? {
            return Ok(client);
        }
        start(home, IDLE, launch)?;
    }
    Err(BackendError::new(ErrorKind::Failed, "the service of views ends as soon as it is started")
        .hint(format!("it may have said why in {}", home.router().join("log").display())))
}

/// Starts the service of a home as a process of its own, which answers when this returns. That another one runs already is
/// no error.
///
/// # Errors
/// It cannot be started.
pub fn start(home: &Home, idle: Duration, launch: Launch) -> Result<()> {
    let failed = |error: io::Error| BackendError::caused("cannot start the service of views", error);
    make_directory(home)?;
    let path = home.router().join("log");
    let log = File::options().create(true).append(true).open(&path).map_err(failed)?;
    let mut command = launch(home, idle);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir("/");
    // SAFETY: between fork and exec only setsid(2) is called. A terminal's signals pass the service by.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    // One that is about to end holds its lock until it has taken everything away, and is in the way of the next so long.
    let mut ended = None;
    for _ in 0..LAUNCHES {
        match launched(home, &mut command)? {
            Launched::Answers => return Ok(()),
            Launched::Ended(status) => ended = Some(status),
        }
    }
    let status = ended.map(|status| format!(" ({status})")).unwrap_or_default();
    let what = format!("the service of views has ended at once{status}");
    Err(BackendError::new(ErrorKind::Failed, what)
        .hint(format!("it says why at the end of {}", path.display())))
}

/// What became of a service that was started.
enum Launched {
    /// It, or another one that was quicker, answers.
    Answers,
    /// It ended, and no other one runs.
    Ended(ExitStatus),
}

fn launched(home: &Home, command: &mut Command) -> Result<Launched> {
    let failed = |error: io::Error| BackendError::caused("cannot start the service of views", error);
    let mut service = command.spawn().map_err(failed)?;
    let mut status = None;
    for _ in 0..ATTEMPTS {
        if Client::connect(home)?.is_some() {
            return Ok(Launched::Answers);
        }
        status = status.or(service.try_wait().map_err(failed)?);
        // Whoever holds the lock answers soon, or ends.
        if let Some(status) = status
            && try_lock(home)?.is_some()
        {
            return Ok(Launched::Ended(status));
        }
        std::thread::sleep(STEP);
    }
    Err(BackendError::new(ErrorKind::Failed, "the service of views does not answer")
        .hint(format!("it may say why at the end of {}", home.router().join("log").display())))
}

fn make_directory(home: &Home) -> Result<()> {
    let directory = home.router();
    let failed = |error| BackendError::caused(format!("cannot make {}", directory.display()), error);
    fs::create_dir_all(home.path()).map_err(failed)?;
    match fs::DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
        _ => Ok(()),
    }
}

/// `None` if a service has it.
fn try_lock(home: &Home) -> Result<Option<File>> {
    let path = home.router().join("lock");
    let failed = |error: io::Error| BackendError::caused(format!("cannot lock {}", path.display()), error);
    let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed(error.into())),
    }
}

/// Is the service of a home, until it is told to end or has shown nothing for as long as `idle` says. `ready` is called when
/// it answers.
///
/// What the last service showed is shown again first, to those of its processes that are left.
///
/// # Errors
/// Another one runs, or the socket cannot be made.
pub fn serve(views: &Views, idle: Duration, ready: impl FnOnce()) -> Result<()> {
    let home = views.home();
    make_directory(home)?;
    let Some(_lock) = try_lock(home)? else {
        return Err(BackendError::new(ErrorKind::State, "the service of views runs already"));
    };
    let failed = |error: io::Error| BackendError::caused("cannot serve views", error);
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        // The kernel has applied that of whoever makes a file in a view.
        rustix::process::umask(rustix::fs::Mode::empty());
        stale::clean(None);
        let service = Service {
            routes: Arc::new(Routes::new(views.clone())),
            asked: Arc::new(watch::channel(()).0),
            busy: Arc::default(),
            end: Arc::new(Notify::new()),
        };
        for name in service.routes.restore()? {
            service.watch(name);
        }
        let listener = listen(home).map_err(failed)?;
        ready();
        let routes = Arc::clone(&service.routes);
        let ending = Arc::new(Notify::new());
        let (told, ended) = (Arc::clone(&ending), service.clone().ended(idle));
        let end = async move {
            ended.await;
            told.notify_one();
        };
        let owner = rustix::process::geteuid().as_raw();
        let api = RouterServer::with_interceptor(service, move |request| only(owner, request));
        let connections = futures_util::stream::unfold(listener, |listener| async {
            Some((listener.accept().await.map(|(socket, _)| socket), listener))
        });
        let server = tonic::transport::Server::builder();
        let served = tokio::select! {
            served = server.serve_with_incoming_shutdown(api, connections, end) => served,
            () = async { ending.notified().await; tokio::time::sleep(PARTING).await } => Ok(()),
        };
        let served = served.map_err(|error| BackendError::caused("cannot answer", error));
        // Nobody is to connect to one that ends.
        let _ = fs::remove_file(home.router().join(SOCKET));
        let _ = tokio::task::spawn_blocking(move || routes.close()).await;
        served
    })
}

fn listen(home: &Home) -> io::Result<UnixListener> {
    let directory = home.router();
    match fs::remove_file(directory.join(SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(ShortPath::of(&directory)?.join(SOCKET))?;
    fs::set_permissions(directory.join(SOCKET), fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Refuses everybody but the owner, by what the kernel says of the other end (unix(7), `SO_PEERCRED`): modes of files may be
/// changed, and are nothing to root.
fn only(owner: u32, request: Request<()>) -> std::result::Result<Request<()>, Status> {
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    if peer.is_some_and(|peer| peer.uid() == owner) {
        return Ok(request);
    }
    Err(Status::permission_denied(format!("this service answers only the user {owner}")))
}

#[derive(Clone)]
struct Service {
    routes: Arc<Routes>,
    /// Told of every request, and of the end of every view.
    asked: Arc<watch::Sender<()>>,
    /// How many requests are being worked on.
    busy: Arc<AtomicUsize>,
    end: Arc<Notify>,
}

impl Service {
    /// Waits until the service is to end.
    async fn ended(self, idle: Duration) {
        let mut asked = self.asked.subscribe();
        let unused = async {
            loop {
                asked.borrow_and_update();
                if self.busy.load(Ordering::Acquire) > 0 || !self.routes.is_empty() {
                    let _ = asked.changed().await;
                } else if tokio::time::timeout(idle, asked.changed()).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            () = unused => {}
            () = self.end.notified() => {}
        }
    }

    /// Takes a view away when nobody is left who sees it.
    fn watch(&self, name: String) {
        let service = self.clone();
        tokio::spawn(async move {
            loop {
                let (routes, of) = (Arc::clone(&service.routes), name.clone());
                match tokio::task::spawn_blocking(move || routes.watch(&of)).await {
                    Ok(Watched::Until(process)) => end_of(process).await,
                    Ok(Watched::Gone) | Err(_) => break,
                }
            }
            service.asked.send_replace(());
        });
    }

    /// Does what may block, and is a use of the service: it does not end meanwhile, and waits anew after it.
    async fn using<T: Send + 'static>(
        &self,
        what: impl FnOnce(&Routes) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        self.busy.fetch_add(1, Ordering::AcqRel);
        self.asked.send_replace(());
        let done = self.blocking(what).await;
        self.busy.fetch_sub(1, Ordering::AcqRel);
        self.asked.send_replace(());
        done
    }

    /// Does what may block.
    async fn blocking<T: Send + 'static>(
        &self,
        what: impl FnOnce(&Routes) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let routes = Arc::clone(&self.routes);
        let done = tokio::task::spawn_blocking(move || what(&routes)).await;
        done.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| to_status(&error))
    }
}

/// Waits for the end of a process.
async fn end_of(process: Process) {
    let pid = i32::try_from(process.pid).ok().and_then(rustix::process::Pid::from_raw);
    let Some(pid) = pid else { return };
    let pidfd = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return,
        Err(error) => {
            tracing::warn!(pid = process.pid, %error, "the end of a process is not noticed at once");
            return tokio::time::sleep(PARTING).await;
        }
    };
    // Only now the number cannot become another's unseen.
    if !process.lives() {
        return;
    }
    // SAFETY: it owns the descriptor, which is closed after this is done with it.
    if let Ok(pidfd) = unsafe { AsyncFd::register(pidfd) } {
        let _ = pidfd.readable().await;
    }
}

#[tonic::async_trait]
impl Router for Service {
    async fn mount(
        &self,
        request: Request<MountRequest>,
    ) -> std::result::Result<Response<MountReply>, Status> {
        let MountRequest { view, pid } = request.into_inner();
        let name = view.clone();
        if self.using(move |routes| routes.mount(&view, pid)).await? {
            self.watch(name);
        }
        Ok(Response::new(MountReply {}))
    }

    async fn remount(
        &self,
        request: Request<RemountRequest>,
    ) -> std::result::Result<Response<RemountReply>, Status> {
        let RemountRequest { view, change } = request.into_inner();
        let alteration = change.map(from_change).transpose().map_err(|error| to_status(&error))?;
        self.using(move |routes| routes.remount(&view, alteration)).await?;
        Ok(Response::new(RemountReply {}))
    }

    async fn unmount(
        &self,
        request: Request<UnmountRequest>,
    ) -> std::result::Result<Response<UnmountReply>, Status> {
        let what =
            request.into_inner().what.ok_or_else(|| Status::invalid_argument("a view or a process"))?;
        let unmounted = self.using(move |routes| match what {
            unmount_request::What::View(name) => routes.unmount_view(&name),
            unmount_request::What::Pid(pid) => routes.unmount_process(pid),
        });
        Ok(Response::new(UnmountReply { views: unmounted.await? }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> std::result::Result<Response<StatusReply>, Status> {
        // Whoever only looks does not keep it from ending.
        let views = self.blocking(|routes| Ok(routes.list())).await?;
        Ok(Response::new(StatusReply { pid: std::process::id(), views }))
    }

    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> std::result::Result<Response<ShutdownReply>, Status> {
        self.end.notify_one();
        Ok(Response::new(ShutdownReply {}))
    }
}
