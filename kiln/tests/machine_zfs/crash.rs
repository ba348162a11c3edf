//! Processes that are killed while they work on disks.
#![allow(clippy::print_stdout, reason = "whoever kills listens")]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::pool::{Bed, MIB, disk, snapshot};

const KILLS: u32 = 4;

/// What the test below runs in a process that it kills. Goes on until then.
pub(crate) fn work(bed: &Bed) -> ! {
    let (web, new, fork) = (disk("web"), disk("new"), disk("fork"));
    loop {
        println!("round");
        bed.disks.create(&new, 64 * MIB).unwrap();
        bed.disks.clone_disk(&web, None, &fork).unwrap();
        bed.disks.snapshot(&fork, &snapshot("passing")).unwrap();
        bed.disks.restore(&fork, &snapshot("passing")).unwrap();
        bed.disks.resize(&fork, 128 * MIB).unwrap();
        bed.disks.restore(&web, &snapshot("before")).unwrap();
        bed.disks.delete_snapshot(&fork, &snapshot("passing")).unwrap();
        bed.disks.remove(&fork).unwrap();
        bed.disks.remove(&new).unwrap();
    }
}

/// Starts such a process and waits until it begins its first round.
fn worker(bed: &Bed) -> (Child, impl Iterator<Item = Instant>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .env("KILN_TEST_WORK", &bed.dataset)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut rounds = lines.map(|_| Instant::now());
    rounds.next().expect("it begins");
    (child, rounds)
}

pub(crate) fn killed_at_any_instant(bed: &Bed) {
    let web = bed.with_disk("web", 1);
    bed.disks.snapshot(&web, &snapshot("before")).unwrap();
    let (mut child, mut rounds) = worker(bed);
    let begun = Instant::now();
    let round = rounds.next().unwrap() - begun;
    child.kill().unwrap();
    child.wait().unwrap();
    let mut seen = BTreeSet::from([examine(bed)]);
    for attempt in 0..KILLS {
        let (mut child, _rounds) = worker(bed);
        // Spread over the whole time, in an order that has no pattern.
        std::thread::sleep(round * (attempt * 7 % KILLS) / KILLS);
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "it failed before it was killed");
        seen.insert(examine(bed));
    }
    assert!(seen.len() > 1, "all were killed at the same point: {seen:?}");
    bed.disks.remove(&web).unwrap();
    bed.is_empty();
}

/// All that there is must be whole, and nothing else be left. Returns what there was.
fn examine(bed: &Bed) -> Vec<String> {
    let after = bed.again();
    assert_eq!(after.in_tmp(), 0, "leavings were not swept");
    let mut seen = Vec::new();
    for id in after.disks.list().unwrap() {
        let size = after.disks.size(&id).unwrap();
        let copied = id != disk("new");
        assert!(size == 64 * MIB || (id == disk("fork") && size == 128 * MIB), "{id} has {size} bytes");
        assert_eq!(after.has(&id, 8 * MIB, 1), copied, "{id}");
        for saved in after.disks.snapshots(&id).unwrap() {
            seen.push(format!("{id}@{}", saved.name));
        }
        seen.push(id.to_string());
    }
    assert!(seen.contains(&"web".to_owned()) && seen.contains(&"web@before".to_owned()), "{seen:?}");
    for name in ["new", "fork"] {
        after.disks.remove(&disk(name)).unwrap();
    }
    // The snapshot is where it was made, and the disk on it if there was a restore.
    let names = after.names();
    let volumes: Vec<&String> = names.iter().filter(|name| !name.contains('@')).collect();
    assert!(
        volumes.len() <= 2 && names.iter().filter(|name| name.contains('@')).count() == 1,
        "left: {names:?}"
    );
    seen
}
