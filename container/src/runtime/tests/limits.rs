//! Control groups of real containers.

use std::time::Duration;

use kiln_contract::{ByteSize, CpuLimit};

use super::bed::{Bed, pipes, require_v1, runtimes, wait};
use crate::cgroup::{network_bytes, process_table};

#[test]
fn a_container_that_takes_too_much_memory_is_killed_and_it_is_told() {
    for runtime in runtimes() {
        if !require_v1() {
            return;
        }
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=60"])
        else {
            return;
        };
        bed.record.spec.resources.memory = Some(ByteSize(16 << 20));
        let outcome = bed.run().unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
        assert!(outcome.out_of_memory, "{runtime:?}: {outcome:?}");
        assert_ne!(outcome.code, 0, "{runtime:?}: {outcome:?}");

        let Some(mut bed) = Bed::new(&runtime, &["cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes"])
        else {
            return;
        };
        bed.record.spec.resources.memory = Some(ByteSize(16 << 20));
        let outcome = bed.run().unwrap();
        assert!(!outcome.out_of_memory, "{runtime:?}");
        assert_eq!(outcome.stdout, "16777216\n", "{runtime:?}: {outcome:?}");
    }
}

#[test]
fn processes_and_processors_are_limited() {
    for runtime in runtimes() {
        if !require_v1() {
            return;
        }
        let script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait";
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        bed.record.spec.resources.pids = Some(5);
        let outcome = bed.run().unwrap();
        assert!(outcome.stderr.contains("can't fork"), "{runtime:?}: {outcome:?}");

        let script = "cd /sys/fs/cgroup; cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us cpu/cpu.shares cpuset/cpuset.cpus; \
            grep Cpus_allowed_list /proc/self/status";
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        bed.record.spec.resources.cpus = Some(CpuLimit { millis: 1500 });
        bed.record.spec.resources.cpu_shares = Some(512);
        bed.record.spec.resources.cpuset = Some("0".into());
        let outcome = bed.run().unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
        assert_eq!(
            outcome.stdout, "150000\n100000\n512\n0\nCpus_allowed_list:\t0\n",
            "{runtime:?}: {outcome:?}"
        );
    }
}

#[test]
fn devices_that_were_not_given_cannot_be_opened() {
    for runtime in runtimes() {
        if !require_v1() {
            return;
        }
        // The host's kernel log: no rule allows it.
        let script = "mknod /m c 1 11 && cat /m; mknod /n c 1 3 && echo x >/n && echo null";
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        let outcome = bed.run().unwrap();
        assert!(outcome.stderr.contains("Operation not permitted"), "{runtime:?}: {outcome:?}");
        assert_eq!(outcome.stdout, "null\n", "{runtime:?}: {outcome:?}");
    }
}

#[test]
fn a_container_is_frozen_measured_listed_and_killed() {
    for runtime in runtimes() {
        if !require_v1() {
            return;
        }
        let script = "while true; do echo x; sleep 0.01; done & while true; do :; done";
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        bed.record.spec.resources.pids = Some(50);
        let (streams, [out, _err]) = pipes();
        let created = bed.launch(streams).unwrap();
        let cgroup = bed.cgroup().unwrap();
        let mut byte = [0];
        rustix::io::read(&out, &mut byte).unwrap();

        cgroup.freeze().unwrap();
        let before = cgroup.stats().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(cgroup.stats().unwrap().cpu, before.cpu, "{runtime:?}");
        assert!(
            before.pids >= 2 && before.memory > 0 && before.cpu > Duration::ZERO,
            "{runtime:?}: {before:?}"
        );
        assert_eq!(before.pids_limit, Some(50));
        assert_eq!(before.memory_limit, None);
        cgroup.thaw().unwrap();
        while cgroup.stats().unwrap().cpu == before.cpu {
            std::thread::yield_now();
        }

        let table = process_table(Some(&cgroup), created.process.pid).unwrap();
        let first = table.rows.iter().find(|row| row[1] == created.process.pid.to_string()).unwrap();
        assert!(first[0] == "root" && first[7].starts_with("sh -c while"), "{table:?}");
        let by_namespace = process_table(None, created.process.pid).unwrap();
        assert!(by_namespace.rows.iter().any(|row| row[1] == first[1]), "{by_namespace:?}");
        assert_eq!(network_bytes(created.process.pid).unwrap(), (0, 0));

        // Frozen processes are killed too.
        cgroup.freeze().unwrap();
        cgroup.kill().unwrap();
        assert_eq!(wait(created.process), 137, "{runtime:?}");
        bed.record.process = None;
    }
}

#[test]
fn limits_that_cannot_be_are_refused() {
    type Change = fn(&mut kiln_contract::Resources);
    let cases: [(&str, Change); 3] = [
        ("less than memory", |resources| {
            resources.memory = Some(ByteSize(32 << 20));
            resources.memory_swap = Some(ByteSize(16 << 20));
        }),
        ("along with memory", |resources| resources.memory_swap = Some(ByteSize(16 << 20))),
        ("processors `777`", |resources| resources.cpuset = Some("777".into())),
    ];
    for (word, change) in cases {
        if !require_v1() {
            return;
        }
        let Some(mut bed) = Bed::new(&kiln_contract::RuntimeChoice::Native, &["true"]) else { return };
        change(&mut bed.record.spec.resources);
        let error = bed.run().expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
        for controller in ["memory", "cpuset", "freezer"] {
            let left = std::path::Path::new("/sys/fs/cgroup")
                .join(controller)
                .join("kiln")
                .join(bed.record.id.as_str());
            assert!(!left.exists(), "{}", left.display());
        }
    }
}
