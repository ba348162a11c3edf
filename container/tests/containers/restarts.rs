//! Restart policies.

use std::time::Duration;

use kiln_contract::{InstanceStatus, RuntimeBackend};

use crate::bed::{Bed, Test, wait_for_status, wait_until};

pub(crate) const TESTS: &[Test] = &[
    ("a failing container is restarted as often as its policy says", on_failure),
    ("stopping ends the restarts, while it runs and while it waits", stopping),
];

fn on_failure() {
    let bed = Bed::new();
    // Fails twice, then is well: the count is kept in its root, which lives on.
    let counts = "n=$(cat /n 2>/dev/null || echo 0); n=$((n+1)); echo $n > /n; echo run $n; test $n -ge 3";
    let table = [
        ("never", "no", "exit 1", 0, 1),
        ("limited", "on-failure:2", "exit 6", 2, 6),
        ("recovers", "on-failure", counts, 2, 0),
        ("succeeds", "on-failure", "exit 0", 0, 0),
    ];
    for (name, policy, script, restarts, code) in table {
        let mut spec = bed.spec(name, &["sh", "-c", script]);
        spec.restart = policy.parse().unwrap();
        let record = bed.run(&spec);
        assert_eq!(bed.containers.wait(&record.id).unwrap().code, code, "{name}");
        let ended = bed.look(&record);
        assert_eq!((ended.status, ended.restarts), (InstanceStatus::Exited, restarts), "{name}");
        if name == "recovers" {
            assert_eq!(bed.log(&record), "run 1\nrun 2\nrun 3\n");
        }
    }
}

fn stopping() {
    let bed = Bed::new();
    let mut spec = bed.spec("always", &["sh", "-c", "exit 3"]);
    spec.restart = "always".parse().unwrap();
    let record = bed.run(&spec);
    wait_until("it has restarted twice", || bed.look(&record).restarts >= 2);
    wait_for_status(&bed, &record, InstanceStatus::Restarting);
    bed.containers.stop(&record.id, None).unwrap();
    let ended = bed.look(&record);
    assert_eq!((ended.status, ended.exit.unwrap().code), (InstanceStatus::Exited, 3));

    let mut spec = bed.spec("runs", &["sleep", "1000"]);
    spec.restart = "unless-stopped".parse().unwrap();
    let record = bed.run(&spec);
    bed.containers.stop(&record.id, Some(Duration::ZERO)).unwrap();
    assert_eq!(bed.look(&record).status, InstanceStatus::Exited);
}
