//! The door to a running machine: `machine.sock` in its directory, answered by its monitor.
//!
//! One question a connection, one answer; both are length-prefixed CBOR as on the link. After the answer to
//! [`Ask::Dial`] the connection *is* a stream to a service of the guest: whoever looks into a machine speaks to its guest
//! directly, and the monitor only carries.

use std::io;

use kiln_contract::{BackendError, DiskBackend, DiskId, DiskNameError, ErrorKind, InstanceDir, PendingDisk};
use kiln_instance::socket;
use kiln_link::message::{self, Failure, FailureKind};
use minicbor::{Decode, Encode};
use tokio::net::{UnixListener, UnixStream};

use crate::life::{lost, refused};

/// The socket's name.
const NAME: &str = "machine.sock";

/// What can be asked of a monitor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Ask {
    /// Be a stream to a service of the guest.
    #[n(0)]
    Dial {
        /// Its number.
        #[n(0)]
        service: u16,
    },
    /// Suspend the machine.
    #[n(1)]
    Pause,
    /// Let it go on.
    #[n(2)]
    Resume,
    /// Copy its disk, and save its devices and memory of the same instant if asked to. It goes on.
    #[n(3)]
    Save {
        /// Where devices and memory go: absolute; it exists.
        #[n(0)]
        directory: Option<String>,
        /// What becomes of the disk.
        #[n(1)]
        disk: Copy,
    },
    /// Its disk has grown.
    #[n(4)]
    Grown {
        /// Bytes.
        #[n(0)]
        size: u64,
    },
    /// End it as a kill would, but with everything written to its disk. Answered before that is done.
    #[n(5)]
    End,
}

/// What a copy of a disk becomes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Copy {
    /// A disk of this name.
    #[n(0)]
    Disk(#[n(0)] String),
    /// A snapshot of its own of this name.
    #[n(1)]
    Snapshot(#[n(0)] String),
}

/// What a monitor answers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Reply {
    /// It was done.
    #[n(0)]
    Done,
    /// It was not.
    #[n(1)]
    Failed(#[n(0)] Failure),
    /// It was done, and the machine did not run for this long.
    #[n(2)]
    Saved {
        /// Microseconds.
        #[n(0)]
        paused: u64,
    },
}

/// An error as it travels through the door.
pub(crate) fn failure(error: &BackendError) -> Failure {
    let kind = match error.kind() {
        ErrorKind::NotFound => FailureKind::NotFound,
        ErrorKind::Invalid => FailureKind::Invalid,
        _ => FailureKind::Failed,
    };
    Failure { kind, what: error.with_causes() }
}

/// Opens the door. Must be called in a runtime.
pub(crate) fn listen(dir: &InstanceDir) -> Result<UnixListener, BackendError> {
    let fail = |error| BackendError::caused(format!("cannot listen in {}", dir.path().display()), error);
    let path = dir.path().join(NAME);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    socket::with_short_path(&path, |path| UnixListener::bind(path)).map_err(fail)
}

/// Whether who is at the other end may ask: the same user, or root.
pub(crate) fn may_ask(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

/// Closes the door: nobody who looks for it waits.
pub(crate) fn close(dir: &InstanceDir) {
    let _ = std::fs::remove_file(dir.path().join(NAME));
}

/// Connects to a socket in the machine's directory. Must be called in a runtime.
pub(crate) fn connect(dir: &InstanceDir, name: &str) -> io::Result<UnixStream> {
    // Somebody listens, or nobody does: there is nothing to wait for.
    socket::with_short_path(&dir.path().join(name), |path| {
        let stream = std::os::unix::net::UnixStream::connect(path)?;
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    })
}

/// Asks. Must be called in a runtime.
///
/// # Errors
/// The monitor's own; [`ErrorKind::State`] if there is none.
pub(crate) async fn ask(dir: &InstanceDir, question: &Ask) -> Result<(UnixStream, Reply), BackendError> {
    let fail =
        |error| BackendError::caused("cannot reach the machine's monitor", error).of_kind(ErrorKind::State);
    let mut stream = connect(dir, NAME).map_err(fail)?;
    message::send(&mut stream, question).await.map_err(lost)?;
    match message::receive(&mut stream).await.map_err(lost)? {
        Some(Reply::Failed(failure)) => Err(refused(&failure)),
        Some(reply) => Ok((stream, reply)),
        None => Err(lost(kiln_link::LinkError::Closed)),
    }
}

/// A stream to a service of the guest.
///
/// # Errors
/// As [`ask`].
pub(crate) async fn dial(dir: &InstanceDir, service: u16) -> Result<UnixStream, BackendError> {
    ask(dir, &Ask::Dial { service }).await.map(|(stream, _)| stream)
}

impl Copy {
    /// Begins it.
    pub(crate) fn start(
        &self,
        disks: &dyn DiskBackend,
        disk: &DiskId,
    ) -> Result<Box<dyn PendingDisk>, BackendError> {
        fn named<T>(parsed: Result<T, DiskNameError>) -> Result<T, BackendError> {
            parsed.map_err(|error| {
                BackendError::caused("cannot copy the disk", error).of_kind(ErrorKind::Invalid)
            })
        }
        match self {
            Self::Disk(name) => disks.start_clone(disk, None, &named(name.parse())?),
            Self::Snapshot(name) => disks.start_snapshot(disk, &named(name.parse())?),
        }
    }
}
