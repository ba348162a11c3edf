//! One life of a machine: from being restored to its end.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_contract::{BackendError, BootConfig, ErrorKind, Hypervisor, MemoryKind, Vm, VmConfig, VmHandle};
use kiln_link::message::{self, Answer, Configure, Failure, FailureKind, Input, Output, Process, Request};
use kiln_link::{HostLink, HostSession, LinkError, Opener, Parker, Stream, service};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::saved::Saved;
use crate::template::{DISK_SIZE, Shape};
use crate::{plan, stream};

/// How long a guest may take to say hello, unless something else is said. Software emulation on a busy host is slow; a guest
/// that panics ends at once.
const TO_BOOT: Duration = Duration::from_secs(180);
/// For how many seconds a guest that boots is waited for.
const SETTING: &str = "KILN_BOOT_TIMEOUT";
/// How long a restored guest may take to answer for the first time.
const TO_BEGIN: Duration = Duration::from_secs(30);
/// How long a guest may take to rehearse, when everything else on the host goes first.
const TO_REHEARSE: Duration = Duration::from_secs(120);
/// How often a spare machine does what a start will ask of it. The second time still goes other ways than the first.
const REHEARSALS: u32 = 3;

/// What a machine is made of on this host.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Where the hypervisor may put sockets and logs.
    pub directory: PathBuf,
    /// The memory file: that of what is restored, by a name that it keeps for as long as the machine runs.
    pub memory: PathBuf,
    /// The image disk.
    pub image: PathBuf,
    /// The writable disk.
    pub disk: PathBuf,
    /// Its size in bytes.
    pub disk_size: u64,
    /// The host's end of its network device, if its shape has one.
    pub network: Option<Arc<OwnedFd>>,
}

/// A running machine, and the session with its guest.
pub struct Life {
    vm: Box<dyn Vm>,
    session: HostSession,
}

impl std::fmt::Debug for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Life").field("pid", &self.vm.pid()).finish_non_exhaustive()
    }
}

impl Life {
    /// Restores a machine that was saved, a template or another. The guest waits to be configured. Must be called in a runtime, on a thread that outlives the machine.
    ///
    /// # Errors
    /// What was saved cannot be restored here, or its guest does not answer.
    pub async fn restore(
        hypervisor: &dyn Hypervisor,
        saved: &Saved,
        paths: &Paths,
    ) -> Result<Self, BackendError> {
        let config = config(saved.record().shape, None, paths);
        let mut vm = hypervisor.restore(&config, saved.directory())?;
        let link = HostLink::restored(stream::adopt(vm.link()?)?);
        let session = begin(&mut *vm, link).await?;
        if paths.disk_size != DISK_SIZE {
            // The guest saw the template's disk until now.
            vm.disk_resized(paths.disk_size)?;
        }
        Ok(Self { vm, session })
    }

    /// Restores a machine, has its guest rehearse what a start will ask of it, and gives it up for another process to adopt.
    /// The machine lives until it is dropped here. Must be called in a runtime, on a thread that outlives the machine.
    pub(crate) async fn rehearsed(
        hypervisor: &dyn Hypervisor,
        saved: &Saved,
        paths: &Paths,
    ) -> Result<(Box<dyn Vm>, VmHandle), BackendError> {
        let mut vm = hypervisor.restore(&config(saved.record().shape, None, paths), saved.directory())?;
        let socket = vm.link()?;
        let copy = socket.try_clone();
        let copy = copy.map_err(|error| BackendError::caused("cannot use a socket", error))?;
        let session = begin(&mut *vm, HostLink::restored(stream::adopt(socket)?)).await?;
        let life = Self { vm, session };
        let rehearsed = tokio::time::timeout(TO_REHEARSE, async {
            for _ in 0..REHEARSALS {
                life.rehearse().await?;
            }
            Ok::<_, BackendError>(())
        });
        rehearsed.await.map_err(|_| lost(LinkError::TimedOut { what: "rehearse", after: TO_REHEARSE }))??;
        let parked = life.parker().park(TO_BEGIN).await;
        let parked =
            parked.map_err(|error| BackendError::caused("cannot keep the machine waiting", error))?;
        let Self { mut vm, session } = life;
        drop(session);
        // Its guest stays parked: nothing of this session is said any more.
        drop(parked);
        let handle = vm.hand_over(copy)?;
        Ok((vm, handle))
    }

    /// Goes on with a machine that another process has given up, as if it had been restored here. `owner` is the connection to
    /// that process. The guest waits to be configured. Must be called in a runtime.
    pub(crate) async fn adopt(
        hypervisor: &dyn Hypervisor,
        saved: &Saved,
        paths: &Paths,
        (handle, owner): (VmHandle, OwnedFd),
    ) -> Result<Self, BackendError> {
        let mut vm = hypervisor.adopt(&config(saved.record().shape, None, paths), handle, owner)?;
        let link = HostLink::restored(stream::adopt(vm.link()?)?);
        let session = begin(&mut *vm, link).await?;
        Ok(Self { vm, session })
    }

    /// Boots a machine. The guest waits to be configured. Must be called in a runtime, on a thread that outlives the machine.
    ///
    /// # Errors
    /// Its guest does not get ready.
    pub async fn boot(
        hypervisor: &dyn Hypervisor,
        shape: Shape,
        boot: BootConfig,
        paths: &Paths,
    ) -> Result<Self, BackendError> {
        let mut vm = hypervisor.create(&config(shape, Some(boot), paths))?;
        let stream = stream::adopt(vm.link()?)?;
        vm.resume()?;
        let link = greet(stream).await?;
        let session = begin(&mut *vm, link).await?;
        Ok(Self { vm, session })
    }

    /// The machine.
    pub fn vm(&mut self) -> &mut dyn Vm {
        &mut *self.vm
    }

    /// The session with its guest.
    pub fn session(&mut self) -> &mut HostSession {
        &mut self.session
    }

    /// What makes its guest hold still.
    pub fn parker(&self) -> Parker {
        self.session.parker()
    }

    /// What opens streams to its guest.
    pub fn opener(&self) -> Opener {
        self.session.opener()
    }

    /// Has the guest make the root of its image, for whoever it will be.
    ///
    /// # Errors
    /// The guest's own, or those of the link.
    pub async fn prepare(&self) -> Result<(), BackendError> {
        let files = plan::HOST_FILES.map(str::to_owned).to_vec();
        ask(&self.opener(), Request::Prepare { files }).await.map(drop)
    }

    /// Has the guest do once what a start will ask of it, and leave no trace of it.
    async fn rehearse(&self) -> Result<(), BackendError> {
        ask(&self.opener(), Request::Rehearse(Box::new(plan::rehearsal()?))).await?;
        for program in plan::REHEARSED {
            let process = Box::new(plan::rehearsed(program));
            match start(&self.opener(), Input::Rehearse { process }).await {
                Ok(stream) => return ended(stream).await,
                // Not every image has it.
                Err(error) if error.kind() == ErrorKind::CommandNotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the guest who it is.
    ///
    /// # Errors
    /// The guest's own, or those of the link.
    pub async fn configure(&self, configure: Configure) -> Result<(), BackendError> {
        ask(&self.opener(), Request::Configure(Box::new(configure))).await.map(drop)
    }

    /// Starts a process. The stream then carries its [`Input`] and [`Output`].
    ///
    /// # Errors
    /// The guest's own: no such command, no such user.
    pub async fn start(&self, number: u32, process: Process) -> Result<Stream, BackendError> {
        start(&self.opener(), Input::Start { number, process: Box::new(process) }).await
    }
}

fn config(shape: Shape, boot: Option<BootConfig>, paths: &Paths) -> VmConfig {
    VmConfig {
        directory: paths.directory.clone(),
        cpus: shape.cpus,
        memory: shape.memory,
        memory_file: paths.memory.clone(),
        memory_kind: MemoryKind::CopyOnWrite,
        boot,
        image: paths.image.clone(),
        disk: paths.disk.clone(),
        network: paths.network.clone(),
    }
}

/// How long a guest that boots may take: as the environment says, or as it does not.
///
/// # Errors
/// The environment says something else.
pub(crate) fn to_boot() -> Result<Duration, BackendError> {
    to_boot_of(&std::env::var_os(SETTING).unwrap_or_default().to_string_lossy())
}

fn to_boot_of(said: &str) -> Result<Duration, BackendError> {
    match said.trim() {
        "" => Ok(TO_BOOT),
        seconds => match seconds.parse() {
            Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
            _ => Err(BackendError::new(
                ErrorKind::Invalid,
                format!("`{said}` in {SETTING} is not how long a guest may take to boot"),
            )
            .hint(format!(
                "{SETTING} is a whole number of seconds, at least 1; unset, it is {}",
                TO_BOOT.as_secs()
            ))),
        },
    }
}

/// Waits until a guest that boots says that it is ready.
pub(crate) async fn greet<S>(stream: S) -> Result<HostLink<S>, BackendError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    greet_within(stream, to_boot()?).await
}

async fn greet_within<S>(stream: S, patience: Duration) -> Result<HostLink<S>, BackendError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match tokio::time::timeout(patience, HostLink::greet(stream)).await {
        Ok(Ok(link)) => Ok(link),
        Ok(Err(LinkError::Closed)) => {
            Err(BackendError::new(ErrorKind::Failed, "the guest ended before it was ready"))
        }
        Ok(Err(error)) => Err(BackendError::caused("the guest did not get ready", error)),
        Err(_) => Err(BackendError::caused(
            "the guest did not get ready",
            LinkError::TimedOut { what: "say hello", after: patience },
        )
        .hint(format!("give it longer with {SETTING}, in seconds"))),
    }
}

/// Begins to speak to a guest.
async fn begin<S>(vm: &mut dyn Vm, link: HostLink<S>) -> Result<HostSession, BackendError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let doing = "cannot begin to speak to the guest";
    match tokio::time::timeout(TO_BEGIN, link.begin()).await {
        Ok(Ok(session)) => Ok(session),
        Ok(Err(error)) => {
            let lost = BackendError::caused(doing, error);
            Err(vm.last_words().unwrap_or(lost))
        }
        Err(_) => Err(BackendError::caused(doing, LinkError::TimedOut { what: "answer", after: TO_BEGIN })),
    }
}

/// Asks the guest's control service.
pub(crate) async fn ask(opener: &Opener, request: Request) -> Result<Answer, BackendError> {
    let mut stream = opener.open(service::CONTROL).await.map_err(lost)?;
    message::send(&mut stream, &request).await.map_err(lost)?;
    match message::receive(&mut stream).await.map_err(lost)? {
        Some(Answer::Failed(failure)) => Err(refused(&failure)),
        Some(answer) => Ok(answer),
        None => Err(lost(LinkError::Closed)),
    }
}

/// Begins with the guest's process service.
pub(crate) async fn start(opener: &Opener, first: Input) -> Result<Stream, BackendError> {
    let attaches = matches!(first, Input::Attach { .. });
    let mut stream = opener.open(service::PROCESS).await.map_err(lost)?;
    message::send(&mut stream, &first).await.map_err(lost)?;
    if attaches {
        return Ok(stream);
    }
    match message::receive(&mut stream).await.map_err(lost)? {
        Some(Output::Started) => Ok(stream),
        Some(Output::Failed(failure)) => Err(refused(&failure)),
        Some(_) => Err(BackendError::new(ErrorKind::Failed, "the guest speaks before the process runs")),
        None => Err(lost(LinkError::Closed)),
    }
}

/// Waits until a process has ended, whatever it says.
async fn ended(mut stream: Stream) -> Result<(), BackendError> {
    loop {
        match message::receive(&mut stream).await.map_err(lost)? {
            Some(Output::Exited(_)) => return Ok(()),
            Some(_) => {}
            None => return Err(lost(LinkError::Closed)),
        }
    }
}

/// The link has ended.
pub(crate) fn lost(error: LinkError) -> BackendError {
    BackendError::caused("lost the guest", error)
}

/// The guest's own error. It is not trusted with its length or its characters.
pub(crate) fn refused(failure: &Failure) -> BackendError {
    let what: String = failure.what.chars().filter(|c| !c.is_control()).take(1000).collect();
    let kind = match failure.kind {
        FailureKind::NotFound => ErrorKind::NotFound,
        FailureKind::Invalid => ErrorKind::Invalid,
        FailureKind::CommandNotFound => ErrorKind::CommandNotFound,
        FailureKind::CommandNotExecutable => ErrorKind::CommandNotExecutable,
        FailureKind::Failed => ErrorKind::Failed,
    };
    BackendError::new(kind, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncWriteExt as _, duplex};

    #[test]
    fn a_guest_may_take_as_long_as_the_environment_says() {
        for (said, seconds) in [("", 180), ("7", 7), (" 600\n", 600)] {
            assert_eq!(to_boot_of(said).unwrap().as_secs(), seconds, "{said:?}");
        }
        for said in ["0", "-1", "1.5", "10s", "long", "99999999999999999999"] {
            let error = to_boot_of(said).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(&format!("`{said}` in KILN_BOOT_TIMEOUT")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_guest_that_never_says_hello_is_not_waited_for_for_ever() {
        let greet = async |says: &[u8], stays: bool| {
            let (ours, mut theirs) = duplex(1 << 16);
            theirs.write_all(says).await.unwrap();
            let theirs = stays.then_some(theirs);
            let error = greet_within(ours, Duration::from_millis(200)).await.err().unwrap();
            drop(theirs);
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", cause.unwrap_or_default())
        };
        for (says, stays, told) in [
            (&b""[..], true, "did not say hello within"),
            (b"", false, "ended before it was ready"),
            // What the kernel or a program writes to the port before the guest has it.
            (&[0xff; 4096], true, "did not get ready"),
        ] {
            let error = greet(says, stays).await;
            assert!(error.contains(told), "{error}");
        }
    }
}
