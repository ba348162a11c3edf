//! The machine that is kept ready for the next start: that it is taken, that nobody can tell, and that nothing is left of it.
//!
//! Each test has a home of its own, since a home has few such machines. With KVM there are none.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Ended, Home, IMAGE, finish};
use rustix::process::{Pid, Signal, kill_process};

/// A home with a template, where machines are kept ready.
fn home() -> Option<Home> {
    if matches!(kiln_vmm::Accelerator::choose(), kiln_vmm::Accelerator::Kvm) {
        kiln_fixtures::skip("with KVM no machine is kept ready");
        return None;
    }
    Home::with_kernel()
}

/// How long something may take that everything else on the host goes before, in a busy one.
const PATIENCE: Duration = Duration::from_secs(150);

/// Waits until something is so.
#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Words that run a command in a machine of the shape that the template has.
fn run<'a>(flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--vm", "--memory", "256m"][..], flags, &[IMAGE], command].concat()
}

/// The same command, with machines kept ready for `seconds`.
fn keeping(home: &Home, seconds: &str, words: &[&str]) -> Ended {
    let mut command = home.command(words);
    command.env("KILN_SPARE", seconds);
    finish(command)
}

#[track_caller]
fn kept(home: &Home, words: &[&str]) -> String {
    let ended = keeping(home, "on", words);
    assert_eq!(ended.code, 0, "{words:?}: {ended:?}");
    ended.stdout.trim_end().to_owned()
}

/// What the list says of the spare machines there are.
fn states(home: &Home) -> Vec<String> {
    let list = home.json(["template", "ls", "--format", "json"]);
    let list = list.as_array().unwrap().iter();
    list.filter_map(|row| row["spare"].as_str().map(str::to_owned)).collect()
}

/// Starts a machine, and waits until the next is ready.
#[track_caller]
fn make_ready(home: &Home) {
    kept(home, &run(&["--rm"], &["true"]));
    until("a machine is ready", || states(home) == ["ready"]);
}

/// The processes of this home whose first words are these.
fn processes(home: &Home, program: &str, verb: &str) -> BTreeSet<i32> {
    let home = home.path();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let (words, environment) = (read("cmdline"), read("environ"));
        let words: Vec<_> = words.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let is_ours = environment.split(|byte| *byte == 0).any(|variable| {
            variable
                .strip_prefix(b"KILN_HOME=")
                .is_some_and(|value| value == home.as_os_str().as_encoded_bytes())
        });
        if is_ours && words[0].contains(program) && words.get(1).is_some_and(|word| word.starts_with(verb)) {
            found.insert(pid);
        }
    }
    found
}

fn hypervisors(home: &Home) -> BTreeSet<i32> {
    processes(home, "qemu", "-")
}

fn keepers(home: &Home) -> BTreeSet<i32> {
    processes(home, "exe", "spare")
}

fn kill(pids: &BTreeSet<i32>) {
    assert!(!pids.is_empty());
    for pid in pids {
        kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL).unwrap();
    }
}

/// Nothing runs, and the disks are those of the templates.
#[track_caller]
fn nothing_is_left(home: &Home) {
    until("all has ended", || hypervisors(home).is_empty() && keepers(home).is_empty());
    let list = home.json(["template", "ls", "--format", "json"]);
    let own = |row: &&serde_json::Value| row["disk"] != "own";
    let templates = list.as_array().unwrap().iter().filter(own).count();
    until("only templates have disks", || names(&home.path().join("disks")).len() == templates);
}

/// What is in a directory, but for what begins with a dot.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with('.')).collect()
}

/// All that a workload can see of its machine, but for numbers of processes, times, what is drawn, and threads of the kernel that
/// come and go.
const LOOK: &str = "cd /; hostname; cat /proc/mounts; cat /proc/swaps; cat /proc/self/cgroup; \
    find /sys/fs/cgroup -type d | sort; find / -xdev ! -path '/proc*' | sort | xargs ls -ldn | cut -c1-40 | md5sum; \
    find / -xdev ! -path '/proc*' | sort | md5sum; \
    for p in /proc/[0-9]*; do cat $p/comm; done 2>/dev/null | sed 's/kworker.*/kworker/' | sort | uniq | grep -v -e kworker -e ext4lazyinit; \
    ip addr 2>/dev/null | grep -v inet6; cat /etc/hosts /etc/resolv.conf; df / | tail -1 | cut -c1-20; \
    ls -l /proc/1/fd | wc -l; cat /sys/fs/cgroup/cgroup.stat";

#[test]
fn the_next_start_takes_the_machine_that_waits_and_its_workload_sees_no_difference() {
    let Some(home) = home() else { return };
    let look = run(&["--rm", "-h", "box"], &["sh", "-c", LOOK]);
    let restored = home.kiln(look.iter());
    assert!(restored.code == 0 && restored.stdout.lines().count() > 30, "{restored:?}");
    make_ready(&home);
    let ready = hypervisors(&home);
    assert_eq!((ready.len(), keepers(&home).len()), (1, 1));
    let taken = keeping(&home, "on", &look);
    assert_eq!((taken.code, taken.stdout, taken.stderr), (restored.code, restored.stdout, restored.stderr));
    until("it has ended, and the next is ready", || {
        let now = hypervisors(&home);
        now.len() == 1 && now != ready && states(&home) == ["ready"]
    });

    // One that stays is the very process that waited, and has all that a machine has.
    let ready = hypervisors(&home);
    kept(&home, &run(&["-d", "--name", "dev"], &["sleep", "600"]));
    assert!(hypervisors(&home).is_superset(&ready));
    home.ok(["exec", "dev", "sh", "-c", "echo kept > /kept"]);
    home.ok(["pause", "dev"]);
    home.ok(["resume", "dev"]);
    home.ok(["resize", "dev", "--disk", "20G"]);
    home.ok(["exec", "dev", "sh", "-c", "echo here > /run/memory || echo here > /tmp/memory"]);
    home.ok(["fork", "dev", "fork"]);
    home.ok(["start", "fork"]);
    assert_eq!(
        home.ok(["exec", "fork", "sh", "-c", "cat /run/memory /tmp/memory 2>/dev/null; cat /kept"]),
        "here\nkept"
    );
    home.ok(["restart", "--time", "1", "dev"]);
    assert_eq!(home.ok(["exec", "dev", "cat", "/kept"]), "kept");
    home.ok(["rm", "--force", "dev", "fork"]);
    home.ok(["template", "prune"]);
    nothing_is_left(&home);
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[test]
fn machines_that_waited_are_others_and_have_the_right_time() {
    let Some(home) = home() else { return };
    let script = "hostname; cat /etc/hostname; head -c 16 /dev/urandom | od -An -tx1; date +%s";
    let mut seen = BTreeSet::new();
    for _ in 0..2 {
        make_ready(&home);
        let ready = hypervisors(&home);
        // Its clock stands at what it was told while it rehearsed, if nobody sets it.
        std::thread::sleep(Duration::from_secs(3));
        let before = now();
        let said = kept(&home, &run(&["-d"], &["sh", "-c", &format!("{script}; sleep 600")]));
        assert!(hypervisors(&home).is_superset(&ready), "{said}");
        until("it has spoken", || home.ok(["logs", &said]).lines().count() == 4);
        let logs = home.ok(["logs", &said]);
        let lines: Vec<_> = logs.lines().collect();
        assert_eq!(lines[0], &said[..12]);
        let time: u64 = lines[3].parse().unwrap();
        let after = now();
        assert!((before - 1..=after + 1).contains(&time), "{before} {time} {after}");
        for line in &lines[..3] {
            seen.insert((*line).to_owned());
        }
        home.ok(["rm", "--force", &said]);
    }
    // Two names, two draws; the image has no file for a name or it has the same name.
    assert!(seen.len() >= 4, "{seen:?}");
}

#[test]
fn of_two_starts_at_once_one_takes_it_and_the_other_restores() {
    let Some(home) = home() else { return };
    make_ready(&home);
    let ready = hypervisors(&home);
    let words = |name| run(&["-d", "--name", name], &["sleep", "600"]);
    std::thread::scope(|scope| {
        let both = ["one", "two"].map(|name| scope.spawn(|| kept(&home, &words(name))));
        for one in both {
            one.join().unwrap();
        }
    });
    assert!(hypervisors(&home).is_superset(&ready));
    for name in ["one", "two"] {
        assert_eq!(home.ok(["exec", name, "echo", "here"]), "here");
    }
    home.ok(["rm", "--force", "one", "two"]);
    home.ok(["template", "prune"]);
    nothing_is_left(&home);
}

#[test]
fn whatever_is_killed_nothing_is_left_and_the_next_start_works() {
    let Some(home) = home() else { return };
    for (what, waiting) in [("its keeper", keepers as fn(&Home) -> _), ("the hypervisor", hypervisors)] {
        make_ready(&home);
        kill(&waiting(&home));
        until(what, || hypervisors(&home).is_empty() && keepers(&home).is_empty());
        assert_eq!(states(&home), Vec::<String>::new(), "{what}");
        home.ok(run(&["--rm"], &["true"]));
    }
    for (what, verb) in
        [("keeper", "spare"), ("monitor", "monitor"), ("supervisor", "supervise"), ("hypervisor", "-")]
    {
        make_ready(&home);
        let ready = hypervisors(&home);
        // What would be made now would not be told from what is.
        home.ok(run(&["-d", "--name", what], &["true"]));
        home.ok(["rm", "--force", what]);
        assert_eq!(hypervisors(&home), ready, "with it turned off, it is not taken");
        kept(&home, &run(&["-d", "--name", what], &["sleep", "600"]));
        let program = if verb == "-" { "qemu" } else { "exe" };
        until("the next is ready", || states(&home) == ["ready"]);
        let killed: BTreeSet<_> = match what {
            "hypervisor" => ready.clone(),
            "keeper" => ready.iter().map(|pid| parent(*pid)).collect(),
            _ => processes(&home, program, verb),
        };
        kill(&killed);
        until(what, || hypervisors(&home).is_disjoint(&ready));
        until(what, || home.json(["inspect", what])[0]["status"] == "exited");
        home.ok(["start", what]);
        assert_eq!(home.ok(["exec", what, "echo", "here"]), "here");
        home.ok(["rm", "--force", what]);
    }
    home.ok(["template", "prune"]);
    nothing_is_left(&home);
}

/// The process that started this one.
fn parent(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
    line.trim().parse().unwrap()
}

#[test]
fn it_goes_unused_and_with_its_template_and_with_its_home() {
    let Some(home) = home() else { return };
    assert_eq!(keeping(&home, "2", &run(&["--rm"], &["true"])).code, 0);
    until("a machine is ready", || states(&home) == ["ready"]);
    until("nobody wanted it", || states(&home).is_empty());
    nothing_is_left(&home);

    make_ready(&home);
    let disks = names(&home.path().join("disks")).len();
    home.ok(["system", "prune", "--force"]);
    assert!(names(&home.path().join("disks")).len() < disks);
    nothing_is_left(&home);

    // Each start from another template needs its place.
    for memory in ["256m", "320m", "384m"] {
        for _ in 0..2 {
            kept(&home, &["run", "--vm", "--rm", "--memory", memory, IMAGE, "true"]);
        }
        until("a machine is ready", || states(&home).iter().all(|state| state == "ready"));
    }
    until("there are two", || states(&home).len() == 2 && hypervisors(&home).len() == 2);

    fs::remove_dir_all(home.path()).unwrap();
    until("all has ended", || hypervisors(&home).is_empty() && keepers(&home).is_empty());
    assert!(!home.path().exists(), "and nothing is made anew in it");
}
