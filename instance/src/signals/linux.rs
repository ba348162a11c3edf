//! Signals as `signalfd(2)` gives them.

use std::io;
use std::os::fd::AsFd;

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::TAKEN;

/// Blocks signals of the calling thread and gives them as events, until it is dropped.
#[derive(Debug)]
pub struct Signals {
    before: SigSet,
    fd: SignalFd,
}

impl Signals {
    /// From now on.
    ///
    /// # Errors
    /// If there can be no more descriptors.
    pub fn take() -> io::Result<Self> {
        let mut set = SigSet::empty();
        for number in TAKEN.into_iter().chain([libc::SIGPWR]) {
            if let Ok(signal) = number.try_into() {
                set.add(signal);
            }
        }
        let mut before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { before, fd })
    }

    /// What is to be polled.
    pub fn fd(&self) -> &impl AsFd {
        &self.fd
    }

    /// The next signal that has come.
    pub fn next(&self) -> Option<i32> {
        let info = self.fd.read_signal().ok().flatten()?;
        i32::try_from(info.ssi_signo).ok()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // What came and was not looked at belongs to who was attached, not to who comes after: a pending SIGINT
        // must not end the program now.
        while self.next().is_some() {}
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.before), None);
    }
}
