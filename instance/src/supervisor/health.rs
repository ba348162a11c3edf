//! Whether a workload is well: when to check, and what the checks mean.
//!
//! As Docker has it: checks come every `interval` (every `start_interval` during the start period); the first success
//! makes it healthy, `retries` failures in a row make it unhealthy; failures in the start period do not count as long as
//! there was no success.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kiln_contract::{HealthCheck, HealthState, HealthStatus, ProcessId};

/// So much of a check's output is kept.
const MAX_OUTPUT: usize = 4 << 10;
/// Zero in a specification means «as usual», which is this.
const USUAL: Duration = Duration::from_secs(30);
const USUAL_START_INTERVAL: Duration = Duration::from_secs(5);
const USUAL_RETRIES: u32 = 3;

/// The health of one run of a workload.
#[derive(Debug)]
pub(crate) struct Health {
    check: HealthCheck,
    started: Instant,
    status: HealthStatus,
    next: Instant,
    probe: Option<Probe>,
}

/// A check that runs.
#[derive(Debug)]
pub(crate) struct Probe {
    /// Its process.
    pub(crate) process: ProcessId,
    /// Where its output comes from; `None` after its end.
    pub(crate) output: Option<OwnedFd>,
    deadline: Instant,
    text: Vec<u8>,
}

impl Health {
    /// Of a workload that was started at `started`; `None` if its check does nothing.
    pub(crate) fn new(check: &HealthCheck, started: Instant) -> Option<Self> {
        if check.command.is_empty() || check.command == ["NONE"] {
            return None;
        }
        let or = |duration: Duration, usual: Duration| if duration.is_zero() { usual } else { duration };
        let check = HealthCheck {
            interval: or(check.interval, USUAL),
            timeout: or(check.timeout, USUAL),
            start_interval: or(check.start_interval, USUAL_START_INTERVAL),
            retries: if check.retries == 0 { USUAL_RETRIES } else { check.retries },
            ..check.clone()
        };
        let status = HealthStatus { state: HealthState::Starting, failing: 0, last_output: String::new() };
        let mut health = Self { check, started, status, next: started, probe: None };
        health.next = started + health.interval(started);
        Some(health)
    }

    /// What is known.
    pub(crate) fn status(&self) -> &HealthStatus {
        &self.status
    }

    /// The command that checks.
    pub(crate) fn command(&self) -> &[String] {
        &self.check.command
    }

    /// When something is to be done next: begin a check, or end one that takes too long.
    pub(crate) fn wakes(&self) -> Instant {
        self.probe.as_ref().map_or(self.next, |probe| probe.deadline)
    }

    /// Whether a check is to begin now.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.probe.is_none() && now >= self.next
    }

    /// Where the output of the check that runs comes from.
    pub(crate) fn probe_output(&self) -> Option<&OwnedFd> {
        self.probe.as_ref()?.output.as_ref()
    }

    /// The check that runs.
    pub(crate) fn probe(&mut self) -> Option<&mut Probe> {
        self.probe.as_mut()
    }

    /// A check has begun.
    pub(crate) fn began(&mut self, process: ProcessId, output: OwnedFd, now: Instant) {
        let deadline = now + self.check.timeout;
        self.probe = Some(Probe { process, output: Some(output), deadline, text: Vec::new() });
    }

    /// The check's process, if it has taken too long.
    pub(crate) fn overdue(&self, now: Instant) -> Option<ProcessId> {
        self.probe.as_ref().filter(|probe| now >= probe.deadline).map(|probe| probe.process)
    }

    /// The check has ended (`code`), or was ended because it took too long, or could not be begun (`None`, with
    /// the reason). `true` if the verdict is another one now.
    pub(crate) fn ended(&mut self, code: Option<u8>, reason: Option<&str>, now: Instant) -> bool {
        let mut text = String::new();
        if let Some(mut probe) = self.probe.take() {
            probe.read();
            text = String::from_utf8_lossy(&probe.text).into_owned();
        }
        if let Some(reason) = reason {
            text = if text.is_empty() { reason.to_owned() } else { format!("{text}\n{reason}") };
        }
        let before = self.status.state;
        if code == Some(0) {
            self.status.state = HealthState::Healthy;
            self.status.failing = 0;
        } else if self.status.state != HealthState::Starting
            || now.saturating_duration_since(self.started) >= self.check.start_period
        {
            self.status.failing = self.status.failing.saturating_add(1);
            if self.status.failing >= self.check.retries {
                self.status.state = HealthState::Unhealthy;
            }
        }
        self.status.last_output = text;
        self.next = now + self.interval(now);
        before != self.status.state
    }

    fn interval(&self, now: Instant) -> Duration {
        let starting = self.status.state == HealthState::Starting
            && now.saturating_duration_since(self.started) < self.check.start_period;
        if starting { self.check.start_interval.min(self.check.interval) } else { self.check.interval }
    }
}

impl Probe {
    /// Takes in what there is of its output; forgets what goes beyond 4 KiB.
    pub(crate) fn read(&mut self) {
        let mut buffer = [0; 4096];
        // No more than a pipe holds at a time: a check that writes without end must not keep the supervisor from all else.
        for _ in 0..16 {
            let Some(output) = &self.output else { return };
            match rustix::io::read(output, &mut buffer).map_err(io::Error::from) {
                Ok(0) => self.output = None,
                Ok(read) => {
                    let room = MAX_OUTPUT - self.text.len();
                    self.text.extend_from_slice(&buffer[..read.min(room)]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.output = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(retries: u32, start_period: u64) -> HealthCheck {
        HealthCheck {
            command: vec!["check".into()],
            interval: Duration::from_secs(30),
            timeout: Duration::from_secs(3),
            start_period: Duration::from_secs(start_period),
            start_interval: Duration::from_secs(2),
            retries,
        }
    }

    #[test]
    fn verdicts_follow_dockers_rules() {
        use HealthState::{Healthy, Starting, Unhealthy};
        /// Second, exit code, verdict afterwards.
        type Step = (u64, u8, HealthState);
        let table: [(&str, HealthCheck, &[Step]); 4] = [
            ("retries in a row", check(3, 0), &[(30, 1, Starting), (60, 1, Starting), (90, 1, Unhealthy)]),
            (
                "a success forgives",
                check(2, 0),
                &[
                    (30, 1, Starting),
                    (60, 0, Healthy),
                    (90, 1, Healthy),
                    (120, 1, Unhealthy),
                    (150, 0, Healthy),
                ],
            ),
            (
                "failures in the start period do not count",
                check(1, 5),
                &[(2, 1, Starting), (4, 1, Starting), (6, 1, Unhealthy)],
            ),
            (
                "after a success they count even in the start period",
                check(2, 100),
                &[(2, 0, Healthy), (32, 1, Healthy), (62, 1, Unhealthy)],
            ),
        ];
        for (what, check, steps) in table {
            let start = Instant::now();
            let mut health = Health::new(&check, start).unwrap();
            for (second, code, verdict) in steps {
                let now = start + Duration::from_secs(*second);
                assert!(health.is_due(now), "{what}: due at {second}");
                assert!(!health.is_due(now - Duration::from_millis(1001)), "{what}: not before {second}");
                health.ended(Some(*code), None, now);
                assert_eq!(health.status().state, *verdict, "{what}: at {second}");
            }
        }
    }

    #[test]
    fn zeros_are_dockers_usual_values_and_none_is_no_check() {
        let zero = HealthCheck {
            interval: Duration::ZERO,
            timeout: Duration::ZERO,
            start_interval: Duration::ZERO,
            ..check(0, 0)
        };
        let start = Instant::now();
        let health = Health::new(&zero, start).unwrap();
        assert_eq!(health.wakes(), start + USUAL);
        assert_eq!(health.check.retries, 3);
        assert!(Health::new(&HealthCheck { command: vec!["NONE".into()], ..zero.clone() }, start).is_none());
        assert!(Health::new(&HealthCheck { command: Vec::new(), ..zero }, start).is_none());
    }
}
