//! How fast this host's time-stamp counter runs.

#[cfg(target_arch = "x86_64")]
use std::time::{Duration, Instant};

/// The frequency of the time-stamp counter in kHz, measured against the system's clock in some 20 ms to a few millionths.
/// `None` where there is none.
///
/// An emulated x86-64 processor counts as fast as the host's does, but its kernel measures that against an emulated
/// timer, and on a busy host the figures do not fit together: it then has no clock, and hangs.
#[cfg(target_arch = "x86_64")]
pub(crate) fn frequency() -> Option<u64> {
    let (begin, from) = reading();
    std::thread::sleep(Duration::from_millis(20));
    let (end, to) = reading();
    let ticks = u128::from(to.checked_sub(from)?);
    let nanoseconds = end.duration_since(begin).as_nanos();
    u64::try_from(ticks * 1_000_000 / nanoseconds).ok().filter(|&khz| khz > 0)
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn frequency() -> Option<u64> {
    None
}

/// A time and the counter at that time: of several readings the one that was interrupted least.
#[cfg(target_arch = "x86_64")]
fn reading() -> (Instant, u64) {
    let read = || {
        let before = Instant::now();
        // SAFETY: the instruction only reads a register, and every x86-64 processor has it.
        let ticks = unsafe { std::arch::x86_64::_rdtsc() };
        let took = before.elapsed();
        (took, before + took / 2, ticks)
    };
    let mut best = read();
    for _ in 0..32 {
        let other = read();
        if other.0 < best.0 {
            best = other;
        }
    }
    (best.1, best.2)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_that_of_a_processor_and_always_the_same() {
        let first = frequency().unwrap();
        assert!((500_000..10_000_000).contains(&first), "{first} kHz");
        let second = frequency().unwrap();
        let off = first.abs_diff(second) as f64 / first as f64;
        assert!(off < 1e-4, "{first} and {second} kHz");
    }
}
