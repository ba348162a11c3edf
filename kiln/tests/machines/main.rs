//! Machines from their making to their end: real kernels under QEMU (with TCG where there is no KVM).
//!
//! All tests share one home, so that its one template is made once; each has machines of its own.

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod identity;
mod reboot;
mod verbs;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::process::Stdio;
use std::sync::LazyLock;

use common::{Home, IMAGE, fed, finish, until};

static HOME: LazyLock<Option<Home>> = LazyLock::new(|| Home::with_kernel().map(Home::until_the_end));

/// The name of the image that [`whole_image`] makes.
const WHOLE: &str = "localhost/whole:1";

/// An image with what a distribution's has: a machine id of its own to come, and places of container engines.
fn whole_image(home: &Home) {
    static MADE: std::sync::Once = std::sync::Once::new();
    MADE.call_once(|| {
        let script =
            "mkdir -p /etc /var/lib/docker /var/lib/containerd; : > /etc/machine-id; : > /etc/hostname";
        home.ok(["run", "--name", "whole", "--network", "none", IMAGE, "sh", "-c", script]);
        home.ok(["commit", "whole", WHOLE]);
        home.ok(["rm", "whole"]);
    });
}

/// Words that run a command in a machine of the shared shape.
fn run<'a>(flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--vm", "--memory", "256m"][..], flags, &[IMAGE], command].concat()
}

/// A machine in the background that waits.
fn sleeper(home: &Home, name: &str) -> String {
    home.ok(run(&["-d", "--name", name], &["sleep", "600"]))
}

#[test]
fn exit_codes_and_streams_are_the_commands_own() {
    let Some(home) = &*HOME else { return };
    let table: [(&[&str], i32); 5] = [
        (&["true"], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["/no/such/program"], 127),
        (&["/etc/passwd"], 126),
        (&["sh", "-c", "kill -9 $$"], 137),
    ];
    for (command, code) in table {
        let ended = home.kiln(run(&["--rm"], command));
        assert_eq!(ended.code, code, "{command:?}: {ended:?}");
    }
    sleeper(home, "refuses");
    let script =
        "printf '#!/no/such\\n' > /lost; echo true > /plain; chmod 755 /lost /plain; mkdir -m 700 /mine";
    home.ok(["exec", "refuses", "sh", "-c", script]);
    let mine: &[&str] = &["-u", "1000", "-w", "/mine"];
    let table: [(&[&str], &str, i32, &str); 6] = [
        (&[], "/lost", 126, "cannot run `/lost`: the interpreter that it names is not in the machine"),
        (&[], "/plain", 126, "cannot run `/plain`: it is neither a program"),
        (&[], "/etc", 126, "cannot run `/etc`: it is a directory"),
        (&[], "lost", 127, "cannot run `lost`: no such command in the machine"),
        (mine, "true", 125, "cannot enter the working directory /mine: Permission denied"),
        (
            &["-w", "/none"],
            "true",
            125,
            "cannot enter the working directory /none: No such file or directory",
        ),
    ];
    for (flags, command, code, says) in table {
        let ended = home.kiln([&["exec"], flags, &["refuses", command]].concat());
        assert_eq!(ended.code, code, "{command:?}: {ended:?}");
        assert!(ended.stderr.contains(says), "{command:?}: {ended:?}");
    }
    home.ok(["rm", "--force", "refuses"]);
    let words = run(
        &["-i", "--rm", "-e", "A=1", "-w", "/tmp", "-h", "box"],
        &["sh", "-c", "cat; echo err >&2; echo $A $PWD; hostname; exit 3"],
    );
    let ended = fed(home.command(words), b"from the host\n");
    assert_eq!(
        (ended.code, ended.stdout.as_str(), ended.stderr.as_str()),
        (3, "from the host\n1 /tmp\nbox\n", "err\n")
    );
}

#[test]
fn a_machine_keeps_its_disk_and_has_the_verbs_of_containers() {
    let Some(home) = &*HOME else { return };
    sleeper(home, "verbs");
    let kernel = home.ok(["exec", "verbs", "uname", "-r"]);
    assert!(kernel.starts_with("6."), "{kernel}");
    assert_ne!(kernel, rustix::system::uname().release().to_string_lossy(), "a kernel of its own");
    home.ok(["exec", "verbs", "sh", "-c", "echo kept > /kept; rm /etc/group; mkdir /new"]);
    let ended = home.kiln(["exec", "verbs", "sh", "-c", "exit 9"]);
    assert_eq!(ended.code, 9, "{ended:?}");
    assert_eq!(home.kiln(["exec", "verbs", "/no/such"]).code, 127);
    // The keys that detach from a terminal are bytes like others where there is none.
    fs::write(home.beside("keys"), b"a\x10\x11b\n").unwrap();
    let keys = Stdio::from(fs::File::open(home.beside("keys")).unwrap());
    let mut command = home.command(["exec", "-i", "verbs", "od", "-An", "-tx1"]);
    command.stdin(keys);
    let ended = finish(command);
    assert_eq!(ended.stdout.trim(), "61 10 11 62 0a", "{ended:?}");

    let there = home.beside("there");
    fs::write(&there, "from the host\n").unwrap();
    home.ok(["cp", there.to_str().unwrap(), "verbs:/new/there"]);
    home.ok(["cp", "verbs:/new/there", home.beside("back").to_str().unwrap()]);
    assert_eq!(fs::read_to_string(home.beside("back")).unwrap(), "from the host\n");

    // As large as the guest writes it by another way, and as what is no whole number of blocks.
    let large = home.beside("large");
    let content: Vec<u8> = (0..(3 << 20) + 17_u32).map(|index| (index / 11 % 253) as u8).collect();
    fs::write(&large, &content).unwrap();
    home.ok(["cp", large.to_str().unwrap(), "verbs:/new/large"]);
    home.ok(["cp", "verbs:/new/large", home.beside("large-back").to_str().unwrap()]);
    assert!(fs::read(home.beside("large-back")).unwrap() == content);

    let changes = home.ok(["diff", "verbs"]);
    for line in ["D /etc/group", "A /kept", "A /new", "A /new/there"] {
        assert!(changes.lines().any(|found| found == line), "{line} in {changes}");
    }
    let top = home.ok(["top", "verbs"]);
    assert!(top.contains("sleep 600"), "{top}");
    home.ok(["commit", "verbs", "localhost/verbs:1"]);
    let image = "localhost/verbs:1";
    let committed = home.ok([
        "run",
        "--rm",
        "--network",
        "none",
        image,
        "sh",
        "-c",
        "cat /kept; ls /etc/group 2>&1; true",
    ]);
    assert!(committed.starts_with("kept\n") && committed.contains("No such file"), "{committed}");

    home.ok(["pause", "verbs"]);
    let ended = home.kiln(["exec", "verbs", "true"]);
    assert!(ended.code != 0 && ended.stderr.contains("paused"), "{ended:?}");
    home.ok(["resume", "verbs"]);
    home.ok(["exec", "verbs", "true"]);

    home.ok(["stop", "-t", "30", "verbs"]);
    // What does not run can be looked into all the same.
    let changes = home.ok(["diff", "verbs"]);
    assert!(changes.lines().any(|line| line == "A /kept"), "{changes}");
    home.ok(["cp", there.to_str().unwrap(), "verbs:/kept-too"]);
    home.ok(["cp", "verbs:/kept-too", home.beside("again").to_str().unwrap()]);
    assert_eq!(fs::read_to_string(home.beside("again")).unwrap(), "from the host\n");
    home.ok(["commit", "verbs", "localhost/verbs:2"]);
    let committed = home.ok(["run", "--rm", "--network", "none", "localhost/verbs:2", "cat", "/kept-too"]);
    assert_eq!(committed, "from the host");
    home.ok(["start", "verbs"]);
    assert_eq!(home.ok(["exec", "verbs", "cat", "/kept"]), "kept");
    home.ok(["rename", "verbs", "renamed"]);
    home.ok(["rm", "-f", "renamed"]);
    assert_eq!(home.kiln(["inspect", "renamed"]).code, 1);
}

/// What makes a machine itself, as it sees it.
fn identity(home: &Home, name: &str) -> Vec<String> {
    let script = "hostname; cat /etc/hostname; head -c 16 /dev/urandom | od -An -tx1; cat /state; date +%s";
    home.ok(["exec", name, "sh", "-c", script]).lines().map(str::to_owned).collect()
}

#[test]
fn forks_of_forks_of_a_running_machine_are_others_and_the_original_goes_on() {
    let Some(home) = &*HOME else { return };
    let script = "echo begun > /state; n=0; while :; do n=$((n+1)); echo $n > /run/count; hostname >> /run/names; sleep 0.1; done";
    home.ok(run(&["-d", "--name", "origin", "--tmpfs", "/run"], &["sh", "-c", script]));
    until("it counts", || home.kiln(["exec", "origin", "test", "-s", "/run/count"]).code == 0);
    for (from, to) in [("origin", "fork1"), ("fork1", "fork2"), ("fork2", "fork3"), ("origin", "fork4")] {
        home.ok(["fork", from, to]);
    }
    let all = ["origin", "fork1", "fork2", "fork3", "fork4"].map(|name| identity(home, name));
    for (index, what) in ["host name", "/etc/hostname", "random numbers"].iter().enumerate() {
        let values: BTreeSet<&str> = all.iter().map(|machine| machine[index].as_str()).collect();
        assert_eq!(values.len(), all.len(), "{what}: {all:?}");
    }
    for machine in &all {
        assert_eq!(machine[3], "begun", "the disk is a copy");
        let off = machine[4].parse::<i64>().unwrap() - jiff::Timestamp::now().as_second();
        assert!(off.abs() < 30, "the clock is off by {off} s");
    }
    // The same processes go on in each, in memory that was copied: and from its first line on each has its own name.
    let count = |name: &str| home.ok(["exec", name, "cat", "/run/count"]).parse::<u64>().unwrap_or(0);
    let before = ["origin", "fork3"].map(count);
    until("both go on", || count("origin") > before[0] && count("fork3") > before[1]);
    let names = home.ok(["exec", "fork3", "sh", "-c", "sort -u /run/names"]);
    assert!(names.lines().any(|name| name == all[3][0]), "{names}: its own");
    home.ok(["exec", "fork1", "sh", "-c", "echo other > /state"]);
    assert_eq!(home.ok(["exec", "origin", "cat", "/state"]), "begun", "a fork's disk is its own");
    let lineage = home.json(["inspect", "fork3"]);
    let fork2 = home.json(["inspect", "fork2"]);
    let entry = |value: &serde_json::Value| value.as_array().map_or(value.clone(), |all| all[0].clone());
    assert_eq!(entry(&lineage)["parent"], entry(&fork2)["id"], "{lineage}");
    for name in ["origin", "fork1", "fork2", "fork3", "fork4"] {
        home.ok(["rm", "-f", name]);
    }
}

#[test]
fn a_snapshot_brings_back_disk_and_memory_and_can_be_used_again() {
    let Some(home) = &*HOME else { return };
    let counting = "n=0; while true; do n=$((n+1)); echo $n > /count; sleep 0.1; done";
    home.ok(run(&["-d", "--name", "saved"], &["sh", "-c", counting]));
    let count = || home.ok(["exec", "saved", "cat", "/count"]).parse::<u32>().unwrap();
    home.ok(["exec", "saved", "sh", "-c", "echo first > /file"]);
    home.ok(["snapshot", "create", "saved", "disk-only"]);
    home.ok([
        "exec",
        "saved",
        "sh",
        "-c",
        "echo second > /file; until [ $(cat /count) -gt 20 ]; do sleep 0.1; done",
    ]);
    home.ok(["snapshot", "create", "--memory", "saved", "with-memory"]);
    let at_snapshot = count();
    home.ok(["exec", "saved", "sh", "-c", "echo third > /file"]);

    let ended = home.kiln(["snapshot", "create", "saved", "disk-only"]);
    assert!(ended.code == 1 && ended.stderr.contains("has a snapshot `disk-only` already"), "{ended:?}");
    let ended = home.kiln(["snapshot", "restore", "saved", "disk-only"]);
    assert!(ended.code == 1 && ended.stderr.contains("is running"), "{ended:?}");
    let ended = home.kiln(["snapshot", "restore", "--force", "saved", "nope"]);
    assert!(ended.code == 1 && ended.stderr.contains("it has disk-only, with-memory"), "{ended:?}");
    let listed = home.json(["snapshot", "ls", "--format", "json", "saved"]);
    assert_eq!(listed[0]["name"], "disk-only");
    assert!(listed[0]["memory"].is_null() && listed[1]["memory"].as_u64().unwrap() > 0, "{listed}");

    // Twice: a snapshot is not used up.
    for _ in 0..2 {
        home.ok(["snapshot", "restore", "--force", "saved", "with-memory"]);
        home.ok(["start", "saved"]);
        assert_eq!(home.ok(["exec", "saved", "cat", "/file"]), "second");
        let now = count();
        assert!(now > 20 && now < at_snapshot + 100, "it counts on: {now} after {at_snapshot}");
        home.ok(["exec", "saved", "sh", "-c", "echo fourth > /file"]);
    }
    home.ok(["snapshot", "restore", "--force", "saved", "disk-only"]);
    home.ok(["start", "saved"]);
    assert_eq!(home.ok(["exec", "saved", "cat", "/file"]), "first");
    assert!(count() < 20, "it began anew");
    home.ok(["snapshot", "rm", "saved", "disk-only", "with-memory"]);
    assert_eq!(home.ok(["snapshot", "ls", "-q", "saved"]), "");
    home.ok(["rm", "-f", "saved"]);
}

#[test]
fn a_disk_grows_under_a_running_machine_and_what_a_machine_is_given_changes_between_its_lives() {
    let Some(home) = &*HOME else { return };
    home.ok(run(&["-d", "--name", "grown", "--disk", "1g"], &["sleep", "600"]));
    let mebibytes = || {
        let shown = home.ok(["exec", "grown", "df", "-m", "/"]);
        shown.lines().last().unwrap().split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    assert!(mebibytes() < 1024);
    home.ok(["resize", "grown", "--disk", "3g"]);
    assert!((2500..3072).contains(&mebibytes()), "{}", mebibytes());
    let ended = home.kiln(["resize", "grown", "--disk", "2g"]);
    assert_eq!(ended.code, 1, "{ended:?}");
    let ended = home.kiln(["update", "--memory", "192m", "grown"]);
    assert!(ended.code == 1 && ended.stderr.contains("kiln stop grown"), "{ended:?}");
    let ended = home.kiln(["update", "grown"]);
    assert!(ended.code == 2 && ended.stderr.contains("nothing is to be changed"), "{ended:?}");
    home.ok(["stop", "-t", "0", "grown"]);
    let ended = home.kiln(["update", "--kernel", "no-such-kernel", "grown"]);
    assert!(ended.code == 1 && ended.stderr.contains("no-such-kernel"), "{ended:?}");
    home.ok(["update", "--memory", "192m", "grown"]);
    home.ok(["resize", "grown", "--disk", "4g"]);
    home.ok(["start", "grown"]);
    assert!((3500..4096).contains(&mebibytes()), "{}", mebibytes());
    let memory = home.ok(["exec", "grown", "sh", "-c", "grep MemTotal /proc/meminfo"]);
    let kib: u64 = memory.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 192 << 10, "{memory}");

    // The template that it began with is in use; one that nobody uses can go.
    let held = home.json(["template", "ls", "--format", "json"]);
    let id = |memory: u64| {
        let found = held.as_array().unwrap().iter().find(|template| template["memory"] == memory << 20);
        found.unwrap()["id"].as_str().unwrap().to_owned()
    };
    let ended = home.kiln(["template", "rm", &id(192)]);
    assert!(ended.code == 1 && ended.stderr.contains("a running machine began with it"), "{ended:?}");
    home.ok(["rm", "-f", "grown"]);
    home.ok(["template", "rm", &id(192)]);
}

#[test]
fn a_machine_that_boots_cold_keeps_its_disk_and_is_forked_as_others_are() {
    let Some(home) = &*HOME else { return };
    home.ok(run(&["-d", "--cold", "--name", "cold"], &["sleep", "600"]));
    home.ok(["exec", "cold", "sh", "-c", "echo kept > /kept; sync"]);
    home.ok(["fork", "cold", "cold-fork"]);
    assert_eq!(home.ok(["exec", "cold-fork", "cat", "/kept"]), "kept");
    home.ok(["rm", "-f", "cold-fork"]);
    home.ok(["stop", "-t", "0", "cold"]);
    home.ok(["start", "cold"]);
    assert_eq!(home.ok(["exec", "cold", "cat", "/kept"]), "kept");
    home.ok(["snapshot", "create", "--memory", "cold", "here"]);
    home.ok(["snapshot", "restore", "--force", "cold", "here"]);
    // What is saved of its memory is forgotten, and not its disk.
    home.ok(["start", "--cold", "cold"]);
    assert_eq!(home.ok(["exec", "cold", "cat", "/kept"]), "kept");
    home.ok(["rm", "-f", "cold"]);
    for (flags, words) in
        [(["--memory", "900t"], "of memory, and this host has"), (["--cpus", "5000"], "5000 processors")]
    {
        let ended = home.kiln(["run", "--vm", "--rm", flags[0], flags[1], IMAGE, "true"]);
        assert!(ended.code == 125 && ended.stderr.contains(words), "{flags:?}: {ended:?}");
    }
}

#[test]
fn a_supervisor_that_is_killed_takes_its_machine_along_and_leaves_nothing() {
    let Some(home) = &*HOME else { return };
    let id = sleeper(home, "killed");
    let record: serde_json::Value = serde_json::from_slice(
        &fs::read(home.path().join("instances").join(&id).join("instance.json")).unwrap(),
    )
    .unwrap();
    let pid = |field: &str| i32::try_from(record[field]["pid"].as_u64().unwrap()).unwrap();
    let (supervisor, monitor) = (pid("supervisor"), pid("process"));
    let children = fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).unwrap();
    let hypervisor: i32 = children.split_whitespace().next().expect("a hypervisor").parse().unwrap();
    let kill = |pid: i32| {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    };
    kill(supervisor);
    until("all of it is gone", || {
        [monitor, hypervisor].iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists())
    });
    let shown = home.ok(["ps", "-a", "--format", "json", "--filter", "name=killed"]);
    assert!(shown.contains("exited") || shown.contains("Exited"), "{shown}");
    home.ok(["start", "killed"]);
    home.ok(["exec", "killed", "true"]);
    home.ok(["rm", "-f", "killed"]);
}

#[test]
fn what_a_machine_cannot_have_is_refused_before_anything_is_made() {
    let Some(home) = &*HOME else { return };
    let table: [(&[&str], &str); 4] = [
        (&["--memory", "64m"], "at least 128 MiB"),
        (&["--device", "/dev/null"], "devices of the host"),
        (&["--network", "host"], "the network `host`"),
        (&["--kernel", "none-such"], "none-such"),
    ];
    for (flags, words) in table {
        let words_of_line = [&["run", "--vm", "--rm"][..], flags, &[IMAGE, "true"]].concat();
        let ended = home.kiln(words_of_line);
        assert!(ended.code == 125 && ended.stderr.contains(words), "{flags:?}: {ended:?}");
    }
    let ended = home.kiln(["run", "--kernel", "x", IMAGE, "true"]);
    assert!(ended.code == 125 && ended.stderr.contains("--vm"), "{ended:?}");
}

/// A server on a free port of the host's loopback, which says `words` to whoever comes.
fn server(words: &'static str) -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(words.as_bytes());
        }
    });
    port
}

#[test]
fn the_network_lets_through_what_its_policy_says_and_ports_are_published() {
    let Some(home) = &*HOME else { return };
    let (open, shut) = (server("open sesame\n"), server("never\n"));
    let rule = format!("host-loopback:{open}");
    let words = run(
        &["-d", "--name", "net", "--allow", &rule, "-p", "127.0.0.1:0:8080"],
        &["sh", "-c", "mkdir /www; echo published > /www/index.html; httpd -f -p 8080 -h /www"],
    );
    home.ok(words);
    let fetch =
        |port: u16| home.kiln(["exec", "net", "sh", "-c", &format!("nc -w 10 192.0.0.1 {port} < /dev/null")]);
    assert_eq!(fetch(open).stdout, "open sesame\n");
    let refused = fetch(shut);
    assert!(refused.code != 0 && refused.stdout.is_empty(), "{refused:?}");
    let port = home.ok(["port", "net"]);
    let address = port.rsplit(' ').next().unwrap().to_owned();
    until("the port answers", || {
        let answer =
            std::process::Command::new("curl").args(["-s", &format!("http://{address}/")]).output().unwrap();
        answer.stdout == b"published\n"
    });
    // A fork has ways out of its own, by the same rules; the port is the original's, so it cannot have that.
    home.ok(["rm", "-f", "net"]);
    let none = home.kiln(run(
        &["--rm", "--network", "none"],
        &["sh", "-c", "ip -o link | wc -l; nc -w 2 192.0.0.1 53 < /dev/null"],
    ));
    assert!(none.code != 0 && none.stdout == "1\n", "{none:?}");
}

#[test]
fn directories_of_the_host_are_shared_and_read_only_ones_cannot_be_written_to() {
    let Some(home) = &*HOME else { return };
    let shared = home.beside("shared");
    fs::create_dir_all(shared.join("below")).unwrap();
    fs::write(shared.join("below/file"), "of the host\n").unwrap();
    let file = home.beside("single");
    fs::write(&file, "one file\n").unwrap();
    let flags = [
        format!("{}:/shared", shared.display()),
        format!("{}:/frozen:ro", shared.display()),
        format!("{}:/etc/single", file.display()),
        format!("{}:/sealed:ro", file.display()),
    ];
    let script = "cat /shared/below/file /etc/single; echo written > /shared/new; mv /shared/new /shared/moved; \
                  echo no > /frozen/new || echo refused; cat /frozen/moved; touch /frozen/below/file || echo refused; \
                  echo no >> /sealed || cat /sealed";
    let flags = ["--rm", "-v", &flags[0], "-v", &flags[1], "-v", &flags[2], "-v", &flags[3]];
    let ended = home.kiln(run(&flags, &["sh", "-c", script]));
    assert_eq!(ended.stdout, "of the host\none file\nrefused\nwritten\nrefused\none file\n", "{ended:?}");
    assert_eq!(fs::read_to_string(shared.join("moved")).unwrap(), "written\n");
}

#[test]
fn single_files_that_are_shared_stay_what_they_are_in_forks_and_forks_of_forks() {
    let Some(home) = &*HOME else { return };
    let (open, sealed) = (home.beside("open-file"), home.beside("sealed-file"));
    let flags = [format!("{}:/etc/open", open.display()), format!("{}:/etc/sealed:ro", sealed.display())];
    for file in [&open, &sealed] {
        fs::write(file, "of the host\n").unwrap();
    }
    let flags = ["-d", "--name", "elder", "-v", &flags[0], "-v", &flags[1]];
    home.ok(run(&flags, &["sleep", "600"]));
    home.ok(["fork", "elder", "younger"]);
    home.ok(["fork", "younger", "youngest"]);
    for name in ["elder", "younger", "youngest"] {
        let script = format!(
            "cat /etc/sealed; echo no >> /etc/sealed || echo refused; \
             mount -o remount,rw /etc/sealed; echo no >> /etc/sealed || echo refused; echo {name} >> /etc/open"
        );
        let ended = home.kiln(["exec", name, "sh", "-c", &script]);
        assert_eq!(ended.stdout, "of the host\nrefused\nrefused\n", "{name}: {ended:?}");
    }
    assert_eq!(fs::read_to_string(&sealed).unwrap(), "of the host\n");
    assert_eq!(fs::read_to_string(&open).unwrap(), "of the host\nelder\nyounger\nyoungest\n");
    home.ok(["rm", "-f", "elder", "younger", "youngest"]);
}

#[test]
fn files_of_a_share_are_piped_sent_and_mapped_for_writing() {
    let Some(home) = &*HOME else { return };
    let (shared, program) = (home.beside("piped"), home.beside("mapped"));
    fs::create_dir_all(&shared).unwrap();
    common::compile("mapped", &program);
    let bytes: Vec<u8> = (0..700_000_u32).map(|number| (number % 251) as u8).collect();
    fs::write(shared.join("large"), &bytes).unwrap();
    fs::write(shared.join("map"), vec![b'.'; 5000]).unwrap();
    let share = format!("{}:/shared", shared.display());
    let tool = format!("{}:/mapped:ro", program.display());
    // Through a pipe, out of the machine, over its own network; and what is mapped is seen without closing anything.
    let script = "cat /shared/large | wc -c; cat /shared/large; httpd -p 8000 -h /shared; \
                  nc 127.0.0.1 8000 < /shared/request | wc -c >&2; /mapped /shared/map && head -c 8 /shared/map >&2";
    fs::write(shared.join("request"), "GET /large HTTP/1.0\r\n\r\n").unwrap();
    let output =
        home.command(run(&["--rm", "-v", &share, "-v", &tool], &["sh", "-c", script])).output().unwrap();
    let (told, piped) = output.stdout.split_at("700000\n".len());
    assert!(told == b"700000\n" && piped == bytes, "{}", String::from_utf8_lossy(&output.stderr));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let served: usize = words.lines().next().unwrap_or_default().trim().parse().unwrap_or(0);
    assert!(served > bytes.len(), "{words}");
    assert!(words.ends_with("mapped.."), "{words}");
    assert!(fs::read(shared.join("map")).unwrap().starts_with(b"mapped.."));
}

#[test]
fn volumes_are_filled_from_the_image_and_one_serves_a_container_and_a_machine_at_once() {
    let Some(home) = &*HOME else { return };
    let image = "localhost/volumes:1";
    home.ok(["run", "--name", "seed", "--network", "none", IMAGE, "sh", "-c",
        "mkdir -p /srv/data/sub; echo seed > /srv/data/sub/f; chmod 1750 /srv/data; chown 7:8 /srv/data/sub/f; ln -s /srv /link"]);
    home.ok(["commit", "--change", "VOLUME /declared", "seed", image]);
    home.ok(["rm", "seed"]);
    let machine = |flags: &[&str], script: &str| {
        let words = [&["run", "--vm", "--memory", "256m", "--rm"][..], flags, &[image, "sh", "-c", script]];
        home.ok(words.concat())
    };
    let shown = machine(
        &["-v", "vol:/link/data"],
        "cat /srv/data/sub/f; stat -c '%a %u %g' /srv/data /srv/data/sub/f; echo machine > /srv/data/new; rm -r /srv/data/sub",
    );
    assert_eq!(shown, "seed\n1750 0 0\n644 7 8");
    // Filled once: what was removed stays so, and a volume for which `nocopy` was said stays empty.
    let shown = machine(
        &["-v", "vol:/srv/data", "-v", "bare:/bare/mount", "--tmpfs", "/t:size=1m,mode=700"],
        "ls /srv/data /bare/mount; stat -c %a /t; df -k /t | tail -n 1 | awk '{print $2}'",
    );
    assert_eq!(shown, "/bare/mount:\n\n/srv/data:\nnew\n700\n1024");
    let empty =
        machine(&["--mount", "type=volume,source=raw,target=/srv/data,volume-nocopy"], "ls /srv/data");
    assert_eq!(empty, "");

    home.ok([
        "run",
        "-d",
        "--vm",
        "--memory",
        "256m",
        "--name",
        "both",
        "-v",
        "vol:/v",
        "-v",
        "vol:/ro:ro",
        image,
        "sleep",
        "600",
    ]);
    home.ok([
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        "vol:/v",
        IMAGE,
        "sh",
        "-c",
        "cat /v/new; echo container > /v/reply",
    ]);
    assert_eq!(
        home.ok(["exec", "both", "cat", "/v/reply"]),
        "container",
        "what the other wrote is seen at once"
    );
    let refused = home.kiln(["exec", "both", "sh", "-c", "echo no > /ro/new"]);
    assert!(refused.code != 0 && refused.stderr.contains("ead-only"), "{refused:?}");
    let used = home.kiln(["volume", "rm", "vol"]);
    assert!(used.code != 0 && used.stderr.contains("used by both"), "{used:?}");

    // The image's own volume is anonymous, is its machine's and its fork's, and goes with the last of them.
    home.ok(["exec", "both", "sh", "-c", "echo kept > /declared/f"]);
    home.ok(["fork", "both", "twin"]);
    home.ok(["rm", "-f", "-v", "both"]);
    assert_eq!(home.ok(["exec", "twin", "cat", "/declared/f", "/v/new"]), "kept\nmachine");
    home.ok(["rm", "-f", "-v", "twin"]);
    let left = home.ok(["volume", "ls", "-q"]);
    assert_eq!(left.lines().collect::<Vec<_>>(), ["bare", "raw", "vol"]);
    home.ok(["volume", "rm", "bare", "raw", "vol"]);
}
