//! Signals whose handler writes them to a pipe.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use super::TAKEN;
use crate::streams;

/// Where the handler writes; -1 while nothing takes signals. One taker at a time.
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// Takes signals of this process and gives them as events, until it is dropped.
pub struct Signals {
    read: OwnedFd,
    _write: OwnedFd,
    before: Vec<(i32, libc::sigaction)>,
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signals").field("read", &self.read).finish_non_exhaustive()
    }
}

extern "C" fn write_down(signal: libc::c_int) {
    // The numbers of signals fit.
    let byte = signal as u8;
    // SAFETY: write(2) may be called in a handler; one byte is there. A pipe that is full has enough to tell already.
    unsafe { libc::write(PIPE.load(Ordering::SeqCst), (&raw const byte).cast(), 1) };
}

impl Signals {
    /// From now on.
    ///
    /// # Errors
    /// If there can be no more descriptors.
    pub fn take() -> io::Result<Self> {
        let (read, write) = streams::pipe()?;
        streams::set_nonblocking(&read)?;
        streams::set_nonblocking(&write)?;
        PIPE.store(write.as_raw_fd(), Ordering::SeqCst);
        let mut before = Vec::new();
        for number in TAKEN {
            // SAFETY: all zeros are an action; its fields are set below.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = write_down as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            let mut old = MaybeUninit::uninit();
            // SAFETY: both pointers lead to actions; the handler does what a handler may.
            if unsafe { libc::sigaction(number, &raw const action, old.as_mut_ptr()) } == 0 {
                // SAFETY: it was written.
                before.push((number, unsafe { old.assume_init() }));
            }
        }
        Ok(Self { read, _write: write, before })
    }

    /// What is to be polled.
    pub fn fd(&self) -> &impl AsFd {
        &self.read
    }

    /// The next signal that has come.
    pub fn next(&self) -> Option<i32> {
        let mut byte = [0];
        match rustix::io::read(&self.read, &mut byte) {
            Ok(1) => Some(byte[0].into()),
            _ => None,
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (number, action) in &self.before {
            // SAFETY: the action was this signal's before.
            unsafe { libc::sigaction(*number, &raw const *action, std::ptr::null_mut()) };
        }
        PIPE.store(-1, Ordering::SeqCst);
    }
}
