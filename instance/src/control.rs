//! What is said over a supervisor's control socket (`ctl.sock`).
//!
//! A stream of frames in both directions:
//!
//! ```text
//! byte 0      kind: 1 message (JSON), 2 standard input, 3 end of standard input, 4 standard output, 5 standard error
//! bytes 1–4   length of what follows, little endian, at most 128 KiB
//! bytes 5–…   that
//! ```
//!
//! 1. The client sends one message: [`Request`], with the [`VERSION`] that it speaks.
//! 2. The supervisor answers with one [`Reply`]. After `Attached` the stream carries the workload's streams, further
//!    requests of the client (only `Resize` and `Signal`), and at its end one `Exited` or `Detached`. Requests that take
//!    time (`Stop`, `Wait`) are answered when it is done.
//!
//! The first connection of a supervisor that a command starts is inherited, not accepted: over it comes `Start`, and
//! the answer tells whether the workload runs. Every other connection must come from a process of the same user, or of
//! root. A client that says anything else is cut off; it is told why if it is merely newer or older.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use kiln_contract::{BackendError, ErrorKind, ExitStatus, InstanceDir};
use rustix::net::{bind, connect, listen};
use serde::{Deserialize, Serialize};

use crate::socket;

/// The version of this protocol. A supervisor outlives an upgrade of the program, so both sides look at it.
pub(crate) const VERSION: u32 = 1;
/// What a frame may carry at most: nobody makes the other side keep more than this for one frame.
pub(crate) const MAX_PAYLOAD: usize = 128 << 10;
const HEADER: usize = 5;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A [`Request`] or a [`Reply`].
    Message = 1,
    /// Bytes for the workload's standard input.
    Stdin = 2,
    /// There are no more of them.
    StdinEnd = 3,
    /// Bytes of its standard output, or of its terminal.
    Stdout = 4,
    /// Bytes of its standard error.
    Stderr = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Message, Self::Stdin, Self::StdinEnd, Self::Stdout, Self::Stderr]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// How a client wants to see the workload's streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Its standard input is sent.
    pub stdin: bool,
    /// The end of that input is the end of the workload's (as for `run -i`), not only of this client's.
    pub closes_stdin: bool,
    /// Rows and columns of the client's terminal.
    pub size: Option<(u16, u16)>,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Start the workload; then, perhaps, show its streams. Only on the inherited connection.
    Start {
        /// Attached from its first byte on.
        attach: Option<Attach>,
    },
    /// Show the workload's streams.
    Attach(Attach),
    /// The client's terminal has another size now.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters a line.
        columns: u16,
    },
    /// Send a signal to the workload's first process.
    Signal {
        /// A Linux number.
        signal: i32,
    },
    /// Ask the workload to end, kill it after a while; answered when it has ended.
    Stop {
        /// `None`: as its specification says.
        timeout: Option<Duration>,
        /// Nothing of it is needed any more: what it has not written to its disk need not be.
        #[serde(default)]
        discard: bool,
    },
    /// Suspend the workload.
    Pause,
    /// Let it go on.
    Resume,
    /// Answer when the workload has ended for good.
    Wait,
}

/// What the supervisor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// It is done.
    Done,
    /// The streams follow.
    Attached {
        /// It has a terminal.
        tty: bool,
    },
    /// The workload has ended.
    Exited {
        /// How.
        status: ExitStatus,
    },
    /// It was not done.
    Failed(Failure),
}

/// An error as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    kind: FailureKind,
    message: String,
    hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FailureKind {
    NotFound,
    Conflict,
    State,
    Invalid,
    Unsupported,
    CommandNotFound,
    CommandNotExecutable,
    #[serde(other)]
    Failed,
}

const KINDS: [(ErrorKind, FailureKind); 8] = [
    (ErrorKind::NotFound, FailureKind::NotFound),
    (ErrorKind::Conflict, FailureKind::Conflict),
    (ErrorKind::State, FailureKind::State),
    (ErrorKind::Invalid, FailureKind::Invalid),
    (ErrorKind::Unsupported, FailureKind::Unsupported),
    (ErrorKind::CommandNotFound, FailureKind::CommandNotFound),
    (ErrorKind::CommandNotExecutable, FailureKind::CommandNotExecutable),
    (ErrorKind::Failed, FailureKind::Failed),
];

impl From<&BackendError> for Failure {
    fn from(error: &BackendError) -> Self {
        let kind =
            KINDS.iter().find(|(kind, _)| *kind == error.kind()).map_or(FailureKind::Failed, |pair| pair.1);
        Self { kind, message: error.with_causes(), hint: error.hint_text().map(str::to_owned) }
    }
}

impl From<Failure> for BackendError {
    fn from(failure: Failure) -> Self {
        let kind =
            KINDS.iter().find(|(_, kind)| *kind == failure.kind).map_or(ErrorKind::Failed, |pair| pair.0);
        let error = Self::new(kind, failure.message);
        match failure.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// A message with the version of who sends it.
#[derive(Debug, Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    message: T,
}

/// A message as a whole frame.
pub(crate) fn message<T: Serialize>(message: &T) -> Vec<u8> {
    let bytes = serde_json::to_vec(&Versioned { version: VERSION, message }).unwrap_or_default();
    let mut frame = Vec::with_capacity(HEADER + bytes.len());
    append(&mut frame, Kind::Message, &bytes);
    frame
}

/// Adds bytes as frames, as many as are needed.
pub(crate) fn append(to: &mut Vec<u8>, kind: Kind, bytes: &[u8]) {
    let mut rest = bytes;
    loop {
        let (part, after) = rest.split_at(rest.len().min(MAX_PAYLOAD));
        to.push(kind as u8);
        // A part is never larger than `MAX_PAYLOAD`.
        to.extend_from_slice(&(part.len() as u32).to_le_bytes());
        to.extend_from_slice(part);
        rest = after;
        if rest.is_empty() {
            return;
        }
    }
}

/// Why a stream of frames makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ControlError {
    /// Not a frame.
    #[error("the other side of the control socket sent a frame of unknown kind {0}")]
    Kind(u8),
    /// Longer than any frame may be.
    #[error("the other side of the control socket announced a frame of {0} bytes ({MAX_PAYLOAD} at most)")]
    Length(usize),
    /// Not one of our messages.
    #[error("the other side of the control socket sent a message that makes no sense: {0}")]
    Message(String),
    /// Another version.
    #[error("the other side of the control socket speaks version {0}, this program speaks {VERSION}")]
    Version(u32),
}

/// Takes a stream of bytes apart into frames.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    bytes: Vec<u8>,
    read: usize,
}

impl Frames {
    /// Takes in what came.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.read > 0 {
            self.bytes.drain(..self.read);
            self.read = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    pub(crate) fn next(&mut self) -> Result<Option<(Kind, Vec<u8>)>, ControlError> {
        let rest = &self.bytes[self.read..];
        let Some(header) = rest.get(..HEADER) else { return Ok(None) };
        let kind = Kind::from_byte(header[0]).ok_or(ControlError::Kind(header[0]))?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(ControlError::Length(length));
        }
        let Some(payload) = rest.get(HEADER..HEADER + length) else { return Ok(None) };
        let payload = payload.to_vec();
        self.read += HEADER + length;
        Ok(Some((kind, payload)))
    }
}

/// Reads a message.
pub(crate) fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, ControlError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let bad = |error: serde_json::Error| ControlError::Message(error.to_string());
    let Version { version } = serde_json::from_slice(bytes).map_err(bad)?;
    if version != VERSION {
        return Err(ControlError::Version(version));
    }
    serde_json::from_slice::<Versioned<T>>(bytes).map(|message| message.message).map_err(bad)
}

/// The client's side of a connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    frames: Frames,
}

impl Connection {
    /// Over a socket that is connected.
    pub(crate) fn over(socket: OwnedFd) -> Self {
        Self { socket, frames: Frames::default() }
    }

    /// The socket by itself. What was read and not looked at is lost.
    pub(crate) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Connects to the supervisor of an instance; `None` if nobody listens.
    pub(crate) fn open(dir: &InstanceDir) -> io::Result<Option<Self>> {
        use rustix::io::Errno;
        let socket = socket::new(false)?;
        let connected = socket::at_short_path(&dir.control(), |address| {
            rustix::io::retry_on_intr(|| connect(&socket, address))
        });
        match connected {
            Ok(()) => Ok(Some(Self::over(socket))),
            Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The socket, to be polled.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Sends a message.
    pub fn send(&self, request: &Request) -> io::Result<()> {
        self.send_bytes(&message(request))
    }

    /// Sends whole frames.
    pub(crate) fn send_bytes(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // No SIGPIPE: the other side may be gone.
            let sent = rustix::io::retry_on_intr(|| socket::send(&self.socket, bytes, true))?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    /// The next frame; waits for it. `None` at the end of the stream.
    pub(crate) fn receive(&mut self) -> io::Result<Option<(Kind, Vec<u8>)>> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(Some(frame));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// The next frame, if it has come already.
    pub(crate) fn buffered(&mut self) -> io::Result<Option<(Kind, Vec<u8>)>> {
        self.frames.next().map_err(io::Error::other)
    }

    /// Reads once. `false` at the end of the stream.
    pub(crate) fn fill(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 16 << 10];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut buffer)) {
            Ok(0) | Err(rustix::io::Errno::CONNRESET) => Ok(false),
            Ok(read) => {
                self.frames.push(&buffer[..read]);
                Ok(true)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the answer to a request, but not for longer than until then. `false` if it does not come.
    pub fn wait_until(&mut self, end: std::time::Instant) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        loop {
            if !matches!(self.buffered(), Ok(None)) {
                return true;
            }
            let left = crate::process::timespec(end.saturating_duration_since(std::time::Instant::now()));
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left)) {
                Ok(0) => return false,
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) if matches!(self.fill(), Ok(true)) => {}
                // Its end is an answer too.
                _ => return true,
            }
        }
    }

    /// Waits for the answer to a request; `None` if the supervisor ends without one.
    pub fn reply(&mut self) -> io::Result<Option<Reply>> {
        loop {
            match self.receive()? {
                None => return Ok(None),
                Some((Kind::Message, payload)) => return parse(&payload).map(Some).map_err(io::Error::other),
                Some(_) => {}
            }
        }
    }
}

/// Listens on an instance's control socket, non-blocking; takes the place of one that is there.
pub(crate) fn listen_at(dir: &InstanceDir) -> io::Result<OwnedFd> {
    let socket = socket::new(true)?;
    socket::at_short_path(&dir.control(), |address| match bind(&socket, address) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            let _ = std::fs::remove_file(dir.control());
            bind(&socket, address)
        }
        done => done,
    })?;
    listen(&socket, 16)?;
    Ok(socket)
}

/// Accepts a connection of this user or of root; `None` if there is none, or it is somebody else's.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let socket = match socket::accept(listener) {
        Ok(socket) => socket,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let peer = socket::peer(&socket)?;
    let me = rustix::process::geteuid().as_raw();
    Ok((peer == me || peer == 0).then_some(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_contract::{Home, InstanceId};

    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut() {
        let mut stream =
            message(&Request::Stop { timeout: Some(Duration::from_millis(1500)), discard: false });
        append(&mut stream, Kind::Stdout, &vec![7; MAX_PAYLOAD + 10]);
        append(&mut stream, Kind::StdinEnd, b"");
        for step in [1, 3, 4096, stream.len()] {
            let mut frames = Frames::default();
            let mut out = Vec::new();
            for part in stream.chunks(step) {
                frames.push(part);
                while let Some(frame) = frames.next().unwrap() {
                    out.push(frame);
                }
            }
            let [(Kind::Message, request), (Kind::Stdout, a), (Kind::Stdout, b), (Kind::StdinEnd, end)] =
                &out[..]
            else {
                panic!("{step}: {} frames", out.len());
            };
            assert_eq!(
                parse::<Request>(request).unwrap(),
                Request::Stop { timeout: Some(Duration::from_millis(1500)), discard: false }
            );
            assert_eq!((a.len(), b.len(), end.len()), (MAX_PAYLOAD, 10, 0));
        }
    }

    #[test]
    fn hostile_frames_are_refused_before_they_are_kept() {
        let table: [(&[u8], ControlError); 3] = [
            (&[9, 0, 0, 0, 0], ControlError::Kind(9)),
            (&[2, 255, 255, 255, 255], ControlError::Length(0xffff_ffff)),
            (&[1, 1, 0, 2, 0], ControlError::Length(0x2_0001)),
        ];
        for (bytes, error) in table {
            let mut frames = Frames::default();
            frames.push(bytes);
            assert_eq!(frames.next(), Err(error));
        }
        assert_eq!(parse::<Request>(br#"{"version":2,"request":"fly"}"#), Err(ControlError::Version(2)));
        for text in [&b"{}"[..], b"", b"{\"version\":1,\"request\":\"fly\"}", &[0xff]] {
            assert!(matches!(parse::<Request>(text), Err(ControlError::Message(_))));
        }
    }

    #[test]
    fn errors_keep_kind_causes_and_hint_on_their_way() {
        for (kind, _) in KINDS {
            let cause = io::Error::other("disk on fire");
            let error = BackendError::caused("cannot start", cause).of_kind(kind).hint("water");
            let bytes = message(&Reply::Failed(Failure::from(&error)));
            let Reply::Failed(failure) = parse(&bytes[HEADER..]).unwrap() else { panic!() };
            let back = BackendError::from(failure);
            assert_eq!(back.kind(), kind);
            assert_eq!(back.to_string(), "cannot start: disk on fire");
            assert_eq!(back.hint_text(), Some("water"));
        }
    }

    #[test]
    fn sockets_work_in_homes_deeper_than_an_address_is_long() {
        let base = tempfile::tempdir().unwrap();
        let home = Home::at(base.path().join("d".repeat(200)));
        let dir = home.instance(&InstanceId::random());
        std::fs::create_dir_all(dir.path()).unwrap();
        assert!(Connection::open(&dir).unwrap().is_none());
        drop(listen_at(&dir).unwrap());
        assert!(Connection::open(&dir).unwrap().is_none(), "nobody listens on what a dead one left");
        let listener = listen_at(&dir).unwrap();
        let client = Connection::open(&dir).unwrap().unwrap();
        client.send(&Request::Wait).unwrap();
        let mut server = Connection::over(accept(&listener).unwrap().unwrap());
        let (_, payload) = server.receive().unwrap().unwrap();
        assert_eq!(parse::<Request>(&payload).unwrap(), Request::Wait);
    }
}
