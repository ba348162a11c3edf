//! Messages: CBOR (RFC 8949), each behind its length as four bytes, little-endian.
//!
//! Fields are numbered and never re-used; both ends skip numbers that they do not know. A stream to
//! [`CONTROL`](crate::service::CONTROL) carries one [`Request`] and one [`Answer`]; where a request says so, a *body* goes
//! one way between them or after the answer: chunks behind their lengths, an empty one, and then an [`Answer`] that says
//! whether the body is whole. A stream to [`PROCESS`](crate::service::PROCESS) carries [`Input`]s and [`Output`]s.

use minicbor::{Decode, Encode};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::{LinkError, VERSION};

/// The longest message, in bytes: arguments and environment of a process (Linux's own bound is 2 MiB) with room.
pub const MAX_MESSAGE: usize = 4 << 20;
/// The longest piece of a process's streams and of a body, in bytes.
pub const MAX_CHUNK: usize = 64 << 10;

/// What a guest says of itself whenever it parks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// The version of the link that it speaks.
    #[n(0)]
    pub version: u32,
    /// The kernel's release (`uname -r`).
    #[n(1)]
    pub kernel: String,
    /// Milliseconds since the kernel started.
    #[n(2)]
    pub uptime: u64,
}

impl Default for Hello {
    fn default() -> Self {
        Self { version: VERSION, kernel: String::new(), uptime: 0 }
    }
}

/// Who a machine is, and what it is to be. The first request of every life.
#[derive(Debug, Clone, PartialEq, Eq, Default, Encode, Decode)]
pub struct Configure {
    /// The host name.
    #[n(0)]
    pub hostname: String,
    /// 32 lower-case hex digits (`machine-id(5)`).
    #[n(1)]
    pub machine_id: String,
    /// Nanoseconds since 1970, UTC.
    #[n(2)]
    pub clock: u64,
    /// Random bytes of the host's; the kernel's generator is re-seeded with them before anything else.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub entropy: Vec<u8>,
    /// How the root is to be; `None` where somebody had it before: in a live fork.
    #[n(4)]
    pub root: Option<Root>,
    /// What is seen in the root besides the image, in order.
    #[n(5)]
    pub mounts: Vec<Mount>,
    /// Files that the host decides, such as `/etc/hosts`: seen at their paths, and no part of the root's changes.
    #[n(6)]
    pub files: Vec<HostFile>,
    /// It reaches others over [`TCP`](crate::service::TCP) and [`UDP`](crate::service::UDP); otherwise only itself.
    #[n(7)]
    pub network: bool,
    /// Kernel parameters, as `sysctl` names them.
    #[n(8)]
    pub sysctls: Vec<(String, String)>,
    /// Who it is on its network device, if it has one: IPv4 goes that way then, and names and IPv6 the other.
    #[n(9)]
    pub device: Option<Device>,
}

/// A machine's place on a network that it has a device for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Device {
    /// The hardware address.
    #[n(0)]
    pub mac: [u8; 6],
    /// The only address.
    #[n(1)]
    pub address: [u8; 4],
    /// The router.
    #[n(2)]
    pub gateway: [u8; 4],
    /// The longest packet, in bytes.
    #[n(3)]
    pub mtu: u32,
}

/// How the root is made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Encode, Decode)]
pub struct Root {
    /// The root cannot be written to.
    #[n(0)]
    pub read_only: bool,
    /// The root is for a system: an init will run in it.
    #[n(1)]
    pub system: bool,
    /// `/dev/shm`, in bytes.
    #[n(2)]
    pub shm_size: u64,
    /// The writable disk, in bytes: its filesystem grows to that.
    #[n(3)]
    pub disk_size: u64,
}

/// Something that is mounted in the root.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Mount {
    /// Where, absolute.
    #[n(0)]
    pub target: String,
    /// What.
    #[n(1)]
    pub source: MountSource,
    /// Nothing may be changed through it.
    #[n(2)]
    pub read_only: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum MountSource {
    /// A share of the host's, over [`SHARE`](crate::service::SHARE).
    #[n(0)]
    Share {
        /// Its number.
        #[n(0)]
        number: u16,
        /// It is one file.
        #[n(1)]
        file: bool,
    },
    /// Memory.
    #[n(1)]
    Tmpfs {
        /// Mount options, comma-separated.
        #[n(0)]
        options: String,
    },
}

/// A file that the host decides.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HostFile {
    /// Where, absolute.
    #[n(0)]
    pub path: String,
    /// What is in it.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub content: Vec<u8>,
}

/// A process to start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Encode, Decode)]
pub struct Process {
    /// The command and its arguments; never empty.
    #[n(0)]
    pub args: Vec<String>,
    /// `NAME=value`.
    #[n(1)]
    pub env: Vec<String>,
    /// The working directory, absolute. The [`WORKLOAD`]'s is made if it is missing.
    #[n(2)]
    pub cwd: String,
    /// `user[:group]` by name or number; empty is root.
    #[n(3)]
    pub user: String,
    /// Supplementary groups by name or number.
    #[n(4)]
    pub groups: Vec<String>,
    /// A terminal of this size.
    #[n(5)]
    pub terminal: Option<TerminalSize>,
    /// Keep its standard input open.
    #[n(6)]
    pub stdin: bool,
    /// Capabilities that it may have, a bit each (`capabilities(7)`); `None` is all.
    #[n(7)]
    pub capabilities: Option<u64>,
    /// Limits of resources: number (`RLIMIT_…`), soft, hard.
    #[n(8)]
    pub limits: Vec<(u32, u64, u64)>,
    /// It may gain no privileges by executing a file.
    #[n(9)]
    pub no_new_privileges: bool,
}

/// What a stream to [`SSH`](crate::service::SSH) begins with; then SSH follows, with the guest as its server.
#[derive(Debug, Clone, PartialEq, Eq, Default, Encode, Decode)]
pub struct SshServer {
    /// The seed of the machine's host key (Ed25519, 32 bytes): the host made it, so it knows what the server must prove.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub host_key: Vec<u8>,
    /// Public keys that may enter, as they travel in SSH.
    #[n(1)]
    pub authorised: Vec<minicbor::bytes::ByteVec>,
    /// What every process of a session has; its arguments, user and working directory are the session's own.
    #[n(2)]
    pub process: Process,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct TerminalSize {
    /// Lines.
    #[n(0)]
    pub rows: u16,
    /// Columns.
    #[n(1)]
    pub columns: u16,
}

/// What the host asks on [`CONTROL`](crate::service::CONTROL).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Request {
    /// Become somebody. Answer: [`Answer::Done`].
    #[n(0)]
    Configure(#[n(0)] Box<Configure>),
    /// Send a signal to a process that was started over the link. Answer: [`Answer::Done`].
    #[n(1)]
    Signal {
        /// Which.
        #[n(0)]
        process: u32,
        /// The number, as Linux has it on this architecture.
        #[n(1)]
        signal: i32,
    },
    /// What the machine uses. Answer: [`Answer::Stats`].
    #[n(2)]
    Stats,
    /// All processes. Answer: [`Answer::Processes`].
    #[n(3)]
    Processes,
    /// Write everything to the disk. Answer: [`Answer::Done`].
    #[n(4)]
    Sync,
    /// End every process, write everything to the disk and power off. Answer: [`Answer::Done`] as the last word.
    #[n(5)]
    PowerOff,
    /// The disk has grown: let its filesystem grow. Answer: [`Answer::Done`].
    #[n(6)]
    Grow {
        /// Its size now, in bytes.
        #[n(0)]
        size: u64,
    },
    /// Give a tar archive of a path, named by its last part. Answer: [`Answer::Done`], then a body.
    #[n(7)]
    Pack {
        /// In the root.
        #[cbor(n(0), with = "minicbor::bytes")]
        path: Vec<u8>,
        /// A symbolic link is what it points to.
        #[n(1)]
        follow: bool,
    },
    /// Unpack a tar archive in a directory. A body, then the answer.
    #[n(8)]
    Unpack {
        /// In the root.
        #[cbor(n(0), with = "minicbor::bytes")]
        path: Vec<u8>,
    },
    /// Give what differs from the image as an OCI layer's tar. Answer: [`Answer::Done`], then a body.
    #[n(9)]
    Layer,
    /// Set the clock: nanoseconds since 1970, UTC. Answer: [`Answer::Done`].
    #[n(10)]
    Clock {
        /// Nanoseconds since 1970, UTC.
        #[n(0)]
        now: u64,
    },
    /// Make the root of the image and the disk that are there, for whoever will become somebody with them: before
    /// [`Configure`](Self::Configure), which makes it otherwise. Answer: [`Answer::Done`].
    #[n(11)]
    Prepare {
        /// The paths of files that the host will decide.
        #[n(0)]
        files: Vec<String>,
    },
    /// Do what [`Configure`](Self::Configure) does, as far as nothing of it stays: after [`Prepare`](Self::Prepare), in a
    /// machine that is nobody yet and will be somebody soon. Answer: [`Answer::Done`].
    #[n(12)]
    Rehearse(#[n(0)] Box<Configure>),
}

/// What the guest answers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Answer {
    /// It was done.
    #[n(0)]
    Done,
    /// It was not.
    #[n(1)]
    Failed(#[n(0)] Failure),
    /// What the machine uses.
    #[n(2)]
    Stats(#[n(0)] Stats),
    /// Column titles, then a row a process.
    #[n(3)]
    Processes(#[n(0)] Vec<Vec<String>>),
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Failure {
    /// What kind of failure it is.
    #[n(0)]
    pub kind: FailureKind,
    /// What was being done, to what, and why it failed: one sentence.
    #[n(1)]
    pub what: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// Kinds of failure that the host tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum FailureKind {
    /// Everything else.
    #[n(0)]
    Failed,
    /// There is no such process or path.
    #[n(1)]
    NotFound,
    /// What was asked for makes no sense.
    #[n(2)]
    Invalid,
    /// The command is not in the image.
    #[n(3)]
    CommandNotFound,
    /// The command cannot be executed.
    #[n(4)]
    CommandNotExecutable,
}

/// What a machine uses, as its kernel counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct Stats {
    /// Processor time of the workload, in microseconds.
    #[n(0)]
    pub cpu: u64,
    /// Memory of the machine that is not free or reclaimable, in bytes.
    #[n(1)]
    pub memory: u64,
    /// Memory of the machine, in bytes.
    #[n(2)]
    pub memory_total: u64,
    /// Processes and threads of the workload.
    #[n(3)]
    pub tasks: u64,
    /// Bytes received from the network.
    #[n(4)]
    pub received: u64,
    /// Bytes sent to the network.
    #[n(5)]
    pub sent: u64,
    /// Bytes read from disks.
    #[n(6)]
    pub read: u64,
    /// Bytes written to disks.
    #[n(7)]
    pub written: u64,
    /// Memory that this guest's own processes use, in bytes.
    #[n(8)]
    pub guest: u64,
}

/// The number of the machine's first process, its workload.
pub const WORKLOAD: u32 = 1;

/// What the host sends on [`PROCESS`](crate::service::PROCESS). The first says what process it is about, and no
/// other does.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Input {
    /// Start a process under a number that no other has. [`WORKLOAD`] ends with the machine.
    #[n(0)]
    Start {
        /// Its number.
        #[n(0)]
        number: u32,
        /// What to start.
        #[n(1)]
        process: Box<Process>,
    },
    /// Take over the streams of a process that was started in an earlier life.
    #[n(1)]
    Attach {
        /// Its number.
        #[n(0)]
        number: u32,
    },
    /// Bytes for its standard input or terminal.
    #[n(2)]
    Bytes(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
    /// No more input.
    #[n(3)]
    Close,
    /// Its terminal has another size.
    #[n(4)]
    Resize(#[n(0)] TerminalSize),
    /// Execute the image's init in place of PID 1, as `Start` would start it: for system images.
    #[n(5)]
    BecomeInit {
        /// What to execute.
        #[n(0)]
        process: Box<Process>,
    },
    /// Start a process that is none of the workload, and has no number: for a machine that is nobody yet, so that starting one
    /// has been done before. Otherwise as `Start`.
    #[n(6)]
    Rehearse {
        /// What to start.
        #[n(0)]
        process: Box<Process>,
    },
}

/// What the guest sends on [`PROCESS`](crate::service::PROCESS).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Output {
    /// It runs.
    #[n(0)]
    Started,
    /// It could not be started. The last message.
    #[n(1)]
    Failed(#[n(0)] Failure),
    /// What it wrote to standard output or its terminal.
    #[n(2)]
    Stdout(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
    /// What it wrote to standard error.
    #[n(3)]
    Stderr(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
    /// It has ended, and all that it wrote was sent. The last message.
    #[n(4)]
    Exited(#[n(0)] u8),
}

/// A message as CBOR, without a length.
pub fn encode<M: Encode<()>>(message: &M) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to a vector cannot fail, and no message of this module refuses to be encoded.
    let _ = minicbor::encode(message, &mut bytes);
    bytes
}

/// A message from CBOR.
///
/// # Errors
/// [`LinkError::Message`] for what is none, and for what has more after it.
pub fn decode<M: for<'b> Decode<'b, ()>>(bytes: &[u8]) -> Result<M, LinkError> {
    let mut decoder = minicbor::Decoder::new(bytes);
    let message = decoder.decode().map_err(|error| LinkError::Message(error.to_string()))?;
    if decoder.position() == bytes.len() {
        Ok(message)
    } else {
        Err(LinkError::Message(format!("{} bytes follow it", bytes.len() - decoder.position())))
    }
}

/// Writes a message and flushes.
///
/// # Errors
/// [`LinkError::TooLong`] above [`MAX_MESSAGE`]; those of the stream.
pub async fn send<W: AsyncWrite + Unpin, M: Encode<()>>(
    stream: &mut W,
    message: &M,
) -> Result<(), LinkError> {
    let mut bytes = vec![0; 4];
    // As in `encode`.
    let _ = minicbor::encode(message, &mut bytes);
    let length = bytes.len() - 4;
    if length > MAX_MESSAGE {
        return Err(too_long("a message", length, MAX_MESSAGE));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    Ok(())
}

/// Reads a message; `None` if the stream ends before one. Not to be cancelled.
///
/// # Errors
/// [`LinkError::TooLong`] before anything is allocated, [`LinkError::Message`], those of the stream.
pub async fn receive<R: AsyncRead + Unpin, M: for<'b> Decode<'b, ()>>(
    stream: &mut R,
) -> Result<Option<M>, LinkError> {
    match read_piece(stream, "a message", MAX_MESSAGE).await? {
        Some(bytes) => decode(&bytes).map(Some),
        None => Ok(None),
    }
}

/// Writes one chunk of a body; an empty one ends it.
///
/// # Errors
/// [`LinkError::TooLong`] above [`MAX_CHUNK`]; those of the stream.
pub async fn send_chunk<W: AsyncWrite + Unpin>(stream: &mut W, chunk: &[u8]) -> Result<(), LinkError> {
    if chunk.len() > MAX_CHUNK {
        return Err(too_long("a chunk", chunk.len(), MAX_CHUNK));
    }
    stream.write_u32_le(chunk.len() as u32).await?;
    stream.write_all(chunk).await?;
    stream.flush().await?;
    Ok(())
}

/// Reads one chunk of a body; an empty one is its end.
///
/// # Errors
/// [`LinkError::TooLong`] above [`MAX_CHUNK`], [`LinkError::Closed`] where the stream ends instead, those of the stream.
pub async fn receive_chunk<R: AsyncRead + Unpin>(stream: &mut R) -> Result<Vec<u8>, LinkError> {
    read_piece(stream, "a chunk", MAX_CHUNK).await?.ok_or(LinkError::Closed)
}

async fn read_piece<R: AsyncRead + Unpin>(
    stream: &mut R,
    what: &'static str,
    most: usize,
) -> Result<Option<Vec<u8>>, LinkError> {
    let mut length = [0; 4];
    let first = stream.read(&mut length).await?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[first..]).await?;
    let length = u32::from_le_bytes(length) as usize;
    if length > most {
        return Err(too_long(what, length, most));
    }
    // Grows with what comes, not with what was announced.
    let mut bytes = Vec::with_capacity(length.min(MAX_CHUNK));
    (&mut *stream).take(length as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < length {
        return Err(LinkError::Closed);
    }
    Ok(Some(bytes))
}

fn too_long(what: &'static str, length: usize, most: usize) -> LinkError {
    LinkError::TooLong { what, length: length as u64, most: most as u64 }
}
