//! When to try again, and how long to wait before it.

use std::time::{Duration, SystemTime};

/// Waits longer than this are not waited for: the user is told instead.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// Counts attempts at one thing and gives the pauses between them: 0.2 s, 0.4 s, … 10 s, each shortened by
/// up to a quarter at random so that many clients do not come back at the same moment.
#[derive(Debug, Clone)]
pub(crate) struct Retry {
    failures: u32,
    allowed: u32,
}

impl Retry {
    /// `allowed` further attempts after the first.
    pub(crate) fn new(allowed: u32) -> Self {
        Self { failures: 0, allowed }
    }

    /// Attempts made so far.
    pub(crate) fn attempts(&self) -> u32 {
        self.failures
    }

    /// Forgets the failures so far: something was achieved since.
    pub(crate) fn progress(&mut self) {
        self.failures = 0;
    }

    /// Takes note of a failure. The pause before the next attempt, or `None` if there shall be none.
    /// `asked` is what the server asked for (`Retry-After`).
    pub(crate) fn failed(&mut self, asked: Option<Duration>) -> Option<Duration> {
        self.failures += 1;
        if self.failures > self.allowed {
            return None;
        }
        let backoff = FIRST_WAIT.saturating_mul(1 << (self.failures - 1).min(10)).min(LONGEST_BACKOFF);
        match asked {
            Some(asked) if asked > LONGEST_WAIT => None,
            Some(asked) => Some(asked),
            None => Some(backoff - backoff.mul_f64(fraction() / 4.0)),
        }
    }
}

/// Something between 0 and 1 that two processes do not share.
fn fraction() -> f64 {
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.subsec_nanos());
    f64::from(nanos.wrapping_mul(2_654_435_761) >> 8) / f64::from(1_u32 << 24)
}

/// Whether a status says that the same request may succeed later (RFC 9110 §15).
pub(crate) fn is_transient(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// `Retry-After` (RFC 9110 §10.2.3): seconds or an HTTP date; `now` is when the answer came.
pub(crate) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = imf_fixdate(value)?;
    let now = now.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    Some(Duration::from_secs(at.saturating_sub(now)))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970.
fn imf_fixdate(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let parts: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, day, month, year, time, "GMT"] = parts[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? as i64 + 1;
    let (day, year): (i64, i64) = (day.parse().ok()?, year.parse().ok()?);
    let mut clock = time.split(':').map(str::parse::<u64>);
    let (hour, minute, second) = (clock.next()?.ok()?, clock.next()?.ok()?, clock.next()?.ok()?);
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since 1970-01-01 in the proleptic Gregorian calendar, with years that begin in March.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted / 400;
    let of_era = shifted - era * 400;
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    Some(u64::try_from(days).ok()? * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_reads_seconds_and_dates() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777 - 30);
        for (value, seconds) in [
            ("0", Some(0)),
            (" 7 ", Some(7)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(30)),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            ("Thu, 29 Feb 2024 00:00:00 GMT", Some(1_709_164_800 - (784_111_777 - 30))),
            ("soon", None),
            ("Sun, 06 Foo 1994 08:49:37 GMT", None),
            ("-1", None),
        ] {
            assert_eq!(retry_after(value, now), seconds.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn pauses_grow_are_bounded_and_end() {
        let mut retry = Retry::new(12);
        let mut last = Duration::ZERO;
        for _ in 0..12 {
            let pause = retry.failed(None).unwrap();
            assert!(pause <= LONGEST_BACKOFF && pause >= FIRST_WAIT * 3 / 4);
            assert!(pause >= last / 2);
            last = pause;
        }
        assert_eq!(retry.failed(None), None);
        retry.progress();
        assert_eq!(retry.failed(Some(Duration::from_secs(3))), Some(Duration::from_secs(3)));
        assert_eq!(retry.failed(Some(Duration::from_secs(4000))), None, "nobody waits for more than an hour");
    }
}
