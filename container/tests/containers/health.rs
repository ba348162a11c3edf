//! Health checks.

use std::time::Duration;

use kiln_contract::{HealthCheck, HealthState, RuntimeBackend};

use crate::bed::{Bed, Test, wait_until};

pub(crate) const TESTS: &[Test] = &[
    ("health goes from starting to healthy to unhealthy and back", transitions),
    ("a check that hangs is killed with all that it started", hanging),
];

fn check(script: &str, timeout: Duration) -> HealthCheck {
    HealthCheck {
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        interval: Duration::from_millis(30),
        timeout,
        start_period: Duration::ZERO,
        start_interval: Duration::from_millis(30),
        retries: 2,
    }
}

fn transitions() {
    let bed = Bed::new();
    let mut spec = bed.spec("well", &["sleep", "1000"]);
    spec.health = Some(check("echo looked; head -c 10000 /dev/zero; test -e /ok", Duration::from_secs(10)));
    let record = bed.run(&spec);
    let state = || bed.look(&record).health.unwrap();
    wait_until("it is unhealthy", || state().state == HealthState::Unhealthy);
    assert!(state().failing >= 2);
    assert!(state().last_output.starts_with("looked\n") && state().last_output.len() == 4096);
    for (script, verdict) in [("touch /ok", HealthState::Healthy), ("rm /ok", HealthState::Unhealthy)] {
        assert!(bed.command(&["test-exec", "well", "sh", "-c", script]).status().unwrap().success());
        wait_until(&format!("{verdict:?} after {script}"), || state().state == verdict);
    }
    bed.containers.stop(&record.id, Some(Duration::ZERO)).unwrap();
}

fn hanging() {
    let bed = Bed::new();
    let mut spec = bed.spec("stuck", &["sleep", "1000"]);
    spec.health = Some(check("echo begun; sleep 2000 & sleep 2000", Duration::from_millis(300)));
    let record = bed.run(&spec);
    wait_until("it is unhealthy", || bed.look(&record).health.unwrap().state == HealthState::Unhealthy);
    let output = bed.look(&record).health.unwrap().last_output;
    assert!(output.contains("begun") && output.contains("too long"), "{output}");
    let rows = bed.containers.top(&record.id).unwrap().rows;
    let hanging = rows.iter().filter(|row| row.last().unwrap().contains("sleep 2000")).count();
    assert!(hanging <= 4, "of the checks at most the present one runs: {rows:?}");
}
