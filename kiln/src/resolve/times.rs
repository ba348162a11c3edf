//! Points in time as `--since` and `--until` take them, and how long ago things were.

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use kiln_contract::HumanDuration;

use super::{ResolveError, Result};

/// A point in time: RFC 3339 (`2026-01-02T15:04:05Z`), a local date or date and time, seconds since 1970 (with a
/// fraction), or a duration back from `now` (`10m`, `1h30m`).
pub(crate) fn parse_time(flag: &'static str, text: &str, now: Timestamp) -> Result<Timestamp> {
    let bad = || {
        ResolveError::value(
            flag,
            text,
            "it is a time (2026-01-02T15:04:05Z), a date, seconds since 1970, or how long ago (10m)",
        )
    };
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(seconds) = text.parse::<f64>() {
        let time =
            SignedDuration::try_from_secs_f64(seconds).ok().and_then(|d| Timestamp::from_duration(d).ok());
        return time.ok_or_else(bad);
    }
    let local = text.parse::<DateTime>().or_else(|_| text.parse::<Date>().map(|date| date.at(0, 0, 0, 0)));
    if let Ok(local) = local {
        return local.to_zoned(TimeZone::system()).map(|zoned| zoned.timestamp()).map_err(|_| bad());
    }
    let HumanDuration(back) = text.parse().map_err(|_| bad())?;
    now.checked_sub(back).map_err(|_| bad())
}

/// How long ago, in words: `3 minutes ago`.
pub(crate) fn ago(then: Timestamp, now: Timestamp) -> String {
    format!("{} ago", span(then, now))
}

/// How long, in words, as Docker says it: `3 minutes`.
pub(crate) fn span(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(then).as_secs().max(0);
    let count = |n: i64, unit: &str| format!("{n} {unit}{}", if n == 1 { "" } else { "s" });
    match seconds {
        0 => "less than a second".to_owned(),
        1..60 => count(seconds, "second"),
        60..3600 => count(seconds / 60, "minute"),
        3600..172_800 => count(seconds / 3600, "hour"),
        172_800..1_209_600 => count(seconds / 86_400, "day"),
        1_209_600..5_184_000 => count(seconds / 604_800, "week"),
        5_184_000..63_072_000 => count(seconds / 2_592_000, "month"),
        _ => count(seconds / 31_536_000, "year"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_in_every_form() {
        let now: Timestamp = "2026-01-02T12:00:00Z".parse().unwrap();
        let table = [
            ("2026-01-01T00:00:00Z", Some("2026-01-01T00:00:00Z")),
            ("2026-01-01T02:00:00+02:00", Some("2026-01-01T00:00:00Z")),
            ("10m", Some("2026-01-02T11:50:00Z")),
            ("1h30m", Some("2026-01-02T10:30:00Z")),
            ("1767225600", Some("2026-01-01T00:00:00Z")),
            ("1767225600.5", Some("2026-01-01T00:00:00.5Z")),
            ("yesterday", None),
            ("", None),
        ];
        for (text, expected) in table {
            let got = parse_time("--since", text, now).ok();
            assert_eq!(got, expected.map(|text| text.parse().unwrap()), "{text}");
        }
        for local in ["2026-01-01", "2026-01-01T10:00:00", "2026-01-01 10:00"] {
            assert!(parse_time("--since", local, now).is_ok(), "{local}");
        }
    }

    #[test]
    fn spans_are_said_in_one_unit() {
        let then = Timestamp::UNIX_EPOCH;
        let table = [
            (0, "less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "1 minute"),
            (3600, "1 hour"),
            (172_800, "2 days"),
            (1_209_600, "2 weeks"),
            (5_184_000, "2 months"),
            (63_072_000, "2 years"),
        ];
        for (seconds, text) in table {
            assert_eq!(span(then, Timestamp::from_second(seconds).unwrap()), text);
        }
    }
}
