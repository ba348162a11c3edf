//! Objects that are being fetched, while requests for everything else are answered.
//!
//! A fetch waits for a network, as long as that takes. So it has a thread of its own, of which there are [`AT_ONCE`] at most
//! and none when there is nothing to fetch. What is wanted beyond that waits in a queue, which costs no thread, and everybody who
//! wants the same object waits for one fetch. Whoever waits has left what is to be done then: to answer a request, mostly.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_contract::Digest;

use crate::objects::Objects;

/// Objects fetched at once for one tree: each by a process.
const AT_ONCE: usize = 8;

/// What is to be done with an object; `None` if it cannot be had.
pub(super) type Then = Box<dyn FnOnce(Option<Arc<File>>) + Send>;

/// An object and its size.
type Wanted = (Digest, u64);

pub(super) struct Fetches {
    objects: Arc<Objects>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Everybody who waits, for what is being fetched as for what is in the queue.
    waiting: HashMap<Wanted, Vec<Then>>,
    queue: VecDeque<Wanted>,
    threads: usize,
}

impl Fetches {
    pub(super) fn of(objects: Arc<Objects>) -> Self {
        Self { objects, state: Mutex::default() }
    }

    /// Has an object fetched. `then` is called by another thread, which holds nothing meanwhile.
    pub(super) fn add(self: &Arc<Self>, digest: &Digest, size: u64, then: Then) {
        let wanted = (*digest, size);
        let mut state = self.state();
        let waiting = state.waiting.entry(wanted).or_default();
        waiting.push(then);
        if waiting.len() > 1 {
            return;
        }
        state.queue.push_back(wanted);
        if state.threads == AT_ONCE {
            return;
        }
        state.threads += 1;
        drop(state);
        let fetches = Arc::clone(self);
        let thread = std::thread::Builder::new().name("fetch".to_owned());
        if let Err(error) = thread.spawn(move || fetches.work()) {
            self.without_thread(&error);
        }
    }

    /// Fetches what is in the queue, until there is no more.
    fn work(&self) {
        while let Some(wanted @ (digest, size)) = self.next() {
            // What is wrong was told to the log.
            let file = self.objects.open(&digest, size).ok().map(Arc::new);
            // Who comes from now on finds it, or asks anew.
            let waiting = self.state().waiting.remove(&wanted);
            for then in waiting.into_iter().flatten() {
                then(file.clone());
            }
        }
    }

    /// The next of the queue. `None`: the thread that asks is one less.
    fn next(&self) -> Option<Wanted> {
        let mut state = self.state();
        let next = state.queue.pop_front();
        if next.is_none() {
            state.threads -= 1;
        }
        next
    }

    /// The threads that there are do it. If there is none, nobody is left waiting.
    fn without_thread(&self, error: &std::io::Error) {
        let mut state = self.state();
        state.threads -= 1;
        if state.threads > 0 {
            return;
        }
        tracing::error!(%error, "nothing can be fetched: no thread can be started for it");
        state.queue.clear();
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_values().flatten().for_each(|then| then(None));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
