//! The requests in flight, by tag, and how they are taken back.
//!
//! `Tflush` is answered after the request that it takes back (flush(5) of Plan 9: the client may use the tag again once
//! `Rflush` is there, so nothing about the old request may come later). Nothing that was begun is undone: it
//! is finished and answered, and then the flush is. Only what waits for somebody else, a lock, stops waiting.
//!
//! For that order to hold, a request must be taken out of the table and its reply written without
//! another reply in between: see [`crate::session::Session::finish`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

/// Set when nobody wants the answer to a request any more.
pub(crate) type Cancelled = Arc<AtomicBool>;

#[derive(Debug, Default)]
struct Pending {
    cancelled: Cancelled,
    /// The tags of the flushes that wait for it, in the order of their coming.
    flushes: Vec<u16>,
}

/// All requests that have come and not been answered.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    pending: Mutex<HashMap<u16, Pending>>,
    idle: Condvar,
}

impl Requests {
    fn pending(&self) -> MutexGuard<'_, HashMap<u16, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has come. `EBUSY` if another one with this tag is in flight.
    pub(crate) fn begin(&self, tag: u16) -> Result<Cancelled, Errno> {
        let mut pending = self.pending();
        if pending.contains_key(&tag) {
            return Err(Errno::BUSY);
        }
        Ok(Arc::clone(&pending.entry(tag).or_default().cancelled))
    }

    /// The flush `tag` takes `old` back. Whether it is going to be answered after `old`; otherwise there is no such request
    /// any more, and it is answered now.
    pub(crate) fn flush(&self, tag: u16, old: u16) -> bool {
        let mut pending = self.pending();
        match pending.get_mut(&old) {
            Some(request) if old != tag => {
                request.cancelled.store(true, Ordering::Release);
                request.flushes.push(tag);
                true
            }
            _ => false,
        }
    }

    /// A request is answered now. Returns the flushes that are to be answered right after it; they are in flight no
    /// more either.
    pub(crate) fn end(&self, tag: u16) -> Vec<u16> {
        let mut pending = self.pending();
        let mut flushes = pending.remove(&tag).map(|request| request.flushes).unwrap_or_default();
        let mut next = 0;
        // Flushes can be flushed.
        while let Some(flush) = flushes.get(next) {
            if let Some(request) = pending.remove(flush) {
                flushes.extend(request.flushes);
            }
            next += 1;
        }
        if pending.is_empty() {
            self.idle.notify_all();
        }
        flushes
    }

    /// Nothing waits for others any more.
    pub(crate) fn cancel_all(&self) {
        for request in self.pending().values() {
            request.cancelled.store(true, Ordering::Release);
        }
    }

    /// Waits until everything is answered.
    pub(crate) fn drain(&self) {
        self.cancel_all();
        let mut pending = self.pending();
        while !pending.is_empty() {
            pending = self.idle.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushes_are_answered_after_what_they_take_back_in_their_order() {
        let requests = Requests::default();
        let cancelled = requests.begin(1).unwrap();
        assert_eq!(requests.begin(1).map(|_| ()), Err(Errno::BUSY));
        for (tag, old, waits) in
            [(2, 1, true), (3, 9, false), (4, 2, true), (5, 1, true), (6, 6, false), (7, 7, false)]
        {
            requests.begin(tag).unwrap();
            assert_eq!(requests.flush(tag, old), waits, "{tag}");
            if !waits {
                assert_eq!(requests.end(tag), []);
            }
        }
        assert!(cancelled.load(Ordering::Acquire));
        assert_eq!(requests.end(1), [2, 5, 4]);
        for tag in 1..=7 {
            requests.begin(tag).unwrap();
        }
    }

    #[test]
    fn draining_waits_for_the_last_answer() {
        let requests = Requests::default();
        let cancelled = requests.begin(1).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !cancelled.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                requests.end(1);
            });
            requests.drain();
        });
        assert_eq!(requests.end(1), []);
    }
}
