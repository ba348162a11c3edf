//! How a link goes from one life of a machine to the next.
//!
//! A machine may be saved only while its guest is *parked*: the guest has said that it will send nothing until it is spoken
//! to, and the host has sent nothing after asking for that. Then no frame is under way in any buffer of the device, and the
//! saved guest can be woken by another host without either having to guess what the other has seen.
//!
//! ```text
//!   guest                                  host
//!     |-- Parked{Hello} -------------------->|   booted: a template is saved here
//!     |<------------------- Begin{version} --|   the first life, or that of a restored template
//!     |-- Begun ---------------------------->|
//!     |<=========== Data (yamux) ===========>|
//!     |<----------------------------- Park --|   a fork or a snapshot is to be made
//!     |-- Parked{Hello} -------------------->|   saved here
//!     |<------------------------- Continue --|   the original goes on, with every stream
//!     |<=========== Data (yamux) ===========>|
//!     |              or                      |
//!     |<------------------- Begin{version} --|   the copy: new multiplexer, no streams
//!     |-- Begun ---------------------------->|
//! ```
//!
//! While the host waits for `Parked` it goes on reading, so that a guest in the middle of a bulk transfer can get there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex,
};
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};

use crate::frame::{self, Frame, HEADER, Kind, MAX_DATA};
use crate::message::{self, Hello};
use crate::mux::{End, Session};
use crate::{LinkError, VERSION};

/// Bytes between the multiplexer and the frames, each way.
const PIPE: usize = 4 * MAX_DATA;
/// What a guest may still send after it was asked to park, in bytes.
const MAX_BEFORE_PARKED: usize = 32 << 20;

type Shared<W> = Arc<Mutex<W>>;

fn unexpected(frame: &Frame, expected: &'static str) -> LinkError {
    LinkError::Unexpected { got: format!("{:?}", frame.kind), expected }
}

/// Stops its task when it is dropped.
#[derive(Debug)]
struct Aborting(AbortHandle);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Multiplexer to wire: each piece becomes a frame. Waits while somebody holds the writer.
fn spawn_outgoing<W: AsyncWrite + Unpin + Send + 'static>(
    mut mux: ReadHalf<DuplexStream>,
    writer: Shared<W>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut buffer = vec![0; HEADER + MAX_DATA];
        while let Ok(count @ 1..) = mux.read(&mut buffer[HEADER..]).await {
            let mut writer = writer.lock().await;
            if frame::write_in_place(&mut *writer, Kind::Data, &mut buffer[..HEADER + count]).await.is_err() {
                break;
            }
        }
    })
}

// The host's end.

/// The host's end of a link to a guest that is parked: booted, or restored.
#[derive(Debug)]
pub struct HostLink<S> {
    stream: S,
    hello: Option<Hello>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> HostLink<S> {
    /// Waits until a booting guest says that it is there.
    ///
    /// # Errors
    /// [`LinkError::Closed`] if it ends first, [`LinkError::Unexpected`] if it says something else.
    pub async fn greet(mut stream: S) -> Result<Self, LinkError> {
        let first = frame::read(&mut stream).await?.ok_or(LinkError::Closed)?;
        if first.kind != Kind::Parked {
            return Err(unexpected(&first, "Parked"));
        }
        let hello = message::decode(&first.payload)?;
        Ok(Self { stream, hello: Some(hello) })
    }

    /// A link to a guest that was saved while it was parked: it says nothing until it is spoken to.
    pub fn restored(stream: S) -> Self {
        Self { stream, hello: None }
    }

    /// What the guest said of itself, if it was this end that it said it to.
    pub fn hello(&self) -> Option<&Hello> {
        self.hello.as_ref()
    }

    /// Begins a new life: a fresh multiplexer without streams.
    ///
    /// # Errors
    /// [`LinkError::Version`] if the guest speaks another version; those of the stream.
    pub async fn begin(mut self) -> Result<HostSession, LinkError> {
        frame::write(&mut self.stream, Kind::Begin, &VERSION.to_le_bytes()).await?;
        let answer = frame::read(&mut self.stream).await?.ok_or(LinkError::Closed)?;
        match answer.kind {
            Kind::Begun => {}
            // A guest that cannot speak this version stays parked and says who it is.
            Kind::Parked => {
                let hello: Hello = message::decode(&answer.payload)?;
                return Err(LinkError::Version { ours: VERSION, theirs: hello.version });
            }
            _ => return Err(unexpected(&answer, "Begun")),
        }
        let (reader, writer) = tokio::io::split(self.stream);
        let writer: Shared<Box<dyn AsyncWrite + Unpin + Send>> = Arc::new(Mutex::new(Box::new(writer)));
        let (mux, pipe) = duplex(PIPE);
        let (from_mux, to_mux) = tokio::io::split(pipe);
        let (parking, asked) = mpsc::channel(1);
        let mut outgoing = spawn_outgoing(from_mux, Arc::clone(&writer));
        let (other, own) = (Aborting(outgoing.abort_handle()), Aborting(outgoing.abort_handle()));
        let incoming = tokio::spawn(async move {
            let _other = other;
            // With one direction the other ends, and with both the multiplexer, even one that waits to write.
            tokio::select! {
                ended = host_incoming(reader, to_mux, asked) => if let Err(error) = ended {
                    tracing::debug!("the link ends: {error}");
                },
                _ = &mut outgoing => {}
            }
        });
        Ok(HostSession {
            session: Session::start(mux, End::Host),
            writer,
            parking,
            _tasks: [own, Aborting(incoming.abort_handle())],
        })
    }
}

/// Wire to multiplexer. Between a request to park and the guest's answer, what comes is kept here: the multiplexer may be
/// waiting to write, and must not keep the answer from being read.
async fn host_incoming<R: AsyncRead + Unpin + Send + 'static>(
    mut reader: R,
    mut mux: WriteHalf<DuplexStream>,
    mut asked: mpsc::Receiver<oneshot::Sender<Result<Hello, LinkError>>>,
) -> Result<(), LinkError> {
    // A read of a frame must not be cut short, so it is a task of its own.
    let (frames, mut arriving) = mpsc::channel::<Result<Frame, LinkError>>(1);
    let reading = tokio::spawn(async move {
        loop {
            let frame = match frame::read(&mut reader).await {
                Ok(Some(frame)) => Ok(frame),
                Ok(None) => Err(LinkError::Closed),
                Err(error) => Err(error),
            };
            let last = frame.is_err();
            if frames.send(frame).await.is_err() || last {
                return;
            }
        }
    });
    let _reading = Aborting(reading.abort_handle());
    // In the order in which they were asked: one that was given up is answered too, later.
    let mut parking: VecDeque<oneshot::Sender<Result<Hello, LinkError>>> = VecDeque::new();
    let mut kept: Vec<u8> = Vec::new();
    loop {
        tokio::select! {
            biased;
            Some(reply) = asked.recv() => parking.push_back(reply),
            written = mux.write(&kept), if !kept.is_empty() => {
                kept.drain(..written?);
            }
            arrived = arriving.recv(), if kept.is_empty() || !parking.is_empty() => {
                let frame = arrived.ok_or(LinkError::Closed)??;
                match frame.kind {
                    Kind::Data if kept.is_empty() => kept = frame.payload,
                    Kind::Data => {
                        if kept.len() + frame.payload.len() > MAX_BEFORE_PARKED {
                            return Err(LinkError::TooLong {
                                what: "what is sent before parking",
                                length: (kept.len() + frame.payload.len()) as u64,
                                most: MAX_BEFORE_PARKED as u64,
                            });
                        }
                        kept.extend_from_slice(&frame.payload);
                    }
                    Kind::Parked => match parking.pop_front() {
                        Some(reply) => { let _ = reply.send(message::decode(&frame.payload)); }
                        None => return Err(unexpected(&frame, "Data")),
                    },
                    _ => return Err(unexpected(&frame, "Data")),
                }
            }
        }
    }
}

/// The host's end of one life of a machine.
pub struct HostSession {
    /// The streams.
    pub session: Session,
    writer: Shared<Box<dyn AsyncWrite + Unpin + Send>>,
    parking: mpsc::Sender<oneshot::Sender<Result<Hello, LinkError>>>,
    _tasks: [Aborting; 2],
}

impl std::fmt::Debug for HostSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostSession").field("session", &self.session).finish_non_exhaustive()
    }
}

impl std::ops::Deref for HostSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

/// Keeps the guest parked: the machine may be saved. Dropping it without [`resume`](Self::resume) leaves the guest parked.
#[must_use]
pub struct Parked {
    writer: OwnedMutexGuard<Box<dyn AsyncWrite + Unpin + Send>>,
}

impl std::fmt::Debug for Parked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parked")
    }
}

impl HostSession {
    /// What can park the guest, apart from the session's streams.
    pub fn parker(&self) -> Parker {
        Parker { writer: Arc::clone(&self.writer), parking: self.parking.clone() }
    }
}

/// Parks the guest of a [`HostSession`].
#[derive(Clone)]
pub struct Parker {
    writer: Shared<Box<dyn AsyncWrite + Unpin + Send>>,
    parking: mpsc::Sender<oneshot::Sender<Result<Hello, LinkError>>>,
}

impl std::fmt::Debug for Parker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parker")
    }
}

impl Parker {
    /// Makes the guest hold still until [`Parked::resume`].
    ///
    /// # Errors
    /// [`LinkError::TimedOut`] if it does not within `patience`: it is then told to go on. Those of the stream.
    pub async fn park(&self, patience: Duration) -> Result<Parked, LinkError> {
        let deadline = tokio::time::Instant::now() + patience;
        let late = |_| LinkError::TimedOut { what: "park", after: patience };
        // A guest that does not read keeps whoever writes to it waiting.
        let writer = Arc::clone(&self.writer).lock_owned();
        let mut writer = tokio::time::timeout_at(deadline, writer).await.map_err(late)?;
        let (reply, parked) = oneshot::channel();
        self.parking.send(reply).await.map_err(|_| LinkError::Closed)?;
        // Half a frame cannot be taken back, so it is written whole, however long that takes.
        let asking = tokio::spawn(async move {
            let asked = frame::write(&mut *writer, Kind::Park, &[]).await;
            asked.map(|()| writer)
        });
        match tokio::time::timeout_at(deadline, parked).await {
            Ok(Ok(hello)) => {
                hello?;
                // It has been asked: it answered.
                Ok(Parked { writer: asking.await.map_err(|_| LinkError::Closed)?? })
            }
            Ok(Err(_)) => Err(LinkError::Closed),
            Err(elapsed) => {
                // Should it get there later, it finds this and goes on.
                tokio::spawn(async move {
                    if let Ok(Ok(mut writer)) = asking.await {
                        let _ = frame::write(&mut *writer, Kind::Continue, &[]).await;
                    }
                });
                Err(late(elapsed))
            }
        }
    }
}

impl Parked {
    /// Lets the guest go on, with every stream as it was.
    ///
    /// # Errors
    /// Those of the stream.
    pub async fn resume(mut self) -> Result<(), LinkError> {
        frame::write(&mut *self.writer, Kind::Continue, &[]).await
    }
}

// The guest's end.

/// What a guest does so that nothing of its workload happens between being saved and being told who it is.
pub trait Hold: Send + Sync + 'static {
    /// Stops the workload, before the guest says that it is parked.
    fn hold(&self) -> impl Future<Output = ()> + Send;
    /// Lets it go on, when the same life does. At the start of another, the guest does so itself, once it is configured.
    fn release(&self) -> impl Future<Output = ()> + Send;
}

/// Has no workload to hold.
impl Hold for () {
    async fn hold(&self) {}

    async fn release(&self) {}
}

/// The guest's end of a link. Outlives the lives of its machine.
#[derive(Debug)]
pub struct GuestLink<S: AsyncRead + AsyncWrite, H = ()> {
    hello: Hello,
    hold: Arc<H>,
    state: State<S>,
}

#[derive(Debug)]
enum State<S: AsyncRead + AsyncWrite> {
    /// Booted: nothing was said.
    Silent(ReadHalf<S>, WriteHalf<S>),
    /// A life goes on, or has ended: gives the halves back with the frame that began the next.
    Alive(JoinHandle<Result<Ending<S>, LinkError>>),
    Broken,
}

#[derive(Debug)]
struct Ending<S: AsyncRead + AsyncWrite> {
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    begin: Frame,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> GuestLink<S> {
    /// The guest's end over `stream`; `hello` is said when it parks.
    pub fn new(stream: S, hello: Hello) -> Self {
        Self::holding(stream, hello, Arc::new(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static, H: Hold> GuestLink<S, H> {
    /// The guest's end over `stream`, of a guest with a workload.
    pub fn holding(stream: S, hello: Hello, hold: Arc<H>) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self { hello, hold, state: State::Silent(reader, writer) }
    }

    /// Waits for the next life: parked until the host begins one. The session of the one before has ended then.
    ///
    /// # Errors
    /// Those of the stream, and a host that breaks the protocol. There is no going on after one.
    pub async fn next_session(&mut self) -> Result<Session, LinkError> {
        let (mut reader, mut writer, mut begin) = match std::mem::replace(&mut self.state, State::Broken) {
            State::Silent(mut reader, mut writer) => {
                frame::write(&mut writer, Kind::Parked, &message::encode(&self.hello)).await?;
                let begin = frame::read(&mut reader).await?.ok_or(LinkError::Closed)?;
                (reader, writer, begin)
            }
            State::Alive(life) => {
                let ending = life.await.map_err(|error| LinkError::Mux(error.to_string()))??;
                (ending.reader, ending.writer, ending.begin)
            }
            State::Broken => return Err(LinkError::Closed),
        };
        loop {
            match begin.kind {
                Kind::Begin if begin.payload == VERSION.to_le_bytes() => break,
                // Somebody else's version, or asked to park where there is no life: still parked, and says so.
                Kind::Begin | Kind::Park => {
                    frame::write(&mut writer, Kind::Parked, &message::encode(&self.hello)).await?;
                }
                Kind::Continue => {}
                _ => return Err(unexpected(&begin, "Begin")),
            }
            begin = frame::read(&mut reader).await?.ok_or(LinkError::Closed)?;
        }
        frame::write(&mut writer, Kind::Begun, &[]).await?;
        let (mux, pipe) = duplex(PIPE);
        let (from_mux, to_mux) = tokio::io::split(pipe);
        let session = Session::start(mux, End::Guest);
        let hello = message::encode(&self.hello);
        let hold = Arc::clone(&self.hold);
        self.state = State::Alive(tokio::spawn(async move {
            let writer = Arc::new(Mutex::new(writer));
            let outgoing = spawn_outgoing(from_mux, Arc::clone(&writer));
            let ended = guest_incoming(&mut reader, to_mux, &writer, &hello, &*hold).await;
            outgoing.abort();
            let _ = outgoing.await;
            let begin = ended?;
            let writer = Arc::into_inner(writer).ok_or(LinkError::Closed)?.into_inner();
            Ok(Ending { reader, writer, begin })
        }));
        Ok(session)
    }
}

/// Wire to multiplexer, until the host begins another life.
async fn guest_incoming<R: AsyncRead + Unpin, W: AsyncWrite + Unpin, H: Hold>(
    reader: &mut R,
    mut mux: WriteHalf<DuplexStream>,
    writer: &Shared<W>,
    hello: &[u8],
    hold: &H,
) -> Result<Frame, LinkError> {
    // Held while parked: nothing else is written.
    let mut parked = None;
    loop {
        let frame = frame::read(reader).await?.ok_or(LinkError::Closed)?;
        match (frame.kind, parked.is_some()) {
            (Kind::Data, false) => {
                // A multiplexer that has given up does not read; the host will begin anew or end the machine.
                let _ = mux.write_all(&frame.payload).await;
            }
            (Kind::Park, false) => {
                hold.hold().await;
                let mut held = Arc::clone(writer).lock_owned().await;
                frame::write(&mut *held, Kind::Parked, hello).await?;
                parked = Some(held);
            }
            (Kind::Continue, true) => {
                parked = None;
                hold.release().await;
            }
            (Kind::Begin, true) => return Ok(frame),
            _ => {
                return Err(unexpected(
                    &frame,
                    if parked.is_some() { "Continue or Begin" } else { "Data or Park" },
                ));
            }
        }
    }
}
