//! The link over Firecracker's vsock device.
//!
//! The device is a Unix socket on the host: who connects and says `CONNECT <port>` is connected to who listens on that port in
//! the guest, and hears `OK <port of the host>`; if nobody listens, the connection ends (`docs/vsock.md` of Firecracker). A
//! connection does not outlive the making of a snapshot: the guest's end is reset, in the machine that goes on too.
//!
//! The contract's link is one stream for as long as the machine lives. So it is one end of a socket pair, and a thread carries
//! between the other end and whatever connection there is. The guest is parked while there is none, and nothing is under way.
//!
//! ```text
//!           go              OK              connection ends
//!  held -----------> connecting ----> carrying ----------> connecting
//!   ^  hold              |  hold          |
//!   +--------------------+----------------+        Firecracker has ended, or the host has dropped the link: all ends
//! ```

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::VmmError;

/// The guest's port.
pub(super) const PORT: u32 = 1024;
/// Bytes carried at once, each way.
const CHUNK: usize = 64 << 10;
/// How long an answer to `CONNECT` may take. A guest that boots gives none until its driver is there.
const TO_CONNECT: Duration = Duration::from_secs(5);
/// Between two tries: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));
/// The longest answer to `CONNECT`.
const LONGEST: usize = 32;

const GO: u8 = b'g';
const HOLD: u8 = b'h';

/// What tells the thread what to do. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Carrier {
    control: UnixStream,
}

impl Carrier {
    /// A link through the socket `name` in `directory`, which is an open directory; held. The other end is the contract's.
    pub(super) fn start(directory: OwnedFd, name: &str) -> Result<(Self, OwnedFd), VmmError> {
        let fail = || VmmError::io("make the link");
        let (ours, near) = UnixStream::pair().map_err(fail())?;
        let (control, heard) = UnixStream::pair().map_err(fail())?;
        near.set_nonblocking(true).map_err(fail())?;
        let ends = Ends {
            near,
            control: heard,
            // The path may be longer than the address of a socket.
            path: format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()),
            _directory: directory,
        };
        std::thread::Builder::new().name("link".to_owned()).spawn(move || ends.run()).map_err(fail())?;
        Ok((Self { control }, ours.into()))
    }

    /// The guest runs: it can be connected to.
    pub(super) fn go(&mut self) -> Result<(), VmmError> {
        self.tell(GO)
    }

    /// The connection is going to be reset: it is given up.
    pub(super) fn hold(&mut self) -> Result<(), VmmError> {
        self.tell(HOLD)
    }

    fn tell(&mut self, word: u8) -> Result<(), VmmError> {
        match self.control.write_all(&[word]) {
            // Whoever had the link has dropped it: there is nothing to carry.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            outcome => outcome.map_err(VmmError::io("control the link")),
        }
    }
}

/// Why a step ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// The connection did.
    Connection,
    /// It is to be held.
    Held,
    /// Everything.
    All,
}

struct Ends {
    near: UnixStream,
    control: UnixStream,
    path: String,
    _directory: OwnedFd,
}

impl Ends {
    /// When this returns, the host's end is closed.
    fn run(mut self) {
        loop {
            match self.control.read(&mut [0]) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                _ => return,
            }
            loop {
                let ended = self.connect().and_then(|far| match carry(&self.near, &far, &self.control) {
                    Ok(ended) => Err(ended),
                    Err(error) => {
                        tracing::debug!("the connection to the guest ends: {error}");
                        Err(Ended::Connection)
                    }
                });
                match ended {
                    Ok(never) => never,
                    Err(Ended::Connection) => {}
                    Err(Ended::Held) => break,
                    Err(Ended::All) => return,
                }
            }
        }
    }

    fn connect(&self) -> Result<UnixStream, Ended> {
        let mut pause = PAUSES.0;
        loop {
            // A socket that is not there, or that nobody answers, is that of a Firecracker that has ended.
            let far = UnixStream::connect(&self.path).map_err(|error| {
                tracing::debug!("the guest cannot be connected to: {error}");
                Ended::All
            })?;
            match self.introduce(far) {
                Ok(far) => return Ok(far),
                Err(Ended::Connection) => {}
                Err(ended) => return Err(ended),
            }
            self.wait(None, pause)?;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Says which port is meant, and hears that somebody is there.
    fn introduce(&self, mut far: UnixStream) -> Result<UnixStream, Ended> {
        let connection = |_| Ended::Connection;
        far.write_all(format!("CONNECT {PORT}\n").as_bytes()).map_err(connection)?;
        let mut said = Vec::new();
        while !said.ends_with(b"\n") && said.len() < LONGEST {
            if !self.wait(Some(&far), TO_CONNECT)? {
                return Err(Ended::Connection);
            }
            // What follows the line is the guest's.
            let mut byte = [0];
            match far.read(&mut byte) {
                Ok(1) => said.push(byte[0]),
                _ => return Err(Ended::Connection),
            }
        }
        if !said.starts_with(b"OK ") {
            return Err(Ended::Connection);
        }
        far.set_nonblocking(true).map_err(connection)?;
        Ok(far)
    }

    /// Waits until `far` has something to read (then it is true), or for `patience`.
    fn wait(&self, far: Option<&UnixStream>, patience: Duration) -> Result<bool, Ended> {
        let patience = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        let mut looked = vec![
            PollFd::new(&self.control, PollFlags::IN),
            // Only whether the host has gone.
            PollFd::new(&self.near, PollFlags::empty()),
        ];
        looked.extend(far.map(|far| PollFd::new(far, PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut looked, Some(&patience))).map_err(|_| Ended::All)?;
        if !looked[1].revents().is_empty() {
            return Err(Ended::All);
        }
        if !looked[0].revents().is_empty() {
            command(&self.control)?;
        }
        Ok(looked.get(2).is_some_and(|far| !far.revents().is_empty()))
    }
}

/// Reads what the control says, once there is something.
fn command(mut control: &UnixStream) -> Result<(), Ended> {
    let mut word = [0];
    match control.read(&mut word) {
        Ok(1) if word == [HOLD] => Err(Ended::Held),
        // It goes already.
        Ok(1) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        _ => Err(Ended::All),
    }
}

/// Bytes on their way in one direction.
struct Flow {
    buffer: Box<[u8]>,
    at: usize,
    end: usize,
}

impl Flow {
    fn new() -> Self {
        Self { buffer: vec![0; CHUNK].into_boxed_slice(), at: 0, end: 0 }
    }

    fn is_empty(&self) -> bool {
        self.at == self.end
    }

    /// Fills itself if it is empty; false at the end of the stream.
    fn fill(&mut self, mut from: &UnixStream) -> io::Result<bool> {
        match from.read(&mut self.buffer) {
            Ok(0) => Ok(false),
            Ok(count) => {
                (self.at, self.end) = (0, count);
                Ok(true)
            }
            Err(error) if is_passing(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn drain(&mut self, mut to: &UnixStream) -> io::Result<()> {
        match to.write(&self.buffer[self.at..self.end]) {
            Ok(count) => self.at += count,
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Carries both ways until something ends. Errors are those of the connection.
fn carry(near: &UnixStream, far: &UnixStream, control: &UnixStream) -> io::Result<Ended> {
    let (mut down, mut up) = (Flow::new(), Flow::new());
    loop {
        let interest = |read: bool, write: bool| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, read);
            flags.set(PollFlags::OUT, write);
            flags
        };
        let far_flags = interest(up.is_empty(), !down.is_empty());
        let mut looked = vec![
            PollFd::new(control, PollFlags::IN),
            PollFd::new(near, interest(down.is_empty(), !up.is_empty())),
        ];
        // One that has hung up says so whether it is asked or not: it is looked at when something can be done about it.
        if !far_flags.is_empty() {
            looked.push(PollFd::new(far, far_flags));
        }
        rustix::io::retry_on_intr(|| poll(&mut looked, None))?;
        let ready = looked.iter().map(PollFd::revents).collect::<Vec<_>>();
        if !ready[0].is_empty()
            && let Err(ended) = command(control)
        {
            return Ok(ended);
        }
        if ready[1].contains(PollFlags::HUP) {
            return Ok(Ended::All);
        }
        if ready[1].contains(PollFlags::IN) && !down.fill(near)? {
            return Ok(Ended::All);
        }
        let far_ready = ready.get(2).copied().unwrap_or_else(PollFlags::empty);
        if up.is_empty()
            && far_ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
            && !up.fill(far)?
        {
            return Ok(Ended::Connection);
        }
        // What has just come can mostly go on at once.
        if !up.is_empty() && up.drain(near).is_err() {
            return Ok(Ended::All);
        }
        if !down.is_empty() {
            down.drain(far)?;
        }
    }
}
