//! What a guest did, in numbers and in the log.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines about what was denied, in each [`SPAN`]; a guest must not fill the host's log.
const LINES: u32 = 10;
const SPAN: Duration = Duration::from_secs(1);

/// What a guest did, since its gateway was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// TCP connections that were made for it.
    pub connections: u64,
    /// TCP connections that its policy denied.
    pub denied_connections: u64,
    /// UDP datagrams and echo requests that its policy denied.
    pub denied_datagrams: u64,
    /// Names that its policy denied.
    pub denied_names: u64,
    /// What was refused because it had too much already.
    pub over_limit: u64,
    /// Bytes of TCP that it sent.
    pub sent: u64,
    /// Bytes of TCP that it received.
    pub received: u64,
}

/// [`Counters`] in the making.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) connections: AtomicU64,
    pub(super) denied_connections: AtomicU64,
    pub(super) denied_datagrams: AtomicU64,
    pub(super) denied_names: AtomicU64,
    pub(super) over_limit: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    log: Mutex<Span>,
}

#[derive(Debug, Default)]
struct Span {
    began: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Tally {
    pub(super) fn add(counter: &AtomicU64, number: u64) {
        counter.fetch_add(number, Ordering::Relaxed);
    }

    pub(super) fn counters(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            connections: get(&self.connections),
            denied_connections: get(&self.denied_connections),
            denied_datagrams: get(&self.denied_datagrams),
            denied_names: get(&self.denied_names),
            over_limit: get(&self.over_limit),
            sent: get(&self.sent),
            received: get(&self.received),
        }
    }

    /// Counts what was denied to a guest, and writes it to the log.
    pub(super) fn deny(
        &self,
        counter: &AtomicU64,
        guest: &str,
        what: &str,
        target: impl Display,
        reason: impl Display,
    ) {
        Self::add(counter, 1);
        if let Some(left_out) = self.may_log(Instant::now()) {
            tracing::info!(guest, %target, %reason, left_out, "{what} was denied");
        }
    }

    /// `None` where the log has enough for now; otherwise how many lines it was spared since the last one.
    fn may_log(&self, now: Instant) -> Option<u64> {
        let mut span = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if span.began.is_none_or(|began| now.duration_since(began) >= SPAN) {
            (span.began, span.lines) = (Some(now), 0);
        }
        if span.lines == LINES {
            span.left_out += 1;
            return None;
        }
        span.lines += 1;
        Some(std::mem::take(&mut span.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_does_nothing_but_what_is_denied_leaves_few_lines() {
        let (tally, now) = (Tally::default(), Instant::now());
        for _ in 0..1000 {
            tally.deny(&tally.denied_names, "web", "a name", "x", "y");
        }
        assert_eq!(tally.counters().denied_names, 1000);
        let fresh = Tally::default();
        let lines: Vec<_> = (0..1000).filter_map(|_| fresh.may_log(now)).collect();
        assert_eq!(lines, [0; LINES as usize]);
        assert_eq!(fresh.may_log(now + SPAN), Some(990), "the next line says how many are missing");
    }
}
