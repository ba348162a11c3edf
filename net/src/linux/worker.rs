//! A thread that serves until its owner lets go of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

/// Asks its thread to end, and waits for that, when dropped.
#[derive(Debug)]
pub(super) struct Worker {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// A forked child has a copy of this value, but neither the thread nor the right to end it.
    owner: u32,
}

/// Readable once the thread is to end.
#[derive(Debug)]
pub(super) struct Stop(Arc<OwnedFd>);

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Worker {
    /// Starts `serve`, which must return soon after its argument has become readable.
    pub(super) fn start(name: &str, serve: impl FnOnce(&Stop) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let seen = Stop(Arc::clone(&stop));
        let thread =
            std::thread::Builder::new().name(name.into()).stack_size(192 << 10).spawn(move || {
                leave_signals_to_others();
                serve(&seen);
            })?;
        Ok(Self { stop, thread: Some(thread), owner: std::process::id() })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.owner == std::process::id()
            && rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread that served a container had panicked");
        }
    }
}

/// Signals are for the supervisor's own loop: none may interrupt, or be taken by, a thread of this room.
fn leave_signals_to_others() {
    // SAFETY: an all-zero sigset_t is a valid place for sigfillset to write to, and blocking signals in the calling
    // thread touches no memory but this set.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}
