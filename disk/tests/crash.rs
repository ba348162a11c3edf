//! Processes that are killed while they work on disks.
#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use common::{Bed, Place, disk, has_scribble, in_places, scribble, snapshot};
use kiln_contract::Home;
use kiln_disk::{Choice, open};

const GIB: u64 = 1 << 30;
const MIB: usize = 1 << 20;
/// Where the original has data, and how much.
const AT: u64 = 100 << 20;
const LENGTH: usize = 6 * MIB;

/// Not a test of its own: what the test below runs in a process that it kills. Goes on until then.
#[test]
fn work_on_disks_for_another_process() {
    let Ok(home) = std::env::var("KILN_TEST_HOME") else { return };
    let disks = open(&Home::at(home), &Choice::Auto).unwrap().backend;
    let (web, new, fork) = (disk("web"), disk("new"), disk("fork"));
    let passing = snapshot("passing");
    loop {
        // Past the runner's capture, for the test that listens.
        std::io::stdout().write_all(b"round\n").unwrap();
        disks.create(&new, GIB).unwrap();
        disks.clone_disk(&web, None, &fork).unwrap();
        disks.snapshot(&fork, &passing).unwrap();
        disks.restore(&fork, &passing).unwrap();
        disks.resize(&fork, 2 * GIB).unwrap();
        disks.restore(&web, &snapshot("before")).unwrap();
        disks.delete_snapshot(&fork, &passing).unwrap();
        disks.remove(&fork).unwrap();
        disks.remove(&new).unwrap();
    }
}

/// Starts such a process and waits until it begins its first round.
fn worker(home: &Home) -> (Child, impl Iterator<Item = Instant>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "work_on_disks_for_another_process"])
        .env("KILN_TEST_HOME", home.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut rounds = lines.filter(|line| line.ends_with("round")).map(|_| Instant::now());
    rounds.next().expect("it begins");
    (child, rounds)
}

#[test]
fn killed_at_any_instant_they_leave_whole_disks_or_none() {
    const KILLS: u32 = 16;
    in_places(&[Place::Ext4, Place::Xfs, Place::Btrfs], |bed| {
        let web = disk("web");
        let path = bed.disks.create(&web, GIB).unwrap();
        scribble(&path, AT, LENGTH, 1);
        bed.disks.snapshot(&web, &snapshot("before")).unwrap();
        // How long a round takes, so that the instants fall into it.
        let (mut child, mut rounds) = worker(&bed.home);
        let begun = rounds.next().unwrap();
        let round = rounds.next().unwrap() - begun;
        child.kill().unwrap();
        child.wait().unwrap();
        let mut seen = BTreeSet::from([examine(bed)]);
        for attempt in 0..KILLS {
            let (mut child, _rounds) = worker(&bed.home);
            // Spread over the whole time, in an order that has no pattern.
            std::thread::sleep(round * (attempt * 7 % KILLS) / KILLS);
            child.kill().unwrap();
            assert!(!child.wait().unwrap().success(), "it failed before it was killed");
            seen.insert(examine(bed));
        }
        assert!(seen.len() > 2, "all were killed at the same point: {seen:?}");
    });
}

/// All that there is must be whole, and nothing else be left. Returns what there was.
fn examine(bed: &Bed) -> Vec<String> {
    let disks = open(&bed.home, &Choice::Auto).unwrap().backend;
    assert_eq!(
        std::fs::read_dir(bed.home.disks().join(".tmp")).unwrap().count(),
        0,
        "leavings were not swept"
    );
    let mut seen = Vec::new();
    for id in disks.list().unwrap() {
        let path = disks.path(&id).unwrap();
        let size = disks.size(&id).unwrap();
        let copied = id != disk("new");
        assert!(size == GIB || (id == disk("fork") && size == 2 * GIB), "{id} has {size} bytes");
        assert_eq!(has_scribble(&path, AT, LENGTH, 1), copied, "{id}");
        // The file system that all begin with.
        let mut magic = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(
            &std::fs::File::open(&path).unwrap(),
            &mut magic,
            1024 + 56,
        )
        .unwrap();
        assert_eq!(magic, [0x53, 0xef], "{id}");
        for saved in disks.snapshots(&id).unwrap() {
            assert_eq!(saved.size, GIB, "{id} {}", saved.name);
            seen.push(format!("{id}@{}", saved.name));
        }
        seen.push(id.to_string());
    }
    assert!(seen.contains(&"web".to_owned()) && seen.contains(&"web@before".to_owned()), "{seen:?}");
    for name in ["new", "fork"] {
        disks.remove(&disk(name)).unwrap();
    }
    assert_eq!(bed.leavings(), ["web"]);
    seen
}

#[test]
fn a_copy_by_a_living_process_is_not_swept_by_another() {
    in_places(&[Place::Ext4, Place::Xfs], |bed| {
        let web = disk("web");
        let path = bed.disks.create(&web, GIB).unwrap();
        scribble(&path, AT, LENGTH, 1);
        bed.disks.snapshot(&web, &snapshot("before")).unwrap();
        let (mut child, mut rounds) = worker(&bed.home);
        for copies in 0..20 {
            // Each opening sweeps.
            let disks = open(&bed.home, &Choice::Auto).unwrap().backend;
            let id = disk(&format!("copy{copies}"));
            let copy = disks.clone_disk(&web, None, &id).unwrap();
            assert!(has_scribble(&copy, AT, LENGTH, 1));
            disks.remove(&id).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "the other process failed");
        }
        assert!(rounds.next().is_some(), "the other process failed");
        child.kill().unwrap();
        child.wait().unwrap();
    });
}
