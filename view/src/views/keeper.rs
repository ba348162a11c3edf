//! The process that keeps a view as long as somebody is in it.
//!
//! It is forked before its view's namespaces are made, and stays outside of them. It holds the view's lock; it does for
//! those inside what they may not do themselves ([`Views::alter`]), for which it listens at `ctl.sock`; and it takes the view
//! away after its last process:
//!
//! 1. Whoever enters the view watches the root of what is mounted (inotify(7)), and gives that watch to the keeper. A watch
//!    keeps nothing alive.
//! 2. When the last process has left the mount namespace, the kernel takes that away, and with the last mount of it the file
//!    system, of which the watch tells (`IN_UNMOUNT`). Nobody looks at processes.
//! 3. The record and the scratch go, or stay if they are to be kept. If who made the view does that itself, because nobody
//!    else is in it, it dismisses the keeper.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use kiln_contract::{BackendError, ErrorKind};
use nix::unistd::{ForkResult, fork};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use serde::{Deserialize, Serialize};

use super::remount::remount;
use super::{Alteration, Result, Show, ViewRecord, Views};
use crate::fuse;
use crate::sockets::{self, ShortPath};

/// Where it listens, in the view's directory.
const SOCKET: &str = "ctl.sock";

/// The longest request, in bytes.
const REQUEST_MOST: u64 = 1 << 20;

/// A request must have come after so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A view's keeper, as who enters the view has it. When this is dropped, the keeper waits for the view's last process.
#[derive(Debug)]
pub(super) struct Keeper {
    socket: UnixStream,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Failed { state: bool, what: String, hint: Option<String> },
}

impl Keeper {
    /// Starts one for a view whose lock this process has. This process must have one thread only.
    pub(super) fn start(views: &Views, name: &str, lock: &File) -> Result<Self> {
        let failed = |error: io::Error| {
            BackendError::caused(format!("cannot start the keeper of the view `{name}`"), error)
        };
        let directory = views.directory(name);
        let log = File::options().create(true).append(true).open(views.log(name)).map_err(failed)?;
        let listen = || {
            let short = ShortPath::of(&directory)?;
            let path = short.join(SOCKET);
            let _ = std::fs::remove_file(&path);
            UnixListener::bind(&path)
        };
        let listener = listen().map_err(failed)?;
        let (socket, theirs) = UnixStream::pair().map_err(failed)?;
        // SAFETY: this process has one thread, so that the child may do everything; it does not return from here.
        match unsafe { fork() }.map_err(|error| failed(error.into()))? {
            ForkResult::Parent { .. } => Ok(Self { socket }),
            ForkResult::Child => {
                let kept = std::panic::catch_unwind(|| {
                    rustix::stdio::dup2_stderr(log)?;
                    fuse::leave_caller(c"kiln-keeper", &[theirs.as_fd(), listener.as_fd(), lock.as_fd()]);
                    Kept { views, name, owner: Some(theirs), listener, watch: None, mounts: 0 }.keep()
                });
                // SAFETY: ends the child without running what the parent has registered for its own end.
                unsafe { libc::_exit(i32::from(!matches!(kept, Ok(Ok(()))))) }
            }
        }
    }

    /// Has it watch what is mounted at `at`.
    pub(super) fn watch(&self, at: &Path) -> io::Result<()> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        add_watch(&watch, at)?;
        Ok(sockets::send(&self.socket, watch.as_fd())?)
    }

    /// Sends it away, since nothing is left to be done, and waits until it has gone.
    pub(super) fn dismiss(mut self) {
        if self.socket.write_all(b"d").is_ok() {
            let _ = self.socket.read(&mut [0]);
        }
    }
}

/// Watches the file system at a path for its end.
pub(super) fn add_watch(watch: impl AsFd, at: &Path) -> io::Result<()> {
    inotify::add_watch(watch, at, inotify::WatchFlags::DELETE_SELF | inotify::WatchFlags::ONLYDIR)?;
    Ok(())
}

/// Asks the keeper of a view for something. `None` if it has none.
pub(super) fn ask(views: &Views, name: &str, alteration: &Alteration) -> Result<Option<()>> {
    let failed =
        |error: io::Error| BackendError::caused(format!("cannot ask the keeper of the view `{name}`"), error);
    let connect = || UnixStream::connect(ShortPath::of(&views.directory(name))?.join(SOCKET));
    let mut stream = match connect() {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    let request = serde_json::to_vec(alteration).map_err(|error| failed(error.into()))?;
    stream.write_all(&request).and_then(|()| stream.shutdown(std::net::Shutdown::Write)).map_err(failed)?;
    let mut answer = Vec::new();
    stream.take(REQUEST_MOST).read_to_end(&mut answer).map_err(failed)?;
    match serde_json::from_slice(&answer).map_err(|error| failed(error.into()))? {
        Answer::Done => Ok(Some(())),
        Answer::Failed { state, what, hint } => {
            let error = BackendError::new(if state { ErrorKind::State } else { ErrorKind::Failed }, what);
            Err(match hint {
                Some(hint) => error.hint(hint),
                None => error,
            })
        }
    }
}

/// What the keeper itself knows.
struct Kept<'a> {
    views: &'a Views,
    name: &'a str,
    /// Who made the view, as long as that is there.
    owner: Option<UnixStream>,
    listener: UnixListener,
    watch: Option<OwnedFd>,
    /// How many file systems of the view are there: after a remount also earlier ones, as long as something is open in them.
    mounts: usize,
}

impl Kept<'_> {
    fn keep(mut self) -> io::Result<()> {
        loop {
            match (&self.owner, &self.watch) {
                (None, Some(_)) if self.mounts == 0 => return self.take_away(),
                // Nothing was mounted, or it is not known where: who comes next sees to it.
                (None, None) => return Ok(()),
                _ => {}
            }
            let (mut owner, mut asked, mut told) = (false, false, false);
            {
                let mut ready = vec![PollFd::new(&self.listener, PollFlags::IN)];
                ready.extend(self.owner.iter().map(|owner| PollFd::new(owner, PollFlags::IN)));
                ready.extend(self.watch.iter().map(|watch| PollFd::new(watch, PollFlags::IN)));
                match poll(&mut ready, None) {
                    Err(rustix::io::Errno::INTR) => continue,
                    polled => polled?,
                };
                let mut ready = ready.iter().map(|ready| !ready.revents().is_empty());
                asked |= ready.next().unwrap_or(false);
                owner |= self.owner.is_some() && ready.next().unwrap_or(false);
                told |= self.watch.is_some() && ready.next().unwrap_or(false);
            }
            if owner && !self.hear()? {
                return Ok(());
            }
            if told {
                self.count()?;
            }
            if asked && let Ok((stream, _)) = self.listener.accept() {
                // Who asks badly has the answer to that, if any.
                if let Err(error) = self.answer(stream) {
                    tracing::warn!(%error, "a request to the keeper of a view has failed");
                }
            }
        }
    }

    /// What the maker of the view says. `false` if that was the last.
    fn hear(&mut self) -> io::Result<bool> {
        let Some(owner) = &self.owner else { return Ok(true) };
        match sockets::receive(owner)? {
            Some(Some(watch)) => {
                self.watch = Some(watch);
                self.mounts = 1;
            }
            // It has seen to everything, and dismisses this process.
            Some(None) => return Ok(false),
            None => self.owner = None,
        }
        Ok(true)
    }

    /// Counts the file systems that are gone.
    fn count(&mut self) -> io::Result<()> {
        let Some(watch) = &self.watch else { return Ok(()) };
        let mut buffer = [MaybeUninit::uninit(); 1024];
        let mut events = inotify::Reader::new(watch, &mut buffer);
        loop {
            match events.next() {
                Ok(event) => {
                    self.mounts -=
                        usize::from(event.events().contains(inotify::ReadFlags::IGNORED)).min(self.mounts);
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn answer(&mut self, mut stream: UnixStream) -> io::Result<()> {
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
            return Ok(());
        }
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut request = Vec::new();
        (&stream).take(REQUEST_MOST).read_to_end(&mut request)?;
        let (views, watch) = (self.views, self.watch.as_ref());
        let mut show = watch
            .map(|watch| move |old: &ViewRecord, new: &ViewRecord, how| remount(views, old, new, how, watch));
        let show = show.as_mut().map(|show| show as Show<'_>);
        let altered = serde_json::from_slice(&request)
            .map_err(|error| BackendError::caused("the request makes no sense", error))
            .and_then(|alteration: Alteration| views.apply(self.name, &alteration, show));
        let answer = match altered {
            Ok(mounted) => {
                self.mounts += usize::from(mounted);
                Answer::Done
            }
            Err(error) => Answer::Failed {
                state: error.kind() == ErrorKind::State,
                what: error.with_causes(),
                hint: error.hint_text().map(str::to_owned),
            },
        };
        stream.write_all(&serde_json::to_vec(&answer)?)
    }

    /// Nobody is in the view any more.
    fn take_away(self) -> io::Result<()> {
        let ended = self.views.find(self.name).and_then(|record| self.views.end(record));
        ended.map_err(io::Error::other)
    }
}
