//! First processes: what they are and see.

use kiln_contract::{ByteSize, InstanceSpec, RuntimeChoice, TmpfsOptions, Ulimit};

use super::bed::{Bed, own, runtimes};
use crate::runtime::{ResolvedMount, RuntimeError};

#[test]
fn streams_and_exit_codes_are_the_commands_own() {
    let script = "echo out; echo err >&2; exit 7";
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        let outcome = bed.run().unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
        let seen = (outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str());
        assert_eq!(seen, (7, "out\n", "err\n"), "{runtime:?}");
    }
}

#[test]
fn a_signal_that_ends_it_is_told() {
    for runtime in runtimes() {
        // Process 1 is not killed by its own signals.
        let Some(mut bed) = Bed::new(&runtime, &["sleep", "60"]) else { return };
        let (streams, _ours) = super::bed::pipes();
        let created = bed.launch(streams).unwrap();
        let pid = rustix::process::Pid::from_raw(created.process.pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        assert_eq!(super::bed::wait(created.process), 137, "{runtime:?}");
        bed.record.process = None;
    }
}

/// What a script prints in a container with a setting changed.
type Case = (&'static str, fn(&mut InstanceSpec), &'static str, &'static str);

/// What the kernel gives to the host's own namespaces is not tested here: other tests change it.
const CASES: [Case; 32] = [
    ("process 1 of its own", |_| {}, "echo $$", "1"),
    ("a host name", |spec| spec.hostname = Some("box".into()), "hostname; echo $HOSTNAME", "box\nbox"),
    ("root by default", |_| {}, "id -u; id -g; id -G; echo $HOME", "0\n0\n0\n/root"),
    (
        "a user by name",
        |spec| spec.process.user = "app".into(),
        "id -u; id -g; id -G; echo $HOME",
        "1000\n1000\n1000 50\n/home/app",
    ),
    (
        "a user and a group by number",
        |spec| {
            spec.process.user = "7:8".into();
            spec.process.groups = own(&["staff", "99"]);
        },
        "id -u; id -G; echo $HOME",
        "7\n8 50 99\n/",
    ),
    (
        "a path to look for commands",
        |_| {},
        "echo $PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    (
        "an environment of its own",
        |spec| spec.process.env = own(&["A=b=c", "HOME=/x", "PATH=/bin", "E="]),
        "echo $A $HOME $PATH ${E-unset} ${CARGO_TARGET_DIR-unset}; env | grep -c .",
        "b=c /x /bin unset\n8",
    ),
    (
        "a directory to work in",
        |spec| spec.process.cwd = "/var/www".into(),
        "pwd; cat index.html",
        "/var/www\nhello from kiln",
    ),
    (
        "a missing directory made for it",
        |spec| {
            spec.process.cwd = "/new/deep".into();
            spec.process.user = "app".into();
        },
        "pwd; stat -c '%u %g %a' /new /new/deep",
        "/new/deep\n0 0 755\n0 0 755",
    ),
    ("files made for everybody to read", |_| {}, "umask; touch /f; stat -c %a /f", "0022\n644"),
    ("devices", |_| {}, "ls /dev; echo x >/dev/null; head -c 2 /dev/zero | wc -c", DEVICES),
    ("shared memory of 64 MiB", |_| {}, "df -k /dev/shm | tail -1 | awk '{print $2}'", "65536"),
    (
        "shared memory as large as asked",
        |spec| spec.resources.shm_size = Some(ByteSize(1 << 20)),
        "df -k /dev/shm | tail -1 | awk '{print $2}'",
        "1024",
    ),
    (
        "kernel settings that cannot be changed",
        |_| {},
        "echo 1 2>/dev/null >/proc/sys/kernel/sysrq || echo no",
        "no",
    ),
    (
        "hidden files of the kernel",
        |_| {},
        "cat /proc/kcore /proc/keys /proc/timer_list /proc/interrupts 2>/dev/null | wc -c; ls -A /sys/firmware /proc/acpi 2>/dev/null | grep -vc ':$\\|^$'",
        "0\n0",
    ),
    (
        "a read-only sysfs",
        |_| {},
        "touch /sys/kernel/x 2>&1 | grep -o 'Read-only.*'",
        "Read-only file system",
    ),
    ("only itself to see", |_| {}, "ls /proc >/seen; grep -c '^[0-9]*$' /seen", "2"),
    ("no network but loopback", |_| {}, "ls /sys/class/net; wc -l </proc/net/route", "lo\n1"),
    ("ping and low ports for everybody", |_| {}, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    (
        "Docker's capabilities",
        |_| {},
        CAPABILITIES,
        "CapInh 0\nCapPrm a80425fb\nCapEff a80425fb\nCapBnd a80425fb\nCapAmb 0",
    ),
    (
        "no capabilities for others than root",
        |spec| spec.process.user = "app".into(),
        CAPABILITIES,
        "CapInh 0\nCapPrm 0\nCapEff 0\nCapBnd a80425fb\nCapAmb 0",
    ),
    (
        "capabilities as asked for",
        |spec| {
            spec.security.cap_drop = own(&["ALL"]);
            spec.security.cap_add = own(&["net_admin"]);
        },
        CAPABILITIES,
        "CapInh 0\nCapPrm 1000\nCapEff 1000\nCapBnd 1000\nCapAmb 0",
    ),
    ("no new privileges and a filter", |_| {}, CONFINED, "NoNewPrivs 1\nSeccomp 2"),
    (
        "privileges if they are asked for",
        |spec| {
            spec.process.user = "app".into();
            spec.security.options = own(&["no-new-privileges=false"]);
        },
        CONFINED,
        "NoNewPrivs 0\nSeccomp 2",
    ),
    (
        "no filter if none is asked for",
        |spec| spec.security.options = own(&["seccomp=unconfined"]),
        CONFINED,
        "NoNewPrivs 1\nSeccomp 0",
    ),
    (
        "everything if it is privileged",
        |spec| spec.security.privileged = true,
        "grep -E 'NoNew|Seccomp:' /proc/self/status | tr -d '\\t'; test -w /sys/kernel && echo sys; head -c 1 /proc/interrupts | wc -c",
        "NoNewPrivs:0\nSeccomp:0\nsys\n1",
    ),
    (
        "calls that are not allowed",
        |_| {},
        "unshare -U true 2>&1 | grep -o 'Operation.*'; mount -t tmpfs x /tmp 2>&1 | grep -o 'perm.*\\|Operation.*'",
        "Operation not permitted\npermission denied (are you root?)",
    ),
    (
        "mounts with the capability",
        |spec| spec.security.cap_add = own(&["SYS_ADMIN"]),
        "mount -t tmpfs x /tmp && echo mounted",
        "mounted",
    ),
    (
        "a root that is only read",
        |spec| spec.security.read_only = true,
        "touch /f 2>&1 | grep -o 'Read.*'; touch /dev/shm/f && echo shm",
        "Read-only file system\nshm",
    ),
    (
        "limits of its own",
        |spec| spec.resources.ulimits = vec![Ulimit { name: "nofile".into(), soft: 100, hard: 200 }],
        "ulimit -n; ulimit -H -n",
        "100\n200",
    ),
    (
        "kernel settings of its own",
        |spec| {
            spec.security.sysctls = [("net.ipv4.ip_forward", "1"), ("kernel.shmmni", "77")]
                .map(|(k, v)| (k.into(), v.into()))
                .into();
        },
        "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni",
        "1\n77",
    ),
    (
        "devices that are asked for",
        |spec| spec.security.devices = own(&["/dev/null:/dev/hole"]),
        "stat -c '%t %T' /dev/hole; echo x >/dev/hole && echo written",
        "1 3\nwritten",
    ),
];

const DEVICES: &str =
    "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n2";
const CAPABILITIES: &str = "sed -n 's/^\\(Cap...\\):\\t0*\\(.\\)/\\1 \\2/p' /proc/self/status";
const CONFINED: &str = "sed -n 's/^\\(NoNewPrivs\\|Seccomp\\):\\t/\\1 /p' /proc/self/status";

/// Those that show that each part of the specification reaches a program that reads it; programs are slow.
const BY_PROGRAMS: [&str; 8] = [
    "a user and a group by number",
    "a missing directory made for it",
    "devices",
    "no network but loopback",
    "capabilities as asked for",
    "no new privileges and a filter",
    "everything if it is privileged",
    "kernel settings of its own",
];

#[test]
fn a_container_is_what_its_settings_say() {
    let mut wrong = Vec::new();
    for runtime in runtimes() {
        for (name, change, script, expected) in CASES {
            if runtime != RuntimeChoice::Native && !BY_PROGRAMS.contains(&name) {
                continue;
            }
            let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
            change(&mut bed.record.spec);
            match bed.run() {
                Ok(outcome) => {
                    let mut stdout = outcome.stdout.trim_end().to_owned();
                    if runtime != RuntimeChoice::Native {
                        // runc and crun differ in what else they put into /dev.
                        stdout = stdout.replace("console\n", "").replace("core\n", "");
                    }
                    if stdout.replace("core\n", "") != expected {
                        wrong.push(format!("{name} ({runtime:?}): {outcome:#?}"));
                    }
                }
                Err(error) => wrong.push(format!("{name} ({runtime:?}): {error}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn mounts_are_made_in_the_root_and_nowhere_else() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), "from the host\n").unwrap();
    for runtime in runtimes() {
        let script = "cat /data/file /one; touch /data/new && echo w; touch /ro/new 2>&1 | grep -o Read.*; \
            df -k /mem | tail -1 | awk '{print $2}'; stat -c %a /mem; cat /etc/hosts";
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", script]) else { return };
        // An image whose link leads out of it.
        std::os::unix::fs::symlink("/../../../../inside", bed.root.join("data")).unwrap();
        std::fs::create_dir(bed.root.join("inside")).unwrap();
        let tmpfs = TmpfsOptions { size: Some(ByteSize(2 << 20)), mode: Some(0o700), options: Vec::new() };
        let file = outside.path().join("file");
        bed.mounts = vec![
            ResolvedMount::bind(outside.path(), "/data", false, None),
            ResolvedMount::bind(outside.path(), "/ro", true, None),
            ResolvedMount::bind(&file, "/one", true, None),
            ResolvedMount::bind(&file, "/etc/hosts", false, None),
            ResolvedMount::tmpfs("/mem", &tmpfs, false),
        ];
        let outcome = bed.run().unwrap_or_else(|error| panic!("{runtime:?}: {error}"));
        let expected = "from the host\nfrom the host\nw\nRead-only file system\n2048\n700\nfrom the host\n";
        assert_eq!(outcome.stdout, expected, "{runtime:?}: {outcome:#?}");
    }
}

#[test]
fn commands_that_are_not_there_and_that_cannot_run_are_told_apart() {
    for runtime in runtimes() {
        for (command, missing) in
            [("nope", true), ("/no/such", true), ("/etc/passwd", false), ("/etc", false), ("/script", false)]
        {
            let Some(mut bed) = Bed::new(&runtime, &[command]) else { return };
            std::fs::write(bed.root.join("script"), "no interpreter\n").unwrap();
            let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(bed.root.join("script"), executable).unwrap();
            if command == "/script" && runtime != RuntimeChoice::Native {
                // The programs find this out after they have said that all is well.
                continue;
            }
            let error = bed.run().expect_err(command);
            let told = match &error {
                RuntimeError::CommandNotFound { command: named } => missing && named == command,
                RuntimeError::CommandNotExecutable { command: named, .. } => !missing && named == command,
                _ => false,
            };
            assert!(told, "{command} by {runtime:?}: {error}");
        }
    }
}

#[test]
fn settings_that_make_no_sense_are_refused_and_leave_nothing() {
    type Change = fn(&mut InstanceSpec);
    let cases: [(&str, Change); 9] = [
        ("user", |spec| spec.process.user = "stranger".into()),
        ("capability", |spec| spec.security.cap_add = own(&["FLY"])),
        ("not absolute", |spec| spec.process.cwd = "relative".into()),
        ("no command", |spec| spec.process.args.clear()),
        ("NUL", |spec| spec.process.args.push("a\0b".into())),
        ("resource limit", |spec| {
            spec.resources.ulimits = vec![Ulimit { name: "luck".into(), soft: 1, hard: 1 }];
        }),
        ("whole host", |spec| {
            spec.security.sysctls.insert("kernel.panic".into(), "1".into());
        }),
        ("device", |spec| spec.security.devices = own(&["/etc/passwd"])),
        ("seccomp", |spec| spec.security.options = own(&["seccomp=/no/such/profile"])),
    ];
    for runtime in runtimes() {
        for (word, change) in cases {
            let Some(mut bed) = Bed::new(&runtime, &["true"]) else { return };
            change(&mut bed.record.spec);
            let error = bed.run().expect_err(word).to_string();
            assert!(error.contains(word), "{word}: {error}");
            assert!(
                !std::path::Path::new("/sys/fs/cgroup/freezer/kiln").join(bed.record.id.as_str()).exists()
            );
        }
    }
}

#[test]
fn a_working_directory_that_is_not_the_containers_is_refused() {
    // A descriptor of the runtime may be a directory of the host.
    for number in 3..20 {
        let Some(mut bed) = Bed::new(&RuntimeChoice::Native, &["sh", "-c", "ls -d etc/passwd"]) else {
            return;
        };
        bed.record.spec.process.cwd = format!("/proc/self/fd/{number}");
        if let Ok(outcome) = bed.run() {
            assert_ne!(outcome.code, 0, "{number}: {outcome:?}");
        }
    }
}

#[test]
fn an_init_reaps_passes_signals_on_and_ends_as_the_command_does() {
    let script = "trap 'echo got; exit 5' USR1; (sh -c 'sleep 0.1; echo orphan; : >/done' &); echo ready; \
        until [ -e /done ]; do sleep 0.02; done; \
        cat /proc/1/comm; tr '\\0' ' ' </proc/1/cmdline; echo; readlink /proc/1/exe || echo hidden; \
        for i in $(seq 200); do ps -o stat= | grep -q Z || break; sleep 0.02; done; \
        ps -o stat= | grep -c Z; kill -USR1 1; sleep 5";
    let Some(mut bed) = Bed::new(&RuntimeChoice::Native, &["sh", "-c", script]) else { return };
    bed.record.spec.init = true;
    let outcome = bed.run().unwrap();
    let lines: Vec<&str> = outcome.stdout.lines().map(str::trim).collect();
    assert_eq!(lines, ["ready", "orphan", "init", "init", "hidden", "0", "got"], "{outcome:?}");
    assert_eq!(outcome.code, 5);

    let Some(mut bed) = Bed::new(&RuntimeChoice::Native, &["sh", "-c", "kill -KILL $$"]) else { return };
    bed.record.spec.init = true;
    assert_eq!(bed.run().unwrap().code, 137);

    let Some(mut bed) = Bed::new(&RuntimeChoice::Native, &["nope"]) else { return };
    bed.record.spec.init = true;
    assert!(matches!(bed.run(), Err(RuntimeError::CommandNotFound { .. })));
}

#[test]
fn a_profile_of_the_users_is_applied() {
    let profile = tempfile::NamedTempFile::new().unwrap();
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    std::fs::write(profile.path(), text).unwrap();
    for runtime in runtimes() {
        let Some(mut bed) = Bed::new(&runtime, &["sh", "-c", "mkdir /x"]) else { return };
        bed.record.spec.security.options = vec![format!("seccomp={}", profile.path().display())];
        let outcome = bed.run().unwrap();
        assert!(outcome.stderr.contains("No space left"), "{runtime:?}: {outcome:?}");
    }
}

#[test]
fn containers_are_made_side_by_side_by_one_process_whose_working_directory_stays() {
    let here = std::env::current_dir().unwrap();
    std::thread::scope(|threads| {
        let makers: Vec<_> = (0..8)
            .map(|_| {
                threads.spawn(|| {
                    for _ in 0..8 {
                        let Some(mut bed) = Bed::new(&RuntimeChoice::Native, &["echo", "made"]) else {
                            return;
                        };
                        // What a process that was killed while it made one leaves.
                        std::fs::write(bed.dir.path().join("notify"), "").unwrap();
                        let outcome = bed.run().unwrap_or_else(|error| panic!("{error}"));
                        assert_eq!(outcome.stdout, "made\n", "{outcome:?}");
                    }
                })
            })
            .collect();
        while !makers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            assert_eq!(std::env::current_dir().unwrap(), here);
        }
    });
}
