//! `SOURCE_DATE_EPOCH`: no time that goes into a layer or an image is later
//! (<https://reproducible-builds.org/specs/source-date-epoch/>).

use kiln_erofs::Time;

use crate::{Result, StoreError};

const VARIABLE: &str = "SOURCE_DATE_EPOCH";

/// The latest time that may be written, if there is one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SourceDate(Option<i64>);

impl SourceDate {
    pub(crate) fn from_environment() -> Result<Self> {
        std::env::var_os(VARIABLE).map_or(Ok(Self(None)), |value| Self::parse(&value.to_string_lossy()))
    }

    /// A number that no calendar has is refused, as the specification asks.
    fn parse(value: &str) -> Result<Self> {
        let seconds = value.parse().ok().filter(|seconds| jiff::Timestamp::from_second(*seconds).is_ok());
        let wrong = || StoreError::Environment {
            variable: VARIABLE,
            value: value.to_owned(),
            what: "it is to be seconds since 1970 in decimal",
        };
        seconds.map(|seconds| Self(Some(seconds))).ok_or_else(wrong)
    }

    pub(crate) fn clamp(self, time: Time) -> Time {
        match self.0 {
            Some(latest) if time.seconds >= latest => Time { seconds: latest, nanoseconds: 0 },
            _ => time,
        }
    }

    /// When something is made now.
    pub(crate) fn now(self) -> jiff::Timestamp {
        let now = jiff::Timestamp::now();
        self.0
            .and_then(|latest| jiff::Timestamp::from_second(latest).ok())
            .map_or(now, |latest| latest.min(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_clamped_and_nonsense_is_refused() {
        let date = SourceDate::parse("100").unwrap();
        let time = |seconds, nanoseconds| Time { seconds, nanoseconds };
        assert_eq!(date.clamp(time(99, 5)), time(99, 5));
        for late in [time(100, 5), time(1 << 40, 0)] {
            assert_eq!(date.clamp(late), time(100, 0));
        }
        assert_eq!(date.now().to_string(), "1970-01-01T00:01:40Z");
        assert_eq!(SourceDate::default().clamp(time(1 << 40, 1)), time(1 << 40, 1));
        for wrong in ["", "now", "1.5", "9223372036854775807"] {
            assert!(SourceDate::parse(wrong).unwrap_err().to_string().contains(VARIABLE), "{wrong}");
        }
    }
}
