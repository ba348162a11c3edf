//! Machines on networks with others: real kernels under QEMU (with TCG where there is no KVM).

mod common;

use std::sync::LazyLock;
use std::time::Duration;

use common::{Ended, Home, IMAGE, finish_within, until};
use rustix::process::{Pid, Signal, kill_process};

static HOME: LazyLock<Option<Home>> = LazyLock::new(|| {
    kiln_fixtures::require("nft")?;
    let home = Home::with_kernel()?.until_the_end();
    // A program that speaks UDP, which busybox does not.
    common::compile("udp", &home.beside("udp"));
    Some(home)
});

/// Starts something in the background that serves its name over HTTP and UDP, and can ask others.
fn serving(home: &Home, flags: &[&str], name: &str) {
    let share = format!("{}:/udp:ro", home.beside("udp").display());
    let script = format!("mkdir -p /www; echo {name} > /www/name; httpd -p 80 -h /www; exec /udp 7000");
    let words =
        [&["run", "-d", "--name", name, "-v", &share][..], flags, &[IMAGE, "sh", "-c", &script]].concat();
    home.ok(words);
}

/// The last line of what the server says.
fn fetch(home: &Home, from: &str, to: &str) -> Ended {
    // Not by wget: busybox's, linked statically, does not survive its own time-out.
    let script = format!("printf 'GET /name HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {to} 80 | tail -n 1");
    home.kiln(["exec", from, "sh", "-c", &script])
}

fn ask(home: &Home, from: &str, to: &str) -> Ended {
    home.kiln(["exec", from, "/udp", &format!("{to}:7000"), "words"])
}

/// Whether `from` reaches `to` over TCP and UDP, and finds `name` there.
fn reaches(home: &Home, from: &str, to: &str, name: &str) {
    until(&format!("{from} reaches {to}"), || fetch(home, from, to).stdout == format!("{name}\n"));
    let answered = ask(home, from, to);
    assert_eq!(answered.stdout, "hello words\n", "{from} to {to}: {answered:?}");
}

fn does_not_reach(home: &Home, from: &str, to: &str) {
    let fetched = fetch(home, from, to);
    assert!(fetched.stdout.is_empty(), "{from} to {to}: {fetched:?}");
    let answered = ask(home, from, to);
    assert!(answered.code != 0 && answered.stdout.is_empty(), "{from} to {to}: {answered:?}");
}

fn address(home: &Home, name: &str) -> String {
    let shown = home.json(["inspect", name]);
    let record = shown.as_array().map_or(shown.clone(), |all| all[0].clone());
    record["addresses"][0].as_str().unwrap_or_else(|| panic!("{record}")).to_owned()
}

const VM: [&str; 3] = ["--vm", "--memory", "256m"];

#[test]
fn machines_and_containers_of_one_network_find_each_other_by_name_and_others_do_not() {
    let Some(home) = &*HOME else { return };
    home.ok(["network", "create", "shop"]);
    home.ok(["network", "create", "street"]);
    let on = |network: &'static str, more: &[&'static str]| [&VM[..], &["--network", network], more].concat();
    serving(home, &on("shop", &["--network-alias", "storage"]), "db");
    serving(home, &on("shop", &[]), "web");
    serving(home, &["--network", "shop"], "box");
    serving(home, &on("street", &[]), "stranger");
    for (from, to, name) in [
        ("web", "db", "db"),
        ("web", "storage", "db"),
        ("web", "db.kiln.internal", "db"),
        ("db", "web", "web"),
        ("web", "web", "web"),
        ("web", "box", "box"),
        ("box", "web", "web"),
        ("box", "storage", "db"),
    ] {
        reaches(home, from, to, name);
    }
    reaches(home, "web", &address(home, "db"), "db");
    // Networks are walls, by name and by address, for machines and from containers.
    for to in ["db.kiln.internal", &address(home, "db"), &address(home, "box")] {
        does_not_reach(home, "stranger", to);
    }
    does_not_reach(home, "box", &address(home, "stranger"));
    does_not_reach(home, "web", &address(home, "stranger"));

    let refused = home.kiln(["network", "rm", "shop"]);
    assert!(refused.code != 0 && refused.stderr.contains("in use by 3 instance(s)"), "{refused:?}");
    // The name goes with its machine.
    home.ok(["rm", "-f", "db"]);
    let gone = fetch(home, "web", "db.kiln.internal");
    assert!(gone.stderr.contains("bad address"), "{gone:?}");
    home.ok(["rm", "-f", "web", "box", "stranger"]);
    home.ok(["network", "rm", "shop", "street"]);
}

#[test]
fn the_policy_decides_between_machines_and_a_network_for_them_takes_no_bridge() {
    let Some(home) = &*HOME else { return };
    home.ok(["network", "create", "--driver", "usernet", "--internal", "cells"]);
    let on = |more: &[&'static str]| [&VM[..], &["--network", "cells"], more].concat();
    serving(home, &on(&[]), "first");
    serving(home, &on(&["--allow", "first:80"]), "second");
    until("it serves", || fetch(home, "second", "first").stdout == "first\n");
    let denied = ask(home, "second", "first");
    assert!(denied.code != 0 && denied.stdout.is_empty(), "{denied:?}");
    reaches(home, "first", "second", "second");
    let outside = home.kiln(["exec", "first", "nslookup", "example.org"]);
    assert!(outside.code != 0 && outside.stdout.contains("NXDOMAIN"), "{outside:?}");

    // A fork is somebody else on the network, too.
    home.ok(["fork", "second", "third"]);
    assert_ne!(address(home, "third"), address(home, "second"));
    reaches(home, "first", "third", "second");
    let refused = home.kiln(["run", "--rm", "--network", "cells", IMAGE, "true"]);
    assert!(refused.code == 125 && refused.stderr.contains("has no bridge"), "{refused:?}");
    home.ok(["rm", "-f", "first", "second", "third"]);
    home.ok(["network", "rm", "cells"]);
}

/// What is known of an instance's device: the interface on the host, and rules that name it.
fn traces_of_device(id: &str) -> (bool, bool) {
    let said = |program: &str, words: &[&str]| {
        let output = std::process::Command::new(program).args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let short = &id[..12];
    (said("ip", &["-o", "link"]).contains(short), said("nft", &["list", "ruleset"]).contains(short))
}

#[test]
fn a_machine_with_a_device_of_its_own_is_a_neighbour_like_any_other_and_a_fork_of_it_is_somebody_else() {
    let Some(home) = &*HOME else { return };
    if kiln_fixtures::require("ip").is_none() {
        return;
    }
    home.ok(["network", "create", "yard"]);
    // Its template is another than that of machines without a device.
    let words = [&["run", "--rm"], &VM[..], &["--network", "tap:yard", IMAGE, "ip", "-o", "link"]].concat();
    let first = finish_within(home.command(words), Duration::from_secs(300));
    assert!(first.code == 0 && first.stdout.contains("eth0"), "{first:?}");
    let on = |more: &[&'static str]| [&VM[..], &["--network", "tap:yard"], more].concat();
    serving(home, &on(&["-p", "127.0.0.1:0:80"]), "cabin");
    serving(home, &on(&["--allow", "192.0.2.0/24"]), "cell");
    serving(home, &["--network", "yard"], "hut");
    for (from, to) in [("cabin", "hut"), ("hut", "cabin"), ("cabin", "cell"), ("hut", "cell")] {
        reaches(home, from, to, to);
    }
    // By its device, and nothing else: what it may not reach there, it does not reach otherwise.
    does_not_reach(home, "cell", &address(home, "hut"));
    let own = home.ok(["exec", "cabin", "ip", "-o", "-4", "addr", "show", "eth0"]);
    assert!(own.contains(&format!("{}/32", address(home, "cabin"))), "{own}");
    let published = home.ok(["port", "cabin"]);
    let port = published.rsplit(':').next().unwrap().trim().to_owned();
    until("its port is published", || {
        let words = format!("printf 'GET /name HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 3 127.0.0.1 {port}");
        let output = std::process::Command::new("sh").args(["-c", &words]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).ends_with("cabin\n")
    });

    home.ok(["fork", "cabin", "shed"]);
    assert_ne!(address(home, "shed"), address(home, "cabin"));
    reaches(home, "hut", &address(home, "shed"), "cabin");
    reaches(home, "shed", "hut", "hut");
    reaches(home, "shed", "cabin", "cabin");
    let hardware = |name: &str| home.ok(["exec", name, "cat", "/sys/class/net/eth0/address"]);
    assert_ne!(hardware("shed"), hardware("cabin"));
    reaches(home, "cabin", "shed", "cabin");

    // A supervisor that is killed takes the device with it, and who looks next takes the rest.
    let record = home.json(["inspect", "shed"])[0].clone();
    let id = record["id"].as_str().unwrap().to_owned();
    assert_eq!(traces_of_device(&id), (true, true));
    let supervisor = record["supervisor"]["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(supervisor.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    until("its device is gone", || !traces_of_device(&id).0);
    until("its rules are gone", || {
        home.ok(["ps", "-a"]);
        !traces_of_device(&id).1
    });
    // And again, from its disk.
    home.ok(["start", "shed"]);
    until("it is back", || fetch(home, "hut", &address(home, "shed")).stdout == "cabin\n");
    home.ok(["rm", "-f", "cabin", "cell", "hut", "shed"]);
    assert_eq!(traces_of_device(&id), (false, false));
    home.ok(["network", "rm", "yard"]);
}

#[test]
fn a_device_of_its_own_takes_root_and_rules_of_addresses() {
    let Some(home) = &*HOME else { return };
    let by_name =
        [&["run", "--rm"], &VM[..], &["--network", "tap", "--allow", "example.org", IMAGE, "true"]].concat();
    let refused = home.kiln(by_name);
    assert!(refused.code == 125 && refused.stderr.contains("known by address"), "{refused:?}");
    let firecracker =
        [&["create"], &VM[..], &["--network", "tap", "--hypervisor", "firecracker", IMAGE, "true"]].concat();
    let refused = home.kiln(firecracker);
    assert!(refused.code != 0 && refused.stderr.contains("cannot have a network device"), "{refused:?}");
    let container = home.kiln(["run", "--rm", "--network", "tap", IMAGE, "true"]);
    assert!(container.code == 125 && container.stderr.contains("connecting a container"), "{container:?}");
    let Some(user) = kiln_fixtures::OrdinaryUser::get() else { return };
    let theirs = Home::with_busybox().unwrap();
    let words = ["-R", "a+rwX"];
    assert!(
        std::process::Command::new("chmod")
            .args(words)
            .arg(theirs.path().parent().unwrap())
            .status()
            .unwrap()
            .success()
    );
    let mut command = user.command(env!("CARGO_BIN_EXE_kiln").as_ref());
    command.env("KILN_HOME", theirs.path());
    command.args(["create"]).args(VM).args(["--network", "tap", IMAGE, "true"]);
    let refused = common::finish(command);
    assert!(refused.code != 0 && refused.stderr.contains("takes root's rights"), "{refused:?}");
}
