//! Flags that machines have in common with containers: what a workload may do and what it may use.

mod common;

use std::sync::LazyLock;

use common::{Home, IMAGE};

static HOME: LazyLock<Option<Home>> = LazyLock::new(|| Some(Home::with_kernel()?.until_the_end()));

/// Prints limits, capabilities, whether privileges can be gained, and the resolver's options.
const SHOW: &str = "echo $(ulimit -n) $(ulimit -Hn); \
                    awk '/^(CapBnd|CapEff|NoNewPrivs):/ { print $1, $2 }' /proc/self/status; \
                    grep options /etc/resolv.conf";

#[test]
fn flags_are_seen_in_the_machine_by_its_workload_and_by_what_is_executed_beside_it() {
    let Some(home) = &*HOME else { return };
    let flags = [
        "run",
        "-d",
        "--vm",
        "--memory",
        "256m",
        "--name",
        "held",
        "--ulimit",
        "nofile=100:200",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "chown",
        "--cap-add",
        "NET_RAW",
        "--security-opt",
        "no-new-privileges",
        "--dns-option",
        "ndots:3",
        IMAGE,
        "sh",
        "-c",
    ];
    let workload = format!("({SHOW}) > /seen; exec sleep 1000");
    home.ok(flags.iter().copied().chain([&*workload]));
    let shown = |capabilities: &str| {
        format!("100 200\nCapEff: {capabilities}\nCapBnd: {capabilities}\nNoNewPrivs: 1\noptions ndots:3")
    };
    // Bits 0 and 13.
    let few = shown("0000000000002001");
    assert_eq!(home.ok(["exec", "held", "sh", "-c", SHOW]), few);
    assert_eq!(home.ok(["exec", "held", "cat", "/seen"]), few);
    assert_eq!(home.ok(["exec", "--privileged", "held", "sh", "-c", SHOW]), shown("000001ffffffffff"));
    home.ok(["rm", "-f", "held"]);
}

#[test]
fn without_flags_root_in_a_machine_may_do_everything() {
    let Some(home) = &*HOME else { return };
    for flags in [&[][..], &["--privileged"], &["--cap-add", "NET_ADMIN"]] {
        let words = [&["run", "--rm", "--vm", "--memory", "256m"][..], flags, &[IMAGE, "sh", "-c", SHOW]];
        let shown = home.kiln(words.concat());
        assert!(shown.stdout.contains("CapEff: 000001ffffffffff\n"), "{flags:?}: {shown:?}");
        assert!(shown.stdout.contains("NoNewPrivs: 0\n"), "{flags:?}: {shown:?}");
    }
}

#[test]
fn a_flag_that_a_machine_cannot_follow_is_refused_and_nothing_is_made() {
    let Some(home) = Home::with_busybox() else { return };
    for (flag, value) in [
        ("--pids-limit", "10"),
        ("--cpuset-cpus", "0"),
        ("--cpu-shares", "512"),
        ("--security-opt", "seccomp=/profile.json"),
        ("--device", "/dev/null"),
    ] {
        let refused = home.kiln(["create", "--vm", flag, value, IMAGE, "true"]);
        assert_eq!(refused.code, 125, "{refused:?}");
        assert!(refused.stderr.contains(flag), "{flag}: {refused:?}");
    }
    assert_eq!(home.ok(["ps", "-aq"]), "");
}
