//! The guest's clock after the host's has jumped: when the host was suspended, or its time was set.
//!
//! A guest is told the time when it begins and when it is resumed. Meanwhile its clock goes as the host's monotonic one does,
//! which stands still while the host is suspended and does not know of a time that was set. So the monitor looks every now and
//! then whether the host's time has gone on by as much as that clock, and tells the guest if not.

use std::convert::Infallible;
use std::time::{Duration, Instant, SystemTime};

/// The time between two looks. It is measured by the monotonic clock, so a suspend is seen so long after its end at the latest.
const BETWEEN: Duration = Duration::from_secs(10);
/// What a guest's clock may be off by without being told.
const MOST: Duration = Duration::from_secs(1);

/// The host's clocks at one moment.
#[derive(Debug, Clone, Copy)]
struct Clocks {
    monotonic: Instant,
    time: SystemTime,
}

impl Clocks {
    fn look() -> Self {
        Self { monotonic: Instant::now(), time: SystemTime::now() }
    }

    /// Whether the time has jumped, forward or back, from these on until `later`.
    fn jumped_until(self, later: Self) -> bool {
        let expected = self.time + later.monotonic.saturating_duration_since(self.monotonic);
        let off = later.time.duration_since(expected).unwrap_or_else(|before| before.duration());
        off > MOST
    }
}

/// Has the guest told the time by `tell` whenever the host's has jumped. `tell` says whether the guest was told: one that is
/// paused is told later.
pub(crate) async fn follow(tell: impl AsyncFnMut() -> bool) -> Infallible {
    follow_with(Clocks::look, tell).await
}

async fn follow_with(mut look: impl FnMut() -> Clocks, mut tell: impl AsyncFnMut() -> bool) -> Infallible {
    let mut told = look();
    loop {
        tokio::time::sleep(BETWEEN).await;
        let now = look();
        if told.jumped_until(now) && tell().await {
            told = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn only_a_time_that_does_not_go_as_the_monotonic_clock_has_jumped() {
        let before = Clocks::look();
        let after =
            |passed: Duration, time: SystemTime| Clocks { monotonic: before.monotonic + passed, time };
        let minute = Duration::from_secs(60);
        let cases = [
            ("nothing", after(minute, before.time + minute), false),
            ("a slow correction", after(minute, before.time + minute + Duration::from_millis(900)), false),
            ("a suspend", after(minute, before.time + 60 * minute), true),
            ("a time set back", after(minute, before.time - minute), true),
            ("a time set by little", after(minute, before.time + minute - Duration::from_millis(1100)), true),
        ];
        for (what, later, jumped) in cases {
            assert_eq!(before.jumped_until(later), jumped, "{what}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_is_told_once_a_jump_and_again_only_if_it_did_not_hear() {
        let begun = (tokio::time::Instant::now(), Clocks::look());
        // Suspended for an hour after 25 seconds.
        let look = || {
            let passed = begun.0.elapsed();
            let slept = Duration::from_secs(if passed > Duration::from_secs(25) { 3600 } else { 0 });
            Clocks { monotonic: begun.1.monotonic + passed, time: begun.1.time + passed + slept }
        };
        let asked = Cell::new(0);
        let tell = async || {
            asked.set(asked.get() + 1);
            asked.get() > 1
        };
        let counted = async |until: u64, expected: u32| {
            tokio::time::sleep_until(begun.0 + Duration::from_secs(until)).await;
            assert_eq!(asked.get(), expected, "after {until} s");
        };
        tokio::select! {
            never = follow_with(look, tell) => match never {},
            () = async {
                for (until, expected) in [(24, 0), (31, 1), (41, 2), (300, 2)] {
                    counted(until, expected).await;
                }
            } => {}
        }
    }
}
