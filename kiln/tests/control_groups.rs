//! Containers on control groups of version 2, whatever this host has: in a machine, whose kernel gives its workload a
//! subtree with all controllers. The kernel is Debian's, older than the first that mounts a tree from its file.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use common::Home;
use kiln_boot::{Kernels, Source};
use kiln_store::{ImageName, Store};
use oci_spec::image::ImageConfiguration;

const IMAGE: &str = "localhost/kiln:test";

/// A home in which a machine named `host` runs, which has Kiln and an image `box` in a home of its own.
static HOST: LazyLock<Option<Home>> = LazyLock::new(|| {
    kiln_fixtures::require("qemu-system-x86_64")?;
    kiln_fixtures::require("ldd")?;
    let package = kiln_fixtures::debian_kernel()?;
    if !kiln_fixtures::require_root() {
        return None;
    }
    let busybox = kiln_fixtures::busybox_rootfs()?;
    let home = Home::new().until_the_end();
    let kernels = Kernels::open(&kiln_contract::Home::at(home.path()));
    kernels.install(&Source::Packages(vec![package]), None, &kiln_contract::Silent).unwrap();
    let root = home.beside("root");
    make_root(&busybox, &root);
    let store = Store::open(&kiln_contract::Home::at(home.path())).unwrap();
    let layer = store.import_directory(&root).unwrap().layer;
    let image = store.make_image(&ImageConfiguration::default(), &[layer]).unwrap();
    store.tag(&ImageName::parse(IMAGE).unwrap(), &image.manifest_digest, "test").unwrap();
    drop(store);
    // A busy host takes its time for the template.
    let start =
        ["run", "-d", "--vm", "--privileged", "--name", "host", "--memory", "512m", IMAGE, "sleep", "3600"];
    let started = common::finish_within(home.command(start), Duration::from_secs(300));
    assert_eq!(started.code, 0, "{started:?}");
    in_host(&home, "chmod 666 /dev/fuse; kiln image import -q /box box");
    Some(home)
});

/// Busybox with this very Kiln, what that is linked with, and in `/box` the root of an image with a disk that is not its own.
fn make_root(busybox: &Path, root: &Path) {
    let run = |command: &mut Command| assert!(command.status().unwrap().success());
    run(Command::new("cp").arg("-a").arg(busybox).arg(root));
    let kiln = env!("CARGO_BIN_EXE_kiln");
    fs::copy(kiln, root.join("bin/kiln")).unwrap();
    let linked = String::from_utf8(Command::new("ldd").arg(kiln).output().unwrap().stdout).unwrap();
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        let target = root.join(&library[1..]);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(library, target).unwrap();
    }
    // An overlay cannot be the upper layer of another: the machine's disk lies here.
    fs::create_dir_all(root.join("var/lib/kiln")).unwrap();
    run(Command::new("cp").arg("-a").arg(busybox).arg(root.join("box")));
    let (kind, mode) = (rustix::fs::FileType::BlockDevice, rustix::fs::Mode::from_raw_mode(0o666));
    let disk = root.join("box/disk");
    rustix::fs::mknodat(rustix::fs::CWD, &disk, kind, mode, rustix::fs::makedev(254, 0)).unwrap();
    fs::set_permissions(&disk, PermissionsExt::from_mode(0o666)).unwrap();
}

/// What a script says in the machine.
#[track_caller]
fn in_host(home: &Home, script: &str) -> String {
    let script = format!("exec 2>&1; export PATH=/bin KILN_HOME=/var/lib/kiln; {script}");
    let within = home.command(["exec", "host", "sh", "-c", &script]);
    common::finish_within(within, Duration::from_secs(300)).stdout
}

/// The same as the user `app`, to whom a group was delegated as systemd does it.
#[track_caller]
fn as_app(home: &Home, script: &str) -> String {
    let delegate = "cd /; g=/sys/fs/cgroup/app; mkdir -p $g/shell $KILN_HOME/app; \
        for each in $(cat /sys/fs/cgroup/cgroup.controllers); do echo +$each >/sys/fs/cgroup/cgroup.subtree_control; done; \
        chown -R app $g $KILN_HOME/app; echo $$ >$g/shell/cgroup.procs; \
        export KILN_HOME=/var/lib/kiln/app; exec su -p -s /bin/sh app -c";
    in_host(home, &format!("{delegate} '{script}'"))
}

const FLAGS: &str = "--memory 64m --cpus .5 --pids-limit 20 --cpuset-cpus 0 --cpu-shares 512";
const FILES: &str = "memory.max memory.swap.max cpu.max pids.max cpuset.cpus cpu.weight";
/// What these files say.
const LIMITS: &str = "67108864\n67108864\n50000 100000\n20\n0\n20\n";

/// A container in `group` and below: limited, measured, suspended, entered, gone.
fn lives(run: impl Fn(&str) -> String, group: &str) {
    let begun = run(&format!("kiln run -d --network none {FLAGS} --name c box sleep 3600"));
    assert_eq!(begun.trim_end().len(), 64, "{begun}");
    let id = begun.trim_end();
    assert_eq!(run(&format!("cd /sys/fs/cgroup/{group}{id} && cat {FILES}")), LIMITS);
    let stats = run("kiln stats --no-stream --format json c");
    let stats: serde_json::Value =
        serde_json::from_str(&stats).unwrap_or_else(|error| panic!("{error}: {stats}"));
    let stats = &stats[0];
    assert_eq!((&stats["memory_limit"], &stats["pids"]), (&(64 << 20).into(), &1.into()), "{stats}");
    assert!(stats["memory"].as_u64().unwrap() > 0, "{stats}");
    let events = format!("grep frozen /sys/fs/cgroup/{group}{id}/cgroup.events");
    let paused = run(&format!("kiln pause c; {events}; kiln resume c; {events}"));
    assert_eq!(paused, "c\nfrozen 1\nc\nfrozen 0\n");
    let inside = run("kiln exec c cat /proc/self/cgroup /sys/fs/cgroup/memory.max");
    assert_eq!(
        inside, "0::/\n67108864\n",
        "the container sees its group as the root, and what comes in is in it"
    );
    // Frozen processes are killed too, and nothing is left.
    let removed = run(&format!(
        "echo 1 >/sys/fs/cgroup/{group}{id}/cgroup.freeze; kiln rm -f c; ls -d /sys/fs/cgroup/{group}*{id}* 2>/dev/null"
    ));
    assert_eq!(removed, "c\n");
}

/// A container that takes too much of something.
fn is_kept_within_limits(run: impl Fn(&str) -> String) {
    let killed = run(
        "kiln run --network none --memory 16m --name oom box sh -c \"dd if=/dev/zero of=/dev/shm/x bs=1M count=60\"; \
         echo $?; kiln inspect oom | grep -o \"out_of_memory.*true\"",
    );
    assert_eq!(killed, "137\nout_of_memory\": true\n");
}

#[test]
fn containers_of_root_are_limited_frozen_and_measured_by_groups_of_version_2() {
    let Some(home) = &*HOST else { return };
    let run = |script: &str| in_host(home, script);
    lives(run, "kiln/");
    is_kept_within_limits(run);
    let script = "for each in 1 2 3 4 5 6 7; do sleep 1 & done; wait";
    let refused = run(&format!("kiln run --rm --network none --pids-limit 5 box sh -c \"{script}\""));
    assert!(refused.contains("fork"), "{refused}");
    let wrong = run("kiln run --network none --cidfile /tmp/wrong --cpuset-cpus 777 box true; \
         ls -d /sys/fs/cgroup/kiln/$(cat /tmp/wrong) 2>/dev/null");
    assert!(wrong.contains("processors `777`"), "{wrong}");
    assert_eq!(wrong.matches("/sys/fs/cgroup").count(), 1, "{wrong}");
}

#[test]
fn containers_of_others_are_in_the_group_that_was_delegated_to_them() {
    let Some(home) = &*HOST else { return };
    in_host(home, "kiln image export -q -o /tmp/box.tar box; chmod 644 /tmp/box.tar");
    let run = |script: &str| as_app(home, script);
    assert_eq!(run("kiln image import -q /tmp/box.tar"), "box:latest\n");
    lives(run, "app/kiln-");
    is_kept_within_limits(run);
}

#[test]
fn a_container_cannot_use_devices_that_it_was_not_given() {
    let Some(home) = &*HOST else { return };
    // Of the image, and of its own making.
    let script =
        "head -c 8 /disk; mknod /log c 1 11; head -c 1 /log; mknod /null c 1 3; echo x >/null && echo null";
    let denied = in_host(home, &format!("kiln run --rm --network none box sh -c \"{script}\""));
    assert_eq!(denied, "head: /disk: Operation not permitted\nhead: /log: Operation not permitted\nnull\n");
    let given = "kiln run --rm --network none --device /dev/vda:/dev/disk:r box sh -c \
        \"head -c 8 /dev/disk; echo; echo x >/dev/disk\"; kiln run --rm --network none --privileged box head -c 8 /disk";
    let given = in_host(home, given);
    assert!(given.starts_with("kilntree\n") && given.ends_with("kilntree"), "{given}");
    assert!(given.contains("Operation not permitted"), "it was given to be read only: {given}");
}
