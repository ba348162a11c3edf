//! What the threads of an import have to do: a queue that the reader of a tar, or the walker over a directory, fills.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::host_file::HostDirectory;
use crate::chunk::Slice;
use crate::stamp::Stamp;

/// Work for the threads.
#[derive(Debug)]
pub(crate) enum Job {
    /// Files that are wholly in memory.
    Small(Vec<SmallFile>),
    /// A file that is still being read.
    Stream { slot: u32, pieces: Receiver<Piece> },
    /// Files in one directory of the host that are to be read.
    HostFiles { directory: Arc<HostDirectory>, files: Vec<SeenFile> },
}

/// A file of the host, as the walker has seen it.
#[derive(Debug)]
pub(crate) struct SeenFile {
    /// Where its digest goes.
    pub(crate) slot: u32,
    pub(crate) name: Vec<u8>,
    pub(crate) stamp: Stamp,
}

/// A file in memory.
#[derive(Debug)]
pub(crate) struct SmallFile {
    /// Where its digest goes.
    pub(crate) slot: u32,
    pub(crate) slices: Vec<Slice>,
}

/// A part of a streamed file. The end of the stream is [`Piece::End`]; without it the file was not read to its end.
#[derive(Debug)]
pub(crate) enum Piece {
    Data(Slice),
    /// So many bytes of zeros: a hole.
    Zeros(u64),
    End,
}

/// A queue for many takers. What bounds it is the memory of the chunks that its jobs hold.
#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<QueueState>,
    /// There is a job, or there will be none.
    ready: Condvar,
    /// There is room.
    taken: Condvar,
    failed: AtomicBool,
}

#[derive(Debug, Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Queue {
    /// More than this, and whoever fills the queue waits: jobs may hold open directories.
    const JOBS: usize = 256;

    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::default(),
            ready: Condvar::new(),
            taken: Condvar::new(),
            failed: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job; drops it once the queue is closed or a worker failed.
    pub(crate) fn push(&self, job: Job) {
        let mut state = self.lock();
        while state.jobs.len() >= Self::JOBS && !state.closed {
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.closed {
            state.jobs.push_back(job);
            self.ready.notify_one();
        }
    }

    /// No more will come.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
        self.taken.notify_all();
    }

    /// No more will come, and what is there need not be done.
    pub(crate) fn abandon(&self) {
        // Dropped outside the lock: jobs give their chunks back.
        let jobs = std::mem::take(&mut self.lock().jobs);
        drop(jobs);
        self.close();
    }

    /// A worker cannot go on: nothing of what is there need be done.
    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
        self.abandon();
    }

    /// Whether a worker has stopped with an error.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    pub(super) fn pop(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                self.taken.notify_one();
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// However a worker ends, nobody must wait for it.
pub(super) struct Worker<'q>(pub(super) &'q Queue);

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail();
        }
    }
}
