//! When a workload that ended is started again.

use std::time::Duration;

use kiln_contract::RestartPolicy;

/// Before the first restart; doubled before each further one.
const FIRST: Duration = Duration::from_millis(100);
/// Never longer than this.
const LONGEST: Duration = Duration::from_secs(60);
/// A workload that ran this long was started well: what happened before does not count any more.
const WELL: Duration = Duration::from_secs(10);

/// Decides about restarts, and remembers how many there were in a row.
#[derive(Debug)]
pub(crate) struct Restarts {
    policy: RestartPolicy,
    in_a_row: u32,
}

impl Restarts {
    /// None so far.
    pub(crate) fn new(policy: RestartPolicy) -> Self {
        Self { policy, in_a_row: 0 }
    }

    /// How long to wait before the workload is started again after it ended with `code` having run for `ran`;
    /// `None`: not at all.
    pub(crate) fn after(&mut self, code: u8, ran: Duration, stopped_by_user: bool) -> Option<Duration> {
        if ran >= WELL {
            self.in_a_row = 0;
        }
        let again = match self.policy {
            _ if stopped_by_user => false,
            RestartPolicy::No => false,
            RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
            RestartPolicy::OnFailure { limit } => {
                code != 0 && limit.is_none_or(|limit| limit == 0 || self.in_a_row < limit)
            }
        };
        again.then(|| {
            let delay = FIRST.saturating_mul(1 << self.in_a_row.min(20)).min(LONGEST);
            self.in_a_row = self.in_a_row.saturating_add(1);
            delay
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_restart_what_they_say() {
        let short = Duration::from_millis(5);
        let table = [
            ("no", 1, false, false),
            ("always", 0, false, true),
            ("always", 0, true, false),
            ("unless-stopped", 3, false, true),
            ("unless-stopped", 3, true, false),
            ("on-failure", 0, false, false),
            ("on-failure", 1, false, true),
            ("on-failure:0", 1, false, true),
            ("on-failure", 137, true, false),
        ];
        for (policy, code, stopped, again) in table {
            let mut restarts = Restarts::new(policy.parse().unwrap());
            assert_eq!(restarts.after(code, short, stopped).is_some(), again, "{policy} {code} {stopped}");
        }
    }

    #[test]
    fn a_limit_counts_failures_in_a_row() {
        let mut restarts = Restarts::new("on-failure:2".parse().unwrap());
        let short = Duration::from_millis(5);
        assert!(restarts.after(1, short, false).is_some());
        assert!(restarts.after(1, short, false).is_some());
        assert!(restarts.after(1, WELL, false).is_some(), "ran well in between");
        assert!(restarts.after(1, short, false).is_some());
        assert!(restarts.after(1, short, false).is_none());
    }

    #[test]
    fn delays_double_up_to_a_minute_and_begin_anew_after_ten_good_seconds() {
        let mut restarts = Restarts::new(RestartPolicy::Always);
        let delays: Vec<u128> =
            (0..12).map(|_| restarts.after(1, Duration::ZERO, false).unwrap().as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 51_200, 60_000, 60_000]);
        assert_eq!(restarts.after(1, WELL, false), Some(FIRST));
    }
}
