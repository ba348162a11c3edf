//! Killed supervisors, killed commands, and hosts that were restarted.

use std::fs;
use std::thread;
use std::time::Duration;

use kiln_contract::{ErrorKind, InstanceStatus, RemoveOptions, RuntimeBackend, StartMode};

use crate::bed::{Bed, Test, kill, runs, wait_for_status, wait_until};

pub(crate) const TESTS: &[Test] = &[
    (
        "a killed supervisor takes its container along, and the next command tells the truth",
        killed_supervisor,
    ),
    (
        "a supervisor killed at any moment of a start leaves nothing that cannot be removed",
        killed_while_starting,
    ),
    ("a container of a command that is killed before it starts it is removed if it was to be", killed_maker),
    ("a killed foreground command takes its container along", killed_foreground),
    ("a container whose supervisor died waiting to restart it is exited", killed_while_restarting),
    ("after a restart of the host nothing of it is taken for alive", another_boot),
    ("what asks a killed supervisor is answered with the end of the container", killed_while_asked),
    ("a forced removal waits for a supervisor that is suspended, and for its end", suspended_supervisor),
];

const SLEEP: &[&str] = &["sh", "-c", "sleep 1000 & sleep 1000"];
const FORCE: RemoveOptions = RemoveOptions { force: true, volumes: true };

fn killed_supervisor() {
    let bed = Bed::new();
    for remove in [false, true] {
        let mut spec = bed.spec("victim", SLEEP);
        spec.remove = remove;
        let created = bed.run(&spec);
        let running = bed.look(&created);
        kill(running.supervisor.unwrap());
        let listed = bed.containers.list().unwrap();
        assert!(!runs(running.process.unwrap()), "it does not outlive its supervisor");
        if remove {
            assert!(listed.is_empty());
            assert_eq!(bed.traces(&running), [""; 0]);
            continue;
        }
        assert_eq!(listed[0].status, InstanceStatus::Exited);
        let exit = listed[0].exit.clone().unwrap();
        assert_eq!((exit.code, exit.error.as_deref()), (137, Some("its supervisor was killed")));
        // It can be started again, and removed.
        bed.containers.start(&created.id, StartMode::Detached).unwrap();
        kill(bed.look(&created).supervisor.unwrap());
        bed.containers.remove(&created.id, RemoveOptions::default()).unwrap();
        assert_eq!(bed.traces(&running), [""; 0]);
    }
}

fn killed_while_starting() {
    let bed = Bed::new();
    for step in 0..15 {
        let record = bed.containers.create(&bed.spec("victim", SLEEP)).unwrap();
        let mut command = bed.command(&["test-start", "victim"]).spawn().unwrap();
        // Dense where the making is, up to after it.
        thread::sleep(Duration::from_micros(step * step * 150));
        command.kill().unwrap();
        command.wait().unwrap();
        let found = bed.containers.find("victim").unwrap();
        assert!(
            matches!(found.status, InstanceStatus::Created | InstanceStatus::Exited)
                && found.supervisor.is_none(),
            "step {step}: {found:?}"
        );
        bed.containers.remove(&record.id, RemoveOptions::default()).unwrap();
        assert_eq!(bed.traces(&record), [""; 0], "step {step}");
    }
}

fn killed_maker() {
    let bed = Bed::new();
    for transient in [true, false] {
        let mut spec = bed.spec("victim", SLEEP);
        (spec.remove, spec.transient) = (true, transient);
        let mut command =
            bed.command(&["test-create", &serde_json::to_string(&spec).unwrap()]).spawn().unwrap();
        wait_until("it is made", || bed.containers.find("victim").is_ok());
        let made = bed.look(&bed.containers.find("victim").unwrap());
        assert_eq!(made.status, InstanceStatus::Created, "its maker lives");
        command.kill().unwrap();
        command.wait().unwrap();
        assert_eq!(bed.containers.list().unwrap().is_empty(), transient, "one that is only to be made stays");
        if transient {
            assert_eq!(bed.traces(&made), [""; 0]);
        }
    }
    // Once it was started its maker does not matter any more.
    bed.containers.remove(&bed.containers.find("victim").unwrap().id, FORCE).unwrap();
    let mut spec = bed.spec("victim", SLEEP);
    (spec.remove, spec.transient) = (true, true);
    let record = bed.run(&spec);
    assert_eq!(bed.look(&record).maker, None);
}

fn killed_foreground() {
    let bed = Bed::new();
    for remove in [false, true] {
        let mut spec = bed.spec("victim", SLEEP);
        spec.remove = remove;
        let created = bed.containers.create(&spec).unwrap();
        let mut command = bed.command(&["test-start", "victim"]).spawn().unwrap();
        wait_for_status(&bed, &created, InstanceStatus::Running);
        let running = bed.look(&created);
        assert_eq!(running.supervisor.unwrap().pid, command.id());
        command.kill().unwrap();
        command.wait().unwrap();
        if remove {
            assert_eq!(bed.containers.find("victim").unwrap_err().kind(), ErrorKind::NotFound);
        } else {
            assert_eq!(bed.containers.find("victim").unwrap().status, InstanceStatus::Exited);
            bed.containers.remove(&created.id, RemoveOptions::default()).unwrap();
        }
        assert_eq!(bed.traces(&running), [""; 0]);
    }
}

fn killed_while_restarting() {
    let bed = Bed::new();
    let mut spec = bed.spec("again", &["sh", "-c", "exit 3"]);
    spec.restart = "always".parse().unwrap();
    let record = bed.run(&spec);
    // The third wait is long enough to be met.
    wait_until("it has restarted twice", || bed.look(&record).restarts >= 2);
    wait_for_status(&bed, &record, InstanceStatus::Restarting);
    kill(bed.look(&record).supervisor.unwrap());
    let found = bed.look(&record);
    assert_eq!((found.status, found.exit.unwrap().code), (InstanceStatus::Exited, 3));
}

fn another_boot() {
    let bed = Bed::new();
    let created = bed.run(&bed.spec("old", SLEEP));
    let running = bed.look(&created);
    kill(running.supervisor.unwrap());
    // As if the host had been restarted, and the numbers now belonged to others: to this very test.
    let path = bed.home.instance(&created.id).record();
    let me = std::process::id();
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let start: u64 = stat[stat.rfind(')').unwrap() + 2..].split(' ').nth(19).unwrap().parse().unwrap();
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["boot"] = "00000000-0000-0000-0000-000000000000".into();
    for field in ["process", "supervisor"] {
        record[field]["pid"] = me.into();
        record[field]["start"] = start.into();
    }
    fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    let found = bed.look(&created);
    assert_eq!(found.status, InstanceStatus::Exited);
    assert_eq!((found.process, found.supervisor, found.boot), (None, None, None));
    assert_eq!(found.exit.unwrap().code, 255);
    // What the first kill left is known no more after another boot, but a cgroup of this one is there.
    bed.containers.start(&created.id, StartMode::Detached).unwrap();
    bed.containers.stop(&created.id, Some(Duration::ZERO)).unwrap();
}

fn killed_while_asked() {
    let bed = Bed::new();
    let record = bed.run(&bed.spec("victim", SLEEP));
    let supervisor = bed.look(&record).supervisor.unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| bed.containers.wait(&record.id).unwrap());
        let stopping = scope.spawn(|| bed.containers.stop(&record.id, Some(Duration::from_secs(1000))));
        thread::sleep(Duration::from_millis(50));
        kill(supervisor);
        assert_eq!(waiting.join().unwrap().code, 137);
        stopping.join().unwrap().unwrap();
    });
}

fn suspended_supervisor() {
    let bed = Bed::new();
    let record = bed.run(&bed.spec("victim", SLEEP));
    let running = bed.look(&record);
    let pid = rustix::process::Pid::from_raw(running.supervisor.unwrap().pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    thread::scope(|scope| {
        let removing = scope.spawn(|| bed.containers.remove(&record.id, FORCE));
        thread::sleep(Duration::from_millis(200));
        assert!(!removing.is_finished(), "it is given time");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        removing.join().unwrap().unwrap();
    });
    assert_eq!(bed.traces(&running), [""; 0]);
}
