//! The spare machine: restored from a template already, for the next start from it.
//!
//! Where the hypervisor translates what a guest executes, it does so anew in each of its processes, and a start takes most of
//! its time for that. A spare has it behind it: its guest has rehearsed what a start asks of it, is nobody still, and waits.
//!
//! ```text
//! templates/<key>/
//!   spare.lock           held by the spare's keeper until somebody has the machine; says which process that is
//!   spare.sock           where it waits, once the machine is ready
//!   spare.log            what it said, if something went wrong
//!   spare.<token>/       the hypervisor's directory
//! disks/spare-<key>      the machine's disk
//! ```
//!
//! ```text
//! monitor                               keeper (`kiln spare <key> <image>`)
//!    |                                     |   restores a machine, has it rehearse, parks its link
//!    |-- connects ------------------------>|   stops to listen
//!    |<-------------- Offer, descriptors --|
//!    |   gives disk and files its names    |
//!    |-- TAKEN --------------------------->|   lets go of the lock: another spare can be made
//!    |   says who the machine is, as after any restore
//!    |-- closes, however it ends --------->|   ends the machine, and itself
//! ```
//!
//! Whatever is odd on the way, the monitor restores a machine itself. A keeper that nobody asks ends after [`PATIENCE`], when
//! its template or its home is gone, and when a start needs the place: there are [`MOST`] in a home. What a killed keeper left
//! is taken away by the next, and with the template.

mod keeper;
mod rights;

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_contract::{BackendError, DiskBackend, DiskId, ErrorKind, Home, Hypervisor, InstanceDir, VmHandle};
use kiln_instance::{process, socket};
use minicbor::{Decode, Encode};
use rustix::fs::{FlockOperation, flock};

use crate::saved::Saved;
use crate::template::{Disk, failed};
use crate::{admission, console};

pub use keeper::keep_spare;

/// `off`, or for how many seconds one waits.
const SETTING: &str = "KILN_SPARE";
/// Spares of one home.
const MOST: usize = 2;
/// How long one waits to be wanted, unless something else is said.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a keeper may take to answer: longer, and a restore is as fast.
const TO_ANSWER: Duration = Duration::from_millis(100);
/// How long a keeper that was killed may take to be gone.
const TO_END: Duration = Duration::from_secs(10);
/// Whose name begins so is the disk of a spare.
const DISK_PREFIX: &str = "spare-";
const LOCK: &str = "spare.lock";
const SOCKET: &str = "spare.sock";
const LOG: &str = "spare.log";
const DIRECTORY_PREFIX: &str = "spare.";
/// What the hypervisor has in its directory by names that others know.
const FILES: [&str; 3] = [console::SOCKET, console::LOG, "qemu.log"];
/// The monitor's word that the machine is its own.
const TAKEN: u8 = b'T';

/// What comes with the descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct Offer {
    /// The hypervisor's process.
    #[n(0)]
    pid: u32,
    /// Where the memory is in it.
    #[n(1)]
    memory_address: u64,
    /// The hypervisor's directory.
    #[n(2)]
    directory: String,
}

/// How far a template's spare machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SpareState {
    /// It is being made.
    Making,
    /// It waits.
    Ready,
}

/// Whether a machine of `template` may be one that waited, and one is made for the next.
pub(crate) fn is_for(template: &Saved, hypervisor: &dyn Hypervisor, disks: &dyn DiskBackend) -> bool {
    let record = template.record();
    hypervisor.translates()
        && disks.can_rename()
        && record.disk == Disk::Root
        && !record.shape.network
        && patience().is_some()
}

/// How long one waits to be wanted; `None` if there are to be none.
fn patience() -> Option<Duration> {
    patience_of(&std::env::var(SETTING).unwrap_or_default())
}

fn patience_of(said: &str) -> Option<Duration> {
    match said.trim() {
        "" | "on" => Some(PATIENCE),
        seconds => seconds.parse().ok().filter(|seconds| *seconds > 0).map(Duration::from_secs),
    }
}

/// A machine that waited, and is an instance's now.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) handle: VmHandle,
    /// As long as this is open, the machine's keeper lets it live.
    pub(crate) owner: UnixStream,
    /// The path of its disk.
    pub(crate) disk: PathBuf,
}

/// Takes the machine that waits at `template`, if one does, and gives its disk the name `disk`.
pub(crate) fn take(
    template: &Saved,
    disks: &dyn DiskBackend,
    disk: &DiskId,
    dir: &InstanceDir,
) -> Option<Taken> {
    let place = Place::of(template);
    match place.take(disks, disk, dir) {
        Ok(taken) => taken,
        Err(error) => {
            tracing::info!("the spare machine cannot be had, and one is restored: {}", error.with_causes());
            None
        }
    }
}

/// How far the spare machine of a template is; `None` if there is none.
pub fn spare_state(template: &Saved) -> Option<SpareState> {
    let place = Place::of(template);
    let lock = File::open(place.path(LOCK)).ok()?;
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => None,
        Err(_) if place.path(SOCKET).exists() => Some(SpareState::Ready),
        Err(_) => Some(SpareState::Making),
    }
}

/// Ends the spare machine of a template, if there is one, and takes away what a killed one left.
pub(crate) fn end(template: &Saved, disks: &dyn DiskBackend) -> Result<(), BackendError> {
    let place = Place::of(template);
    if !place.path(LOCK).exists() {
        return Ok(());
    }
    let _lock = match place.lock()? {
        Some(lock) => lock,
        None => place.end_keeper()?,
    };
    place.clear(disks)
}

/// The disk of the spare machine of a template.
fn disk_of(template: &Saved) -> Result<DiskId, BackendError> {
    let name = format!("{DISK_PREFIX}{}", template.record().key.hex());
    name.parse().map_err(|error| BackendError::caused("cannot name the spare machine's disk", error))
}

/// A spare machine that is to be made, once who takes this one's place runs.
#[derive(Debug)]
pub(crate) struct Next {
    home: Home,
    template: Saved,
    image: PathBuf,
}

impl Next {
    pub(crate) fn new(home: &Home, template: &Saved, image: &Path) -> Self {
        Self { home: home.clone(), template: template.clone(), image: image.to_owned() }
    }

    /// Has one made beside everything else, unless there is one or no room for it. It is no fault if that does not work: the
    /// next start takes its time.
    pub(crate) fn make(&self) {
        if spare_state(&self.template).is_some() || !admission::has_room(self.template.record().shape) {
            return;
        }
        if let Err(error) = self.spawn() {
            tracing::info!("no spare machine is made: {error}");
        }
    }

    fn spawn(&self) -> io::Result<()> {
        let log = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.template.directory().join(LOG))?;
        let mut command = Command::new(process::program()?);
        command
            .arg("spare")
            .arg(self.template.record().key.hex())
            .arg(&self.image)
            .env("KILN_HOME", self.home.path())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // SAFETY: one system call between fork and exec. A terminal's signals pass the keeper by.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(())
            });
        }
        let mut child = command.spawn()?;
        // It may end long before this process does.
        std::thread::Builder::new().name("spare".to_owned()).spawn(move || child.wait()).map(drop)
    }
}

/// What belongs to the spare machine of a template.
#[derive(Debug)]
struct Place {
    template: Saved,
}

impl Place {
    fn of(template: &Saved) -> Self {
        Self { template: template.clone() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.template.directory().join(name)
    }

    /// The lock, held, if nobody else holds it.
    fn lock(&self) -> Result<Option<File>, BackendError> {
        let path = self.path(LOCK);
        let open =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = open.map_err(failed("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // A killed keeper left it: nobody waits there.
                let _ = fs::remove_file(self.path(SOCKET));
                Ok(Some(lock))
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed("lock", &path)(error.into())),
        }
    }

    /// Kills who holds the lock; its machine ends with it. The lock, held.
    fn end_keeper(&self) -> Result<File, BackendError> {
        let path = self.path(LOCK);
        let begun = std::time::Instant::now();
        loop {
            let keeper = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
            // One that has just begun has not said yet who it is.
            if let Some(keeper) = keeper {
                process::kill_and_wait(keeper, TO_END);
            }
            if let Some(lock) = self.lock()? {
                return Ok(lock);
            }
            if begun.elapsed() > TO_END {
                return Err(BackendError::new(
                    ErrorKind::Failed,
                    format!("the keeper of the spare machine at {} does not end", path.display()),
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Writes who holds the lock.
    fn sign(mut lock: &File) -> io::Result<()> {
        lock.set_len(0)?;
        lock.rewind()?;
        lock.write_all(&serde_json::to_vec(&process::this())?)
    }

    /// Takes away what is there of a machine that nobody keeps. The lock must be held.
    fn clear(&self, disks: &dyn DiskBackend) -> Result<(), BackendError> {
        disks.remove(&disk_of(&self.template)?)?;
        let _ = fs::remove_file(self.path(SOCKET));
        let directory = self.template.directory();
        let entries = match fs::read_dir(directory) {
            // The template is gone, and all that was in it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(failed("list", directory))?,
        };
        for entry in entries.flatten() {
            let is_ours = entry.file_name().to_string_lossy().starts_with(DIRECTORY_PREFIX);
            if is_ours && entry.path().is_dir() {
                crate::saved::remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn take(
        &self,
        disks: &dyn DiskBackend,
        disk: &DiskId,
        dir: &InstanceDir,
    ) -> Result<Option<Taken>, BackendError> {
        let fail = |error| BackendError::caused("cannot speak to the spare machine's keeper", error);
        let connected = socket::with_short_path(&self.path(SOCKET), |path| UnixStream::connect(path));
        let mut owner = match connected {
            Ok(owner) => owner,
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(fail(error)),
        };
        owner
            .set_read_timeout(Some(TO_ANSWER))
            .and_then(|()| owner.set_write_timeout(Some(TO_ANSWER)))
            .map_err(fail)?;
        let (offer, descriptors) = rights::receive(&owner).map_err(fail)?;
        let path = disks.rename(&disk_of(&self.template)?, disk)?;
        let moved = FILES
            .iter()
            .try_for_each(|name| fs::rename(Path::new(&offer.directory).join(name), dir.path().join(name)));
        if let Err(error) = moved.and_then(|()| owner.write_all(&[TAKEN])) {
            drop(owner);
            disks.remove(disk)?;
            return Err(fail(error));
        }
        let handle = VmHandle { pid: offer.pid, memory_address: offer.memory_address, descriptors };
        Ok(Some(Taken { handle, owner, disk: path }))
    }
}

/// The monitor's word, if it says it in time.
fn hears_taken(mut monitor: &UnixStream) -> bool {
    let mut word = [0];
    monitor.set_read_timeout(Some(TO_END)).is_ok()
        && monitor.read_exact(&mut word).is_ok()
        && word[0] == TAKEN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spares_are_kept_for_a_time_unless_they_are_turned_off() {
        for (said, seconds) in [
            ("", Some(300)),
            ("on", Some(300)),
            ("20", Some(20)),
            (" 7 ", Some(7)),
            ("off", None),
            ("0", None),
            ("no", None),
            ("-1", None),
        ] {
            assert_eq!(patience_of(said), seconds.map(Duration::from_secs), "{said:?}");
        }
    }
}
