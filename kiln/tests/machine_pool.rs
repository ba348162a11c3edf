//! Machines whose disks are in a btrfs pool: a file in the home, in which copies share blocks on any file system.

mod common;

use std::path::Path;
use std::time::Duration;

use common::{Home, IMAGE, finish_within};
use kiln_disk::BtrfsPool;

const MIB: u64 = 1 << 20;

/// Mounts at or below a directory.
fn mounts(directory: &Path) -> usize {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
    table.lines().filter(|line| line.contains(directory.to_str().unwrap())).count()
}

#[test]
fn machines_in_a_pool_share_blocks_with_their_copies_and_keep_it_while_they_are_there() {
    if ["mkfs.btrfs", "qemu-system-x86_64"].iter().any(|program| kiln_fixtures::require(program).is_none()) {
        return;
    }
    let Some(home) = Home::with_busybox() else { return };
    let made = home.ok(["init", "--disks", "btrfs", "--size", "1g"]);
    assert!(made.starts_with("disks: btrfs: copies share blocks in the pool"), "{made}");
    if home.add_kernel().is_none() {
        return;
    }
    let pool = BtrfsPool::of(&kiln_contract::Home::at(home.path())).unwrap();
    let taken = || {
        // What was written is counted when it is on the disk.
        rustix::fs::syncfs(std::fs::File::open(home.path().join("disks")).unwrap()).unwrap();
        pool.status().unwrap().taken
    };
    let sh = |name: &str, script: &str| home.ok(["exec", name, "sh", "-c", script]);
    home.ok(["run", "-d", "--vm", "--memory", "256m", "--name", "first", IMAGE, "sleep", "600"]);
    let empty = taken();
    sh("first", "dd if=/dev/urandom of=/large bs=1M count=64 2>/dev/null; echo one > /kept; sync");
    let full = taken();
    assert!(full > empty + 56 * MIB, "its disk is in the pool: {empty} {full}");

    // Four copies of 64 MiB, in the room of less than one.
    home.ok(["fork", "first", "live"]);
    home.ok(["fork", "--disk", "first", "still"]);
    home.ok(["start", "still"]);
    home.ok(["snapshot", "create", "first", "disk"]);
    home.ok(["snapshot", "create", "--memory", "first", "memory"]);
    let copied = taken();
    assert!(copied < full + 32 * MIB, "{full} {copied}");
    sh("first", "echo two > /kept; sync");
    let digest = sh("first", "md5sum /large");
    for name in ["live", "still"] {
        assert_eq!(sh(name, "cat /kept; md5sum /large"), format!("one\n{digest}"), "{name}");
    }
    for snapshot in ["memory", "disk"] {
        home.ok(["snapshot", "restore", "--force", "first", snapshot]);
        home.ok(["start", "first"]);
        assert_eq!(sh("first", "cat /kept; md5sum /large"), format!("one\n{digest}"), "{snapshot}");
    }
    home.ok(["resize", "first", "--disk", "20g"]);

    // Other disks are refused while there are machines, which lose nothing by that; the same are no change.
    let refused = home.kiln(["init", "--disks", "sparse"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    for words in
        ["cannot choose other disks", "first", "live", "still", "would lose theirs\nhint: remove these"]
    {
        assert!(refused.stderr.contains(words), "{words}: {refused:?}");
    }
    assert_eq!(home.ok(["init", "--disks", "btrfs"]), made);
    home.ok(["restart", "-t", "0", "first"]);
    assert_eq!(sh("first", "cat /kept"), "one");

    // What is removed gives back its room, and then there may be others.
    home.ok(["rm", "-f", "first", "live", "still"]);
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while taken() > empty + 16 * MIB {
        assert!(std::time::Instant::now() < end, "the room of what was removed: {empty} {}", taken());
        std::thread::sleep(Duration::from_millis(200));
    }
    home.ok(["template", "prune"]);
    home.ok(["system", "prune", "--force"]);
    pool.remove().unwrap();
    assert_eq!(mounts(&home.path()), 0);
    assert!(home.ok(["init", "--disks", "sparse"]).starts_with("disks: sparse: "));
    let run = home.command(["run", "--vm", "--rm", "--memory", "256m", IMAGE, "echo", "here"]);
    let ended = finish_within(run, Duration::from_secs(240));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "here\n"), "{ended:?}");
}
