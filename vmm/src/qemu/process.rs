//! QEMU's process: a child of this one, or of another process that gave its machine up.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::VmmError;
use crate::memory::Mapping;

/// How long a killed process may take to end.
const TO_END: Duration = Duration::from_secs(10);

/// A process that QEMU runs in.
#[derive(Debug)]
pub(super) enum Process {
    /// This process's child.
    Own(Child),
    /// Another's, who could look into it, and ends it when the connection to it is closed.
    Adopted { pid: u32, handle: OwnedFd, mapping: Mapping, _owner: OwnedFd },
}

impl Process {
    pub(super) fn id(&self) -> u32 {
        match self {
            Self::Own(child) => child.id(),
            Self::Adopted { pid, .. } => *pid,
        }
    }

    pub(super) fn has_ended(&mut self) -> bool {
        match self {
            Self::Own(child) => !matches!(child.try_wait(), Ok(None)),
            Self::Adopted { handle, .. } => ends_within(handle, Duration::ZERO).unwrap_or(true),
        }
    }

    /// Ends it, if it has not ended.
    pub(super) fn kill(&mut self) -> Result<(), VmmError> {
        let waited = match self {
            Self::Own(child) => {
                // Ending it twice is no error.
                let _ = child.kill();
                child.wait().map(drop)
            }
            Self::Adopted { handle, .. } => {
                let _ = pidfd_send_signal(&*handle, Signal::KILL);
                ends_within(handle, TO_END)
                    .and_then(|ended| ended.then_some(()).ok_or(io::ErrorKind::TimedOut.into()))
            }
        };
        waited.map_err(VmmError::io("wait for the hypervisor"))
    }

    /// Its mapping of the memory file.
    pub(super) fn mapping(&self, file: &Path, length: u64) -> Result<Mapping, VmmError> {
        match self {
            Self::Own(child) => Mapping::find(child.id(), file, length),
            Self::Adopted { mapping, .. } => mapping.try_clone().map_err(VmmError::io("look at its memory")),
        }
    }

    /// What tells others that it has ended, and lets them end it.
    pub(super) fn handle(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Own(child) => Ok(pidfd_open(Pid::from_child(child), PidfdFlags::empty())?),
            Self::Adopted { handle, .. } => handle.try_clone(),
        }
    }
}

fn ends_within(handle: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        let left = patience.saturating_sub(begun.elapsed());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut polled = [PollFd::new(handle, PollFlags::IN)];
        match poll(&mut polled, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            polled => return Ok(polled? > 0),
        }
    }
}

/// A mapping's parts as descriptors, and back.
pub(super) fn descriptors(mapping: Mapping) -> (u64, [OwnedFd; 2]) {
    let (address, memory, pages) = mapping.into_parts();
    (address, [memory.into(), pages.into()])
}

/// The other way.
pub(super) fn mapping(address: u64, length: u64, [memory, pages]: [OwnedFd; 2]) -> Mapping {
    Mapping::of_parts(address, length, File::from(memory), File::from(pages))
}
