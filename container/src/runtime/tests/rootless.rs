//! Containers of an ordinary user, in a user namespace that maps him to root.

use kiln_contract::{ByteSize, Capability};

use super::bed::{Bed, pipes, runtimes};
use crate::cgroup;
use crate::runtime::NetworkNamespace;

#[test]
fn an_ordinary_user_has_containers_too() {
    if !kiln_fixtures::require_root() {
        return;
    }
    let (Some(user), Some(unshare)) = (kiln_fixtures::OrdinaryUser::get(), kiln_fixtures::require("unshare"))
    else {
        return;
    };
    let directory = user.tempdir();
    for mapping in [&["--map-root-user", "--map-auto"][..], &["--map-root-user"]] {
        let mut command = user.command(&unshare);
        command.args(["--user", "--mount"]).args(mapping);
        // `command` copies what the user cannot reach; the same for the program of this test.
        command.arg(user.command(&std::env::current_exe().unwrap()).get_program());
        command.args(["--exact", "--ignored", "--nocapture", "runtime::tests::rootless::inside"]);
        command.env("KILN_FIXTURES", directory.path().join("fixtures")).env("TMPDIR", directory.path());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{mapping:?}: {text}");
    }
}

#[test]
#[ignore = "run by the one above, in a user namespace"]
fn inside() {
    assert!(crate::host::in_user_namespace());
    let whole = crate::host::mapped_groups() > 1000;
    for runtime in runtimes() {
        let script = "id -u; id -g; echo x >/dev/null; head -c 1 /dev/urandom | wc -c; hostname; ls /sys/class/net; \
            touch /root/x; stat -c %u /root/x; touch /sys/x 2>/dev/null || echo sys; cat /proc/self/attr/current 2>/dev/null; \
            sed -n 's/^Seccomp:\\t//p' /proc/self/status";
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        bed.record.spec.hostname = Some("box".into());
        let outcome = bed.run().unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
        assert_eq!(outcome.stdout, "0\n0\n1\nbox\nlo\n0\nsys\n2\n", "{runtime:?}: {outcome:?}");

        let Some(mut bed) = Bed::new(&runtime, &["cat", "/proc/self/status"]) else { return };
        bed.network = NetworkNamespace::Host;
        let outcome = bed.run().unwrap_or_else(|error| panic!("host network, {runtime:?}: {error}"));
        assert!(outcome.stdout.contains("CapEff:\t00000000a80425fb"), "{runtime:?}: {outcome:?}");

        if !whole {
            let Some(mut bed) = Bed::new(&runtime, &["true"]) else { return };
            bed.record.spec.process.user = "app".into();
            let error = bed.run().unwrap_err().to_string();
            assert!(error.contains("the user 1000 is none of those that you may have"), "{error}");
        }
        if whole {
            let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", "id -u; id -G"]) else { return };
            bed.record.spec.process.user = "app".into();
            let outcome = bed.run().unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
            assert_eq!(outcome.stdout, "1000\n1000 50\n", "{runtime:?}: {outcome:?}");
        }

        let Some(mut bed) = Bed::new(&runtime, &["sleep", "60"]) else { return };
        let (streams, _ours) = pipes();
        bed.launch(streams).unwrap();
        let outcome = bed.exec(&["sh", "-c", "id -u; readlink /proc/1/ns/pid"], |_| {}).unwrap();
        let own = std::fs::read_link(format!("/proc/{}/ns/pid", bed.record.process.unwrap().pid)).unwrap();
        assert_eq!(outcome.stdout, format!("0\n{}\n", own.display()), "{runtime:?}: {outcome:?}");

        let Some(mut bed) = Bed::new(&runtime, &["true"]) else { return };
        bed.record.spec.resources.memory = Some(ByteSize(16 << 20));
        match cgroup::capabilities().reason_against(Capability::MemoryLimit) {
            Some(reason) => {
                let error = bed.run().unwrap_err().to_string();
                assert!(error.contains("memory") && error.contains(reason), "{error} / {reason}");
            }
            None => assert_eq!(bed.run().unwrap().code, 0),
        }
    }
}
