//! Machines on bad days: ends that nobody wished for, at moments when nobody wished for them.
//!
//! All tests share one home, so that its template is made once; each has machines of its own.

#[path = "../common/mod.rs"]
mod common;
mod kernels;
mod killed;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use common::{Home, IMAGE, finish, finish_within, until};
use rustix::process::{Pid, Signal, kill_process};

static HOME: LazyLock<Option<Home>> = LazyLock::new(|| {
    let home = Home::with_kernel()?.until_the_end();
    // The template of machines that have a disk is made at the second start of one.
    home.ok(["create", "--vm", "--memory", "256m", "--name", "warm", IMAGE, "true"]);
    for _ in 0..2 {
        let ended = finish_within(home.command(["start", "--attach", "warm"]), Duration::from_secs(240));
        assert_eq!(ended.code, 0, "{ended:?}");
    }
    home.ok(["rm", "warm"]);
    // Debian's kernel without its modules has neither disks nor a link. What was installed last is the default.
    let debian = names(&home, "kernels").into_iter().find(|name| name.starts_with('6')).unwrap();
    let image = home.path().join("kernels").join(&debian).join("kernel");
    home.ok(["kernel", "install", "--from", image.to_str().unwrap(), "--name", "bare"]);
    home.ok(["kernel", "default", &debian]);
    Some(home)
});

/// Words that run a command in a machine of the shared shape.
fn run<'a>(flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--vm", "--memory", "256m"][..], flags, &[IMAGE], command].concat()
}

/// A machine that only waits, and does not end when it is asked to; its id.
fn deaf(home: &Home, name: &str) -> String {
    home.ok(run(&["-d", "--name", name], &["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]))
}

/// What `inspect` says.
fn inspect(home: &Home, name: &str) -> serde_json::Value {
    home.json(["inspect", name])[0].clone()
}

/// The processes that run an instance: supervisor, monitor and hypervisor, as far as they are there.
fn processes(home: &Home, id: &str) -> Vec<(&'static str, i32)> {
    let directory = home.path().join("instances").join(id);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = words.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let of_kiln =
            |verb: &str| words.get(1).is_some_and(|word| word == verb) && words.iter().any(|word| word == id);
        if of_kiln("supervise") {
            found.push(("supervisor", pid));
        } else if of_kiln("monitor") {
            found.push(("monitor", pid));
        } else if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == directory)
            && words.first().is_some_and(|word| word.contains("qemu"))
        {
            found.push(("hypervisor", pid));
        }
    }
    found
}

fn kill(home: &Home, id: &str, which: &str) -> bool {
    let found = processes(home, id).into_iter().find(|(what, _)| *what == which);
    found.is_some_and(|(_, pid)| kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).is_ok())
}

/// Waits until nothing of an instance runs and `ps` knows.
fn gone(home: &Home, id: &str) {
    until("nothing of it runs", || processes(home, id).is_empty());
    until("it is known to have ended", || {
        let status = inspect(home, id)["status"].as_str().unwrap().to_owned();
        assert!(status == "exited" || status == "created" || status == "running", "{status}");
        status != "running"
    });
}

#[test]
fn what_was_written_survives_a_stop_a_kill_and_the_end_of_a_grace_period() {
    let Some(home) = &*HOME else { return };
    deaf(home, "writer");
    let ways: [&[&str]; 4] = [
        &["kill", "writer"],
        &["stop", "-t", "0", "writer"],
        &["stop", "-t", "1", "writer"],
        &["pause", "writer"],
    ];
    for (number, way) in ways.iter().enumerate() {
        let script =
            format!("echo {number} >> /words; dd if=/dev/zero of=/large{number} bs=64k count=16 2>/dev/null");
        home.ok(["exec", "writer", "sh", "-c", &script]);
        home.ok(*way);
        if way[0] == "pause" {
            home.ok(["kill", "writer"]);
        }
        home.ok(["wait", "writer"]);
        let exit = inspect(home, "writer")["exit"].clone();
        assert_eq!((exit["code"].as_u64(), exit["error"].is_null()), (Some(137), true), "{way:?}: {exit}");
        home.ok(["start", "writer"]);
        let script = format!("tail -n1 /words; wc -c < /large{number}");
        assert_eq!(home.ok(["exec", "writer", "sh", "-c", &script]), format!("{number}\n1048576"), "{way:?}");
    }
    home.ok(["rm", "-f", "writer"]);
}

#[test]
fn a_machine_whose_kernel_panics_has_ended_and_says_why() {
    let Some(home) = &*HOME else { return };
    let id = deaf(home, "panics");
    // Its last answer may or may not come.
    home.kiln(["exec", "panics", "sh", "-c", "echo c > /proc/sysrq-trigger"]);
    gone(home, &id);
    let exit = inspect(home, "panics")["exit"].clone();
    let error = exit["error"].as_str().unwrap_or_default();
    assert!(error.starts_with("the machine's kernel panicked: sysrq triggered crash"), "{exit}");
    assert!(error.contains("its console's last lines:\n"), "{exit}");
    assert_eq!(exit["code"], 125, "{exit}");
    let shown = home.kiln(run(&["--rm"], &["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"]));
    assert!(shown.code == 125 && shown.stderr.contains("sysrq triggered crash"), "{shown:?}");
    home.ok(["start", "panics"]);
    home.ok(["exec", "panics", "true"]);
    home.ok(["rm", "-f", "panics"]);
}

#[test]
fn whoever_of_a_machine_is_killed_while_it_starts_or_runs_nothing_is_left_and_it_starts_again() {
    let Some(home) = &*HOME else { return };
    let id = deaf(home, "victim");
    for which in ["supervisor", "monitor", "hypervisor"] {
        // While it runs.
        assert!(kill(home, &id, which), "{which}");
        gone(home, &id);
        // At moments of its start, until it gets through.
        for patience in [0, 30, 80, 200, 500] {
            let start = home.command(["start", "victim"]).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(patience));
            kill(home, &id, which);
            let output = start.wait_with_output().unwrap();
            // Killed in time or not at all: what is told is so.
            if processes(home, &id).len() == 3 && output.status.success() {
                continue;
            }
            gone(home, &id);
        }
        // The last one may be running, or about to end.
        home.kiln(["kill", "victim"]);
        gone(home, &id);
        home.ok(["start", "victim"]);
        assert_eq!(home.ok(["exec", "victim", "echo", which]), which);
        assert_eq!(processes(home, &id).len(), 3, "{which}: {:?}", processes(home, &id));
    }
    home.ok(["rm", "-f", "victim"]);
    assert!(processes(home, &id).is_empty());
    assert!(!home.path().join("instances").join(&id).exists());
}

/// Names in a directory of the home.
fn names(home: &Home, directory: &str) -> Vec<String> {
    let entries = fs::read_dir(home.path().join(directory)).unwrap();
    let mut names: Vec<_> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_fork_that_is_killed_at_any_moment_leaves_the_original_running_and_can_be_removed() {
    let home = match &*HOME {
        Some(home) => home,
        None => return,
    };
    let id = deaf(home, "original");
    for patience in [0, 20, 50, 100, 200, 400] {
        let mut fork = home.command(["fork", "original", "copy"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(patience));
        let _ = fork.kill();
        fork.wait().unwrap();
        assert_eq!(home.ok(["exec", "original", "echo", "here"]), "here", "after {patience} ms");
        home.kiln(["rm", "-f", "copy"]);
        assert_eq!(home.kiln(["inspect", "copy"]).code, 1, "after {patience} ms");
    }
    home.ok(["fork", "original", "copy"]);
    assert_eq!(home.ok(["exec", "copy", "echo", "there"]), "there");
    let copy = inspect(home, "copy")["id"].as_str().unwrap().to_owned();
    home.ok(["rm", "-f", "copy", "original"]);
    for directory in ["instances", "disks"] {
        let left = names(home, directory);
        assert!(!left.iter().any(|name| name.contains(&copy) || name.contains(&id)), "{directory}: {left:?}");
    }
}

#[test]
fn starts_and_stops_at_once_agree_on_one_machine() {
    let Some(home) = &*HOME else { return };
    let id =
        home.ok([&["create", "--vm", "--memory", "256m", "--name", "twice", IMAGE][..], &["sleep", "600"]]
            .concat());
    let starts: Vec<_> =
        (0..3).map(|_| home.command(["start", "twice"]).stdout(Stdio::null()).spawn().unwrap()).collect();
    let outputs: Vec<_> = starts.into_iter().map(|start| start.wait_with_output().unwrap()).collect();
    assert!(outputs.iter().all(|output| output.status.success()), "{outputs:?}");
    assert_eq!(processes(home, &id).len(), 3);
    home.ok(["stop", "-t", "1", "twice"]);
    gone(home, &id);
    for patience in [0, 50, 150, 300] {
        let start =
            home.command(["start", "twice"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(patience));
        // Too early, it has nothing to do; otherwise it waits for the start, and undoes it.
        home.ok(["stop", "-t", "1", "twice"]);
        start.wait_with_output().unwrap();
        home.ok(["stop", "-t", "1", "twice"]);
        gone(home, &id);
    }
    home.ok(["rm", "twice"]);
}

#[test]
fn the_clock_is_right_after_a_pause() {
    let Some(home) = &*HOME else { return };
    deaf(home, "clock");
    home.ok(["pause", "clock"]);
    std::thread::sleep(Duration::from_secs(4));
    home.ok(["resume", "clock"]);
    let shown = home.ok(["exec", "clock", "date", "+%s"]).parse::<i64>().unwrap();
    let off = jiff::Timestamp::now().as_second() - shown;
    // It was asked at some time within the command's own.
    assert!((0..3).contains(&off), "it is {off} s late");
    home.ok(["rm", "-f", "clock"]);
}

#[test]
fn a_host_without_a_hypervisor_is_told_which_package_has_it() {
    let Some(home) = &*HOME else { return };
    let empty = home.beside("no-programs");
    fs::create_dir_all(&empty).unwrap();
    let mut command = home.command(run(&["--rm"], &["true"]));
    command.env("PATH", &empty);
    let ended = finish(command);
    assert!(ended.code == 125 && ended.stderr.contains("qemu-system-x86"), "{ended:?}");
    assert!(ended.stderr.contains("apt") || ended.stderr.contains("install"), "{ended:?}");
}

#[test]
fn a_guest_that_never_gets_ready_is_told_with_its_last_words() {
    let Some(home) = &*HOME else { return };
    let run = home.command(run(&["--rm", "--kernel", "bare"], &["true"]));
    let ended = finish_within(run, Duration::from_secs(240));
    assert_eq!(ended.code, 125, "{ended:?}");
    assert!(ended.stderr.contains("the guest ended before it was ready"), "{ended:?}");
    assert!(
        ended.stderr.contains("its console's last lines:") && ended.stderr.contains("kiln: "),
        "{ended:?}"
    );
    let left =
        names(home, "templates").into_iter().filter(|name| name.starts_with(".new")).collect::<Vec<_>>();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_machine_boots_the_kernel_that_it_was_given_and_keeps_its_disk_if_that_is_none() {
    let Some(home) = &*HOME else { return };
    deaf(home, "changed");
    home.ok(["exec", "changed", "sh", "-c", "echo kept > /kept; sync"]);
    home.ok(["stop", "-t", "0", "changed"]);
    home.ok(["update", "--kernel", "bare", "changed"]);
    assert_eq!(inspect(home, "changed")["spec"]["machine"]["kernel"], "bare");
    let ended = finish_within(home.command(["start", "changed"]), Duration::from_secs(240));
    assert!(ended.code == 1 && ended.stderr.contains("the guest ended before it was ready"), "{ended:?}");
    let default = home.ok(["kernel", "default"]);
    home.ok(["update", "--kernel", &default, "changed"]);
    home.ok(["start", "changed"]);
    let said = home.ok(["exec", "changed", "sh", "-c", "cat /kept; uname -r"]);
    assert_eq!(said, format!("kept\n{default}"));
    home.ok(["rm", "-f", "changed"]);
}

#[test]
fn a_guest_that_ends_while_it_is_told_who_it_is_is_told_with_its_last_words() {
    let Some(home) = &*HOME else { return };
    // Memory that it may not use is taken from it before anything else: its agent is the largest there is to end.
    let starve = ["--rm", "--name", "starved", "--sysctl", "vm.min_free_kbytes=260000"];
    let ended = home.kiln(run(&starve, &["true"]));
    assert_eq!(ended.code, 125, "{ended:?}");
    assert!(ended.stderr.contains("ended") || ended.stderr.contains("panicked"), "{ended:?}");
    assert!(ended.stderr.contains("its console's last lines:"), "{ended:?}");
    assert_eq!(home.kiln(["inspect", "starved"]).code, 1, "it was for one run");
}

#[test]
fn a_damaged_template_is_made_again() {
    let Some(home) = Home::with_kernel() else { return };
    let templates = || -> Vec<_> {
        let entries = fs::read_dir(home.path().join("templates")).unwrap().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.join("template.json").exists()).collect()
    };
    let half = |path: &Path| {
        let length = path.metadata().unwrap().len();
        fs::File::options().write(true).open(path).unwrap().set_len(length / 2).unwrap();
    };
    let nonsense = |path: &Path| {
        let length = usize::try_from(path.metadata().unwrap().len()).unwrap();
        fs::write(path, vec![0x5a; length]).unwrap();
    };
    type Damage<'a> = (&'a str, &'a str, &'a dyn Fn(&Path));
    let bit = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        fs::write(path, bytes).unwrap();
    };
    let damages: [Damage<'_>; 5] = [
        ("a bit of the state", "state", &bit),
        ("half a memory", "memory", &half),
        ("half a state", "state", &half),
        ("a state of nonsense", "state", &nonsense),
        ("half a record", "template.json", &half),
    ];
    for (what, file, damage) in damages {
        for template in templates() {
            damage(&template.join(file));
        }
        let ended = finish_within(home.command(run(&["--rm"], &["echo", "runs"])), Duration::from_secs(240));
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "runs\n"), "{what}: {ended:?}");
    }
}

#[test]
fn a_full_disk_fails_a_fork_and_nothing_else() {
    let Some(home) = Home::with_kernel_in_memory("900m") else { return };
    let id = deaf(&home, "full");
    home.ok(["exec", "full", "sh", "-c", "dd if=/dev/urandom of=/dev/shm/memory bs=1M count=48 2>/dev/null"]);
    let filler = home.path().join("filler");
    let filled = Command::new("dd")
        .args(["if=/dev/zero", "bs=1M", "count=2000", &format!("of={}", filler.display())])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!filled.success(), "the disk is full");
    // Room for a record, and not for memory.
    let length = filler.metadata().unwrap().len();
    fs::File::options().write(true).open(&filler).unwrap().set_len(length - (16 << 20)).unwrap();
    let before = names(&home, "instances");
    let ended = home.kiln(["snapshot", "create", "full", "moment", "--memory"]);
    assert!(ended.code == 1 && ended.stderr.contains("No space left"), "{ended:?}");
    assert!(!home.ok(["snapshot", "ls", "full"]).contains("moment"), "no half of it is listed");
    let ended = home.kiln(["fork", "full", "copy"]);
    assert!(ended.code == 1 && ended.stderr.contains("No space left"), "{ended:?}");
    assert_eq!(names(&home, "instances"), before);
    assert_eq!(home.ok(["exec", "full", "echo", "here"]), "here");
    fs::remove_file(&filler).unwrap();
    home.ok(["fork", "full", "copy"]);
    assert_eq!(home.ok(["exec", "copy", "echo", "there"]), "there");
    home.ok(["rm", "-f", "full", "copy"]);
    assert!(processes(&home, &id).is_empty());
}

#[test]
fn a_template_of_another_hypervisor_is_not_used_and_the_rest_goes_on() {
    let Some(home) = Home::with_kernel() else { return };
    let real = kiln_fixtures::require("qemu-system-x86_64").unwrap();
    let before = names(&home, "templates").len();
    // Another program under the same name, as after an upgrade.
    let directory = home.beside("upgraded");
    fs::create_dir_all(&directory).unwrap();
    let program = directory.join("qemu-system-x86_64");
    common::write(&program, &format!("#!/bin/sh\nexec {} \"$@\"\n", real.display()));
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap());
    let mut command = home.command(run(&["--rm"], &["echo", "runs"]));
    command.env("PATH", path);
    let ended = finish_within(command, Duration::from_secs(240));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "runs\n"), "{ended:?}");
    assert!(names(&home, "templates").len() > before, "it has templates of its own");
    assert_eq!(home.ok(run(&["--rm"], &["echo", "still"])), "still");
}

#[test]
fn a_monitor_that_is_killed_while_its_machine_is_forked_leaves_no_half_fork() {
    let Some(home) = &*HOME else { return };
    let id = deaf(home, "parent");
    for patience in [0, 20, 60, 150, 400] {
        let fork = home.command(["fork", "parent", "child"]).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(patience));
        assert!(kill(home, &id, "monitor"), "after {patience} ms");
        let forked = fork.wait_with_output().unwrap();
        gone(home, &id);
        // It was made before that, and is whole; or of the disk alone, if the parent had ended already; or there is none.
        if forked.status.success() {
            if home.json(["inspect", "child"])[0]["status"] != "running" {
                home.ok(["start", "child"]);
            }
            assert_eq!(home.ok(["exec", "child", "echo", "whole"]), "whole", "after {patience} ms");
            home.ok(["rm", "-f", "child"]);
        }
        assert_eq!(home.kiln(["inspect", "child"]).code, 1, "after {patience} ms: {forked:?}");
        home.ok(["start", "parent"]);
        assert_eq!(home.ok(["exec", "parent", "echo", "again"]), "again");
    }
    home.ok(["rm", "-f", "parent"]);
}

#[test]
fn thirty_forks_at_once_are_thirty_machines() {
    let Some(home) = &*HOME else { return };
    deaf(home, "tree");
    let names: Vec<_> = (0..30).map(|number| format!("leaf{number}")).collect();
    let forks: Vec<_> = names
        .iter()
        .map(|name| {
            home.command(["fork", "tree", name]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (name, fork) in names.iter().zip(forks) {
        let ended = fork.wait_with_output().unwrap();
        assert!(ended.status.success(), "{name}: {ended:?}");
    }
    let patience = Duration::from_secs(240);
    let mut hosts: Vec<_> = names
        .iter()
        .map(|name| {
            let ended = finish_within(home.command(["exec", name, "hostname"]), patience);
            assert_eq!(ended.code, 0, "{name}: {ended:?}");
            ended.stdout
        })
        .collect();
    hosts.sort();
    hosts.dedup();
    assert_eq!(hosts.len(), names.len());
    let all = names.iter().map(String::as_str).chain(["tree"]);
    let ended = finish_within(home.command(["rm", "-f"].into_iter().chain(all)), patience);
    assert_eq!(ended.code, 0, "{ended:?}");
}
