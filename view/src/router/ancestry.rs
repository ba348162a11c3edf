//! Who a process is, and whose child.

use std::io;

use serde::{Deserialize, Serialize};

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

#[cfg(target_os = "linux")]
pub use self::linux::Host;
#[cfg(target_os = "macos")]
pub use self::macos::Host;

/// A process. Its number alone would not do: that is given again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it started, in the system's own units: clock ticks since boot on Linux (proc_pid_stat(5), `starttime`),
    /// microseconds since 1970 on macOS.
    pub start: u64,
}

impl Process {
    /// Whether it is there still, and its number not another's.
    pub fn lives(&self) -> bool {
        matches!(Host.find(self.pid), Ok(Some(found)) if found.process == *self)
    }
}

/// What was found under a number.
#[derive(Debug)]
pub struct Found<W> {
    /// The process. Its number is another than what was asked for if that is a thread's.
    pub process: Process,
    /// The number of its parent; 0 for one that has none.
    pub parent: u32,
    /// Tells later whether the number still stands for the same.
    pub watch: W,
}

/// The processes of a system.
pub trait Ancestry: Send + Sync {
    /// Tells whether a number still stands for the same process or thread.
    type Watch: Send + Sync;

    /// What a number stands for; `None` if for nothing.
    ///
    /// # Errors
    /// The system does not say.
    fn find(&self, number: u32) -> io::Result<Option<Found<Self::Watch>>>;

    /// Whether what was found under a number is still there. Asked with every request, so that it must be quick.
    fn lives(&self, number: u32, watch: &Self::Watch) -> bool;
}
