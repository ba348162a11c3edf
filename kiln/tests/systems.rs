//! System images: systemd in Debian as the first process of a machine, under QEMU (with TCG where there is no KVM).

mod common;

use std::time::{Duration, Instant};

use common::{Home, finish_within};
use kiln_boot::{Kernels, Source};

const SYSTEM: &str = "localhost/debian-system:test";

/// A home with a kernel and the image.
fn home() -> Option<Home> {
    kiln_fixtures::require("qemu-system-x86_64")?;
    let package = kiln_fixtures::debian_kernel()?;
    let rootfs = kiln_fixtures::debian_system_rootfs()?;
    let home = Home::new();
    let kernels = Kernels::open(&kiln_contract::Home::at(home.path()));
    kernels.install(&Source::Packages(vec![package]), None, &kiln_contract::Silent).unwrap();
    home.ok(["image", "import", rootfs.to_str().unwrap(), SYSTEM]);
    Some(home)
}

/// What a shell says in a machine.
#[track_caller]
fn sh(home: &Home, name: &str, script: &str) -> String {
    home.ok(["exec", name, "sh", "-c", script])
}

/// Waits until systemd has started all that it is to start, and fails with what it says unless that is well.
fn booted(home: &Home, name: &str) {
    let begun = Instant::now();
    loop {
        let state = home.kiln(["exec", name, "systemctl", "is-system-running"]).stdout;
        match state.trim() {
            "running" => return,
            "degraded" | "maintenance" | "stopping" => {
                let why = sh(home, name, "systemctl --failed --no-legend; journalctl --no-pager -b -p 4");
                panic!("{state}: {why}");
            }
            _ => assert!(begun.elapsed() < Duration::from_secs(400), "it is still {state}"),
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Host name and machine id, as files and as systemd has them.
#[track_caller]
fn identity(home: &Home, name: &str) -> Vec<String> {
    let script = "hostname; cat /etc/hostname /etc/machine-id; hostnamectl --static; busctl get-property \
                  org.freedesktop.hostname1 /org/freedesktop/hostname1 org.freedesktop.hostname1 Hostname";
    sh(home, name, script).lines().map(str::to_owned).collect()
}

#[test]
fn systemd_runs_in_a_machine_and_its_forks_are_machines_of_their_own() {
    let Some(home) = home() else { return };
    // The first start makes the template, which a busy host takes its time for.
    let run = home.command(["run", "-d", "--vm", "--init", "--memory", "512m", "--name", "first", SYSTEM]);
    let ended = finish_within(run, Duration::from_secs(240));
    assert_eq!(ended.code, 0, "{ended:?}");
    booted(&home, "first");

    // (what it shows, a script, what it says)
    let table = [
        ("init is systemd", "cat /proc/1/comm", "systemd"),
        ("it takes the machine for one", "systemd-detect-virt --container || true", "none"),
        ("jobs", "systemctl list-jobs --no-legend", ""),
        ("the bus", "busctl status org.freedesktop.login1 > /dev/null && echo yes", "yes"),
        (
            "the journal",
            "logger -t kiln-test words; journalctl --sync; journalctl -t kiln-test -o cat",
            "words",
        ),
        (
            "services under limits, in groups of their own",
            "systemd-run --quiet --wait --pipe -p MemoryMax=64M -p TasksMax=9 \
             sh -c 'cd /sys/fs/cgroup/$(cut -d: -f3 /proc/self/cgroup) && cat memory.max pids.max'",
            "67108864\n9",
        ),
        ("a terminal of its own", "tty < /dev/console; ls -d /dev/pts/ptmx", "/dev/console\n/dev/pts/ptmx"),
        ("names are asked of the gateway", "cat /etc/resolv.conf", "nameserver 192.0.0.1"),
        ("the network is the guest's", "ip -br address show kiln0 | cut -d' ' -f1", "kiln0"),
        (
            "the id is not written into the root",
            "systemctl is-active systemd-machine-id-commit; mountpoint -q /etc/machine-id && echo over",
            "inactive\nover",
        ),
    ];
    for (what, script, said) in table {
        assert_eq!(sh(&home, "first", script), said, "{what}");
    }
    let first = identity(&home, "first");

    // A live fork: the same system goes on as another.
    sh(
        &home,
        "first",
        "systemd-run --quiet --unit=ticker sh -c 'while :; do date +%s > /run/new; mv /run/new /run/tick; sleep 0.2; done'",
    );
    home.ok(["fork", "first", "second"]);
    let second = identity(&home, "second");
    for (index, (one, other)) in first.iter().zip(&second).enumerate() {
        assert_ne!(one, other, "{index}: {first:?} {second:?}");
    }
    for name in ["first", "second"] {
        assert_eq!(
            sh(&home, name, "systemctl is-system-running; systemctl is-active ticker"),
            "running\nactive"
        );
        let script = "before=$(cat /run/tick); sleep 3; test $(cat /run/tick) -gt $before && echo goes on";
        assert_eq!(sh(&home, name, script), "goes on", "{name}");
    }

    // It stops as a system does: services end in order, and what they wrote is there at the next start.
    sh(
        &home,
        "second",
        "systemd-run --quiet --unit=last -p 'ExecStop=sh -c \"echo stopped in order > /stopped\"' -p RemainAfterExit=yes true; \
         mkdir -p /var/log/journal && systemctl restart systemd-journald",
    );
    let stop = home.command(["stop", "-t", "60", "second"]);
    let ended = finish_within(stop, Duration::from_secs(90));
    assert_eq!(ended.code, 0, "{ended:?}");
    let shown = home.json(["inspect", "second"]);
    assert_eq!(shown[0]["exit"]["code"], 0, "{shown}");
    home.ok(["start", "second"]);
    booted(&home, "second");
    assert_eq!(sh(&home, "second", "cat /stopped"), "stopped in order");
    assert_eq!(identity(&home, "second"), second, "a machine stays who it is");
    let boots = sh(&home, "second", "journalctl --list-boots --no-pager | wc -l");
    assert!(boots.trim().parse::<u32>().unwrap() >= 2, "a journal on the disk outlives the boot: {boots}");
}
