//! The serial console of a machine: what it has said, what it says, and, where the hypervisor lets one, what is typed to it.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use kiln_contract::{AttachEnd, AttachOptions, BackendError, ErrorKind, InstanceDir, InstanceId, Isolation};
use kiln_instance::terminal::RawTerminal;
use kiln_instance::{DetachKeys, is_supervised};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{Machines, carry, door, stream};

/// The console's socket, in the machine's directory: QEMU listens at it.
pub(crate) const SOCKET: &str = "console.sock";
/// What was written to the console, in the machine's directory.
pub(crate) const LOG: &str = "console.log";
/// Held by whoever is at the console.
const LOCK: &str = "console.lock";
/// How much of what was written before is shown, in bytes.
const TAIL: u64 = 16 << 10;
/// Between two looks at a log that nobody can be woken for.
const LOOK: Duration = Duration::from_millis(100);

impl Machines {
    /// Whether what is typed to the console of a running machine reaches it.
    pub fn console_takes_input(&self, id: &InstanceId) -> bool {
        self.home().instance(id).path().join(SOCKET).exists()
    }

    /// Connects to a machine's serial console, until the user types the keys that detach or the machine ends. The end of input
    /// is no end: what is said is still shown.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine does not run, or somebody is at its console; [`ErrorKind::Unsupported`] for a
    /// container.
    pub fn console(&self, id: &InstanceId, options: AttachOptions) -> Result<AttachEnd, BackendError> {
        let record = self.instances().read(id)?;
        let name = &record.spec.name;
        if record.spec.isolation != Isolation::Machine {
            return Err(BackendError::unsupported(format!("{name} is a container, and has no console"))
                .hint(format!("connect to its streams with `kiln attach {name}`")));
        }
        self.verbs().running(id, "connect to the console of")?;
        let fail = |error| BackendError::caused(format!("cannot connect to the console of {name}"), error);
        let keys = DetachKeys::parse(&options.detach_keys)?;
        let dir = self.home().instance(id);
        let _only = only_one(&dir).map_err(fail)?.ok_or_else(|| {
            BackendError::new(ErrorKind::State, format!("somebody is at the console of {name} already"))
        })?;
        let runtime = stream::runtime()?;
        let ended = runtime.block_on(async {
            let connection = match door::connect(&dir, SOCKET) {
                Ok(connection) => Some(connection),
                // A hypervisor that only writes a log.
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(fail(error)),
            };
            let mut log = File::open(dir.path().join(LOG)).map_err(fail)?;
            let _raw =
                if options.stdin { RawTerminal::enter(&options.stdio.stdin).map_err(fail)? } else { None };
            let said = tail(&mut log).map_err(fail)?;
            let (output, writing) = carry::writer(options.stdio.stdout);
            let _ = output.send(said).await;
            // Typed keys are looked at even where nobody takes them: they detach.
            let mut input = if options.stdin { Some(carry::reader(options.stdio.stdin, keys)) } else { None };
            let end = match connection {
                Some(connection) => at(connection, &mut input, &output).await.map_err(fail),
                None => {
                    let runs = || self.instances().read(id).is_ok_and(|record| is_supervised(&record));
                    follow(log, &mut input, &output, runs).await.map_err(fail)
                }
            };
            drop(output);
            let _ = tokio::task::spawn_blocking(move || writing.join()).await;
            end
        });
        runtime.shutdown_background();
        match ended? {
            End::Detached => Ok(AttachEnd::Detached),
            End::Over => self.verbs().wait(id).map(AttachEnd::Exited).or_else(|error| match error.kind() {
                // It was for one run only, and has gone.
                ErrorKind::NotFound => Ok(AttachEnd::Detached),
                _ => Err(error),
            }),
        }
    }
}

/// How it ended.
enum End {
    Detached,
    Over,
}

type Input = Option<tokio::sync::mpsc::Receiver<Option<Vec<u8>>>>;
type Output = tokio::sync::mpsc::Sender<Vec<u8>>;

/// Carries what is typed and what is said.
async fn at(connection: tokio::net::UnixStream, input: &mut Input, output: &Output) -> io::Result<End> {
    let (mut said, mut typed) = connection.into_split();
    let mut buffer = vec![0; 16 << 10];
    loop {
        tokio::select! {
            count = said.read(&mut buffer) => match count {
                Ok(0) => return Ok(End::Over),
                Ok(count) => drop(output.send(buffer[..count].to_vec()).await),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(End::Over),
                Err(error) => return Err(error),
            },
            piece = carry::next(input) => match piece {
                Some(Some(bytes)) if !bytes.is_empty() => match typed.write_all(&bytes).await {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(End::Over),
                    outcome => outcome?,
                },
                Some(None) => return Ok(End::Detached),
                _ => *input = None,
            },
        }
    }
}

/// Shows what is added to the log.
async fn follow(
    mut log: File,
    input: &mut Input,
    output: &Output,
    runs: impl Fn() -> bool,
) -> io::Result<End> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let over = !runs();
        loop {
            let count = log.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let _ = output.send(buffer[..count].to_vec()).await;
        }
        if over {
            return Ok(End::Over);
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            piece = carry::next(input) => match piece {
                Some(None) => return Ok(End::Detached),
                Some(Some(bytes)) if !bytes.is_empty() => {}
                _ => *input = None,
            },
        }
    }
}

/// Holds the place at the console; `None` if somebody has it.
fn only_one(dir: &InstanceDir) -> io::Result<Option<File>> {
    let lock =
        File::options().write(true).create(true).truncate(false).mode(0o600).open(dir.path().join(LOCK))?;
    match rustix::fs::flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The end of the log, from the beginning of a line.
fn tail(log: &mut File) -> io::Result<Vec<u8>> {
    let length = log.metadata()?.len();
    let begin = length.saturating_sub(TAIL);
    log.seek(SeekFrom::Start(begin))?;
    let mut said = Vec::new();
    log.take(length - begin).read_to_end(&mut said)?;
    if begin > 0 {
        let line = said.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        said.drain(..line);
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn of_a_long_log_whole_lines_of_its_end_are_shown_and_the_rest_follows() {
        let mut log = tempfile::tempfile().unwrap();
        for number in 0..5000 {
            writeln!(log, "line {number}").unwrap();
        }
        let said = String::from_utf8(tail(&mut log).unwrap()).unwrap();
        assert!(said.starts_with("line ") && said.ends_with("line 4999\n"), "{}", &said[..20]);
        assert!(said.len() as u64 <= TAIL && said.len() as u64 > TAIL - 20, "{}", said.len());
        let mut short = tempfile::tempfile().unwrap();
        short.write_all(b"no newline").unwrap();
        assert_eq!(tail(&mut short).unwrap(), b"no newline");
    }
}
