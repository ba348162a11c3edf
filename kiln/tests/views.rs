//! `kiln fs`: views from their making to their end, as root and as an ordinary user, by all back ends.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::place::{Place, fs_run};
use common::{IMAGE, until};
use rustix::io::Errno;
use serde_json::Value;

const BACKENDS: [&str; 3] = ["overlay", "fuse", "router"];

#[test]
fn a_view_is_seen_by_its_processes_and_by_nobody_else() {
    for place in Place::all() {
        for backend in BACKENDS {
            let at = place.beside("at");
            let at = at.to_str().unwrap();
            // Whose it is makes it, so that an ordinary user may mount there.
            if let Some((user, _)) = &place.user {
                let made = place.ok(&["fs", "ls", IMAGE, "/etc/passwd", "--format", "json"]);
                assert!(made.contains("passwd"), "{made}");
                fs::create_dir_all(at).unwrap();
                std::os::unix::fs::chown(at, Some(user.uid), Some(user.gid)).unwrap();
            }
            let script = format!(
                "cat {at}/var/www/index.html; echo $KILN_VIEW; touch {at}/x 2>/dev/null || echo no; grep -c ' {at} .*nosuid,nodev' /proc/self/mounts"
            );
            let words = fs_run(IMAGE, at, backend, &["--name", "v"], &["sh", "-c", &script]);
            assert_eq!(place.ok(&words), "hello from kiln\nv\nno\n1", "{backend}");
            assert_eq!(fs::read_dir(at).unwrap().count(), 0, "{backend}");
            assert_eq!(place.views(), "");
            let program = format!("{at}/bin/busybox");
            assert_eq!(place.ok(&fs_run(IMAGE, at, backend, &[], &[&program, "echo", "ran"])), "ran");
        }
    }
}

#[test]
fn what_was_edited_is_told_committed_and_rolled_back() {
    for place in Place::all() {
        for backend in BACKENDS {
            let tag = format!("me/{backend}:1");
            place.ok(&["fs", "tag", IMAGE, &tag]);
            let kiln = place.program();
            let script = format!(
                "set -e; cd /kiln; echo new > new; rm etc/group; mv home moved; echo more >> etc/passwd; chmod 500 var
                 cp -p bin/busybox true; ./true; {kiln} fs diff; {kiln} fs commit -t {tag} -m changed >/dev/null"
            );
            let at = place.at_by(backend);
            let script = script.replace("cd /kiln", &format!("cd {at}"));
            let told = place.ok(&fs_run(&tag, &at, backend, &["-e"], &["sh", "-c", &script]));
            let wanted = "C /etc\nD /etc/group\nC /etc/passwd\nD /home\nA /moved\nA /moved/app\nA /new\nA /true\nC /var";
            assert_eq!(told, wanted, "{backend}");
            assert_eq!(place.views(), "");
            let committed =
                place.ok(&["fs", "diff", IMAGE, &tag]).replace("C /etc\n", "").replace("D /home/app\n", "");
            let wanted = wanted.replace("C /etc\n", "");
            assert_eq!(committed, wanted, "{backend}");
            let rows: Value =
                serde_json::from_str(&place.ok(&["fs", "ls", &tag, "--format", "json"])).unwrap();
            for row in rows.as_array().unwrap() {
                assert_eq!((&row["uid"], &row["gid"]), (&Value::from(0), &Value::from(0)), "{row}");
            }
            assert_eq!(place.ok(&["fs", "cat", &tag, "new"]), "new");
            // As it was.
            let before = format!("{tag}~1");
            assert!(place.kiln(&["fs", "cat", &before, "new"]).stderr.contains("there is no `new`"));
            assert_eq!(
                place.ok(&["fs", "run", &before, "--at", &at, "--", "ls", &format!("{at}/home")]),
                "app"
            );
            let log: Value =
                serde_json::from_str(&place.ok(&["fs", "log", &tag, "--format", "json"])).unwrap();
            assert_eq!(log.as_array().unwrap().len(), 2);
        }
    }
}

#[test]
fn several_images_are_seen_as_one() {
    let Some(place) = Place::of_root() else { return };
    let at = place.beside("at").display().to_string();
    for (name, change) in
        [("one", "echo 1 > one; echo 1 > both"), ("two", "echo 2 > two; echo 2 > both; rm etc/group")]
    {
        let script = format!("cd {at} && {change} && {} fs commit -t me/{name}", place.program());
        place.ok(&["fs", "run", IMAGE, "-e", "--at", &at, "--", "sh", "-c", &script]);
    }
    for (reference, expected) in [("me/one+me/two", "1\n2\n2"), ("me/two+me/one", "1\n2\n1")] {
        let script = format!("cd {at}; cat one two both; test ! -e etc/group");
        assert_eq!(place.ok(&["fs", "run", reference, "--at", &at, "--", "sh", "-c", &script]), expected);
    }
    let wrong = place.kiln(&["fs", "run", "me/one+me/tow", "--at", &at, "--", "true"]);
    assert!(wrong.code == 125 && wrong.stderr.contains("me/two"), "{wrong:?}");
}

#[test]
fn a_kept_view_is_entered_again_and_one_in_use_is_joined() {
    for place in Place::all() {
        for backend in BACKENDS {
            let at = place.at_by(backend);
            let make = fs_run(IMAGE, &at, backend, &["-e", "--keep", "--name", "kept"], &[]);
            place.ok(&[&make[..], &["sh", "-c", &format!("echo one > {at}/one")]].concat());
            assert_eq!(place.views(), "kept");
            let taken = place.kiln(&[&make[..], &["true"]].concat());
            assert!(taken.code == 125 && taken.stderr.contains("already"), "{taken:?}");
            let again = ["fs", "run", "--rerun", "kept", "--"];
            let script = format!("cat {at}/one; echo two > {at}/two; exec sleep 60");
            let mut command = place.command(&[&again[..], &["sh", "-c", &script]].concat());
            let mut running = command.stdout(Stdio::null()).spawn().unwrap();
            let two = place.home().join("views/kept/upper/two");
            until("the view is changed", || two.exists());
            let joined = place.ok(&[
                "fs",
                "join",
                "kept",
                "--",
                "sh",
                "-c",
                &format!("cat {at}/one {at}/two; echo $KILN_VIEW"),
            ]);
            assert_eq!(joined, "one\ntwo\nkept", "{backend}");
            let info: Value = serde_json::from_str(&place.ok(&["fs", "info", "kept"])).unwrap();
            assert_eq!((&info["active"], &info["backend"]), (&Value::from(true), &Value::from(backend)));
            for refused in
                [&["fs", "runtimes", "rm", "kept"][..], &["fs", "run", "--rerun", "kept", "--", "true"]]
            {
                let refused = place.kiln(refused);
                assert!(refused.code != 0 && refused.stderr.contains("in use"), "{refused:?}");
            }
            // What ends it, it passes on.
            let pid = rustix::process::Pid::from_child(&running);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            assert_eq!(running.wait().unwrap().code(), Some(128 + 15));
            until("nobody is in the view", || {
                place.ok(&["fs", "runtimes", "ls", "--format", "json"]).contains("\"active\": false")
            });
            assert_eq!(place.ok(&["fs", "diff", "kept"]), "A /one\nA /two");
            assert_eq!(place.ok(&["fs", "runtimes", "rm", "kept"]), "kept");
            assert_eq!(place.views(), "");
            let none = place.kiln(&["fs", "join", "kept", "--", "true"]);
            assert!(none.code == 125 && none.stderr.contains("there is no view `kept`"), "{none:?}");
        }
    }
}

#[test]
fn a_daemon_keeps_its_view_and_who_comes_next_cleans_up() {
    for place in Place::all() {
        for backend in BACKENDS {
            let at = place.at_by(backend);
            let (go, done) = (place.beside("go"), place.beside("done"));
            let script = format!(
                "echo old > {at}/text; (setsid sh -c 'until test -e {}; do sleep 0.05; done; cat {at}/text {at}/etc/group >/dev/null && echo late >> {at}/text && cp {at}/text {}' >/dev/null 2>&1 &)",
                go.display(),
                done.display()
            );
            place.ok(&fs_run(IMAGE, &at, backend, &["-e"], &["sh", "-c", &script]));
            assert_eq!(place.ok(&["fs", "runtimes", "prune"]), "", "{backend}: a daemon is in it");
            assert_eq!(place.views().lines().count(), 1);
            fs::write(&go, "").unwrap();
            until(&format!("{backend}: the daemon is done"), || {
                fs::read_to_string(&done).is_ok_and(|text| text == "old\nlate\n")
            });
            until("nothing is left", || {
                place.ok(&["fs", "runtimes", "prune"]);
                place.views().is_empty()
            });
            fs::remove_file(&go).unwrap();
            fs::remove_file(&done).unwrap();

            // Killed: the view goes on with whoever is in it, and is cleaned up after that.
            let words = ["fs", "run", IMAGE, "-e", "--at", &at, "--backend", backend, "--", "sh", "-c"];
            let script = format!(
                "echo old > {at}/text; touch {}; until test -e {}; do sleep 0.05; done; cp {at}/text {}",
                place.beside("there").display(),
                go.display(),
                done.display()
            );
            let mut running = place.command(&[&words[..], &[&script]].concat()).spawn().unwrap();
            until("the command runs", || place.beside("there").exists());
            running.kill().unwrap();
            running.wait().unwrap();
            assert_eq!(place.ok(&["fs", "runtimes", "prune"]), "", "{backend}: somebody is in it");
            fs::write(&go, "").unwrap();
            until("the command is done", || fs::read_to_string(&done).is_ok_and(|text| text == "old\n"));
            until("nothing is left", || {
                place.ok(&["fs", "runtimes", "prune"]);
                place.views().is_empty()
            });
            for name in ["go", "done", "there"] {
                fs::remove_file(place.beside(name)).unwrap();
            }
        }
    }
}

#[test]
fn a_process_that_runs_already_gets_a_view_by_the_router() {
    for place in Place::all() {
        let at = place.at_by("router");
        fs::create_dir_all(&at).unwrap();
        let stopped = place.kiln(&["fs", "service", "status"]);
        assert!(stopped.code == 1 && stopped.stderr.contains("does not run"), "{stopped:?}");
        let go = place.beside("go");
        let script =
            format!("until test -e {}; do sleep 0.05; done; cat {at}/var/www/index.html", go.display());
        let mut shell = match &place.user {
            Some((user, _)) => user.command(Path::new("/bin/sh")),
            None => Command::new("/bin/sh"),
        };
        let shell = shell.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let pid = shell.id().to_string();
        assert_eq!(place.ok(&["fs", "mount", &pid, IMAGE, "--at", &at, "--name", "shown"]), "shown");
        let again = place.kiln(&["fs", "mount", &pid, IMAGE, "--at", &at]);
        assert!(again.code == 1 && again.stderr.contains(&format!("kiln fs unmount {pid}")), "{again:?}");
        let status: Value =
            serde_json::from_str(&place.ok(&["fs", "service", "status", "--format", "json"])).unwrap();
        assert_eq!(status[0]["name"], "shown");
        assert_eq!(status[0]["processes"][0].to_string(), pid);
        // The service is stopped, and the next shows the same again.
        place.ok(&["fs", "service", "stop"]);
        until("the service has ended", || place.kiln(&["fs", "service", "status"]).code == 1);
        assert_eq!(place.views(), "shown");
        place.ok(&["fs", "service", "start", "--idle", "1"]);
        fs::write(&go, "").unwrap();
        let said = shell.wait_with_output().unwrap().stdout;
        assert_eq!(String::from_utf8_lossy(&said), "hello from kiln\n");
        until("the view is gone with the process", || place.views().is_empty());
        until("the service has ended", || place.kiln(&["fs", "service", "status"]).code == 1);
        let none = place.kiln(&["fs", "unmount", &pid]);
        assert!(none.code != 0 && none.stderr.contains("does not run"), "{none:?}");
    }
}

/// Where a view in a view is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inner {
    /// In a directory that was made in the outer view.
    Within,
    /// In a directory of the host.
    Beside,
    /// Where the outer view is: it hides that.
    Over,
}

/// Why a view of the router cannot be in another one; `None` if it can.
fn refused(outer: &str, inner: &str, position: Inner, service_runs: bool) -> Option<&'static str> {
    match (outer, inner, position) {
        ("router", "router", Inner::Within) => Some("lies in what the router shows"),
        ("router", _, _) | (_, "overlay" | "fuse", _) => None,
        _ if !service_runs => Some("cannot be started in the view"),
        // What the service mounts on the host, the kernel passes on to the view where the host lets it.
        (_, _, Inner::Beside) if mounts_are_passed_on() => None,
        _ => Some("would not see the router's view"),
    }
}

/// Whether the file system that has temporary directories is in a group of mounts that tell each other of new ones (proc(5)).
fn mounts_are_passed_on() -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let temporary = fs::canonicalize(std::env::temp_dir()).unwrap();
    let lines = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let above = lines.filter(|fields| temporary.starts_with(fields[4]));
    above.max_by_key(|fields| fields[4].len()).unwrap()[6].starts_with("shared:")
}

fn is_mounted(at: &str) -> bool {
    fs::read_to_string("/proc/self/mounts").unwrap().contains(&format!(" {at} "))
}

#[test]
fn after_a_service_was_killed_the_next_command_takes_its_mount_away_and_goes_on() {
    for place in Place::all() {
        let at = place.at_by("router");
        fs::create_dir_all(&at).unwrap();
        let (there, go) = (place.beside("there"), place.beside("go"));
        let script = format!(
            "echo 1 > {at}/one; touch {}; until test -e {}; do sleep 0.02; done; cat {at}/one; echo 2 > {at}/two",
            there.display(),
            go.display()
        );
        let flags = ["-e", "--keep", "--name", "v"];
        let mut command = place.command(&fs_run(IMAGE, &at, "router", &flags, &["sh", "-c", &script]));
        let running = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("the command runs", || there.exists());
        let service = || {
            let found = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
                let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
                let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
                let home = format!("KILN_HOME={}", place.home().display()).into_bytes();
                let ours = environment.split(|byte| *byte == 0).any(|variable| variable == home);
                (ours && String::from_utf8_lossy(&words).contains("service\0start")).then_some(pid)
            });
            found.collect::<Vec<i32>>()
        };
        let killed = service();
        assert_eq!(killed.len(), 1);
        let pid = rustix::process::Pid::from_raw(killed[0]).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        until("the service has ended", || service().is_empty());
        // A process has no command line any more a moment before its files are closed.
        until("its mount is dead", || {
            let listed = fs::read_dir(&at).and_then(|mut entries| entries.next().transpose());
            match listed.err().and_then(|error| Errno::from_io_error(&error)) {
                // Who is not allowed in is told that first.
                Some(Errno::NOTCONN | Errno::CONNABORTED | Errno::ACCESS) => true,
                // A service of another home that starts takes away all dead mounts of its user.
                None => !is_mounted(&at),
                other => panic!("{other:?}"),
            }
        });
        // Another view at the same place is the next command.
        let page = format!("{at}/var/www/index.html");
        assert_eq!(place.ok(&fs_run(IMAGE, &at, "router", &[], &["cat", &page])), "hello from kiln");
        // The one whose service was killed is shown again, with what was written.
        fs::write(&go, "").unwrap();
        let ended: common::Ended = running.wait_with_output().unwrap().into();
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "1\n"), "{ended:?}");
        assert_eq!(place.ok(&["fs", "diff", "v"]), "A /one\nA /two");
        place.ok(&["fs", "runtimes", "rm", "v"]);
        assert_eq!(place.views(), "");
        place.ok(&["fs", "service", "stop"]);
        until("no mount is left", || !is_mounted(&at));
        for path in [&go, &there] {
            fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn a_view_may_be_in_a_view() {
    for place in Place::all() {
        for outer in BACKENDS {
            for inner in BACKENDS {
                for position in [Inner::Within, Inner::Beside, Inner::Over] {
                    let running: &[bool] = if inner == "router" { &[false, true] } else { &[false] };
                    for service_runs in running {
                        view_in_view(&place, outer, inner, position, *service_runs);
                    }
                }
            }
        }
    }
}

fn view_in_view(place: &Place, outer: &str, inner: &str, position: Inner, service_runs: bool) {
    let context =
        format!("{inner} in {outer}, {position:?}, service {service_runs}, {:?}", place.user.is_some());
    place.kiln(&["fs", "service", "stop"]);
    if service_runs {
        place.ok(&["fs", "service", "start"]);
    }
    let (at, beside) = (place.beside("outer"), place.beside("inner"));
    for directory in [&at, &beside] {
        fs::create_dir_all(directory).unwrap();
        if let Some((user, _)) = &place.user {
            std::os::unix::fs::chown(directory, Some(user.uid), Some(user.gid)).unwrap();
        }
    }
    let within = match position {
        Inner::Within => at.join("inner"),
        Inner::Beside => beside.clone(),
        Inner::Over => at.clone(),
    };
    let (at, within, kiln) = (at.display().to_string(), within.display(), place.program());
    let in_inner =
        format!("cd {within}; echo inner > deep; cat {at}/text; cat deep var/www/index.html; {kiln} fs diff");
    let script = format!(
        "cd {at}; echo outer > text; mkdir inner
         {kiln} fs run {IMAGE} -e --at {within} --backend {inner} -- sh -c '{in_inner}' 2>&1
         echo ended $?; cd {at}; cat text; ls {within}/deep 2>/dev/null; {kiln} fs diff"
    );
    let ended = place.kiln(&fs_run(IMAGE, &at, outer, &["-e"], &["sh", "-c", &script]));
    assert_eq!(ended.code, 0, "{context}: {ended:?}");
    let (of_inner, of_outer) = ended.stdout.split_once("ended ").unwrap();
    if let Some(why) = refused(outer, inner, position, service_runs) {
        assert!(of_inner.contains(why), "{context}: {ended:?}");
        assert_eq!(of_outer, "125\nouter\nA /inner\nA /text\n", "{context}: {ended:?}");
    } else {
        let above = if position == Inner::Over { "" } else { "outer\n" };
        let told = of_inner.lines().filter(|line| !line.starts_with("cat: ")).collect::<Vec<_>>().join("\n");
        assert_eq!(told, format!("{above}inner\nhello from kiln\nA /deep"), "{context}: {ended:?}");
        assert_eq!(of_outer, "0\nouter\nA /inner\nA /text\n", "{context}: {ended:?}");
    }
    assert_eq!(fs::read_dir(&beside).unwrap().count(), 0, "{context}: what was changed went to the host");
    until(&format!("{context}: nothing is left"), || place.views().is_empty());
}

#[test]
fn exit_codes_of_views_are_the_commands_own_or_say_why_there_is_none() {
    let Some(place) = Place::of_root() else { return };
    let at = place.beside("at").display().to_string();
    let table: [(&[&str], i32); 5] = [
        (&["true"], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["/no/such/program"], 127),
        (&["/etc/passwd"], 126),
    ];
    for (command, code) in table {
        let ended = place.kiln(&[&["fs", "run", IMAGE, "--at", &at, "--"], command].concat());
        assert_eq!(ended.code, code, "{command:?}: {ended:?}");
    }
    let missing = place.kiln(&["fs", "run", "no/such", "--", "true"]);
    assert!(missing.code == 125 && missing.stderr.contains("kiln fs pull no/such"), "{missing:?}");
    let not_editable = format!("{} fs commit", place.program());
    let refused = place.kiln(&["fs", "run", IMAGE, "--at", &at, "--", "sh", "-c", &not_editable]);
    assert!(refused.code == 1 && refused.stderr.contains("--edit"), "{refused:?}");
    let outside = place.kiln(&["fs", "diff"]);
    assert!(outside.code == 2 && outside.stderr.contains("runtimes ls"), "{outside:?}");
    fs::write(place.beside("file"), "").unwrap();
    let file = place.beside("file").display().to_string();
    assert_eq!(place.kiln(&["fs", "run", IMAGE, "--at", &file, "--", "true"]).code, 125);
    for hiding in ["/".to_owned(), place.home().display().to_string()] {
        let refused = place.kiln(&["fs", "run", IMAGE, "--at", &hiding, "--", "true"]);
        assert!(refused.code == 125 && refused.stderr.contains("would hide"), "{refused:?}");
    }
    assert_eq!(place.views(), "", "what fails leaves nothing");
}

#[test]
fn an_image_stays_as_long_as_a_view_has_it() {
    let Some(place) = Place::of_root() else { return };
    let at = place.beside("at").display().to_string();
    place.ok(&["fs", "run", IMAGE, "-e", "--keep", "--name", "kept", "--at", &at, "--", "true"]);
    place.ok(&["system", "prune", "--all"]);
    let cat = format!("{at}/var/www/index.html");
    assert_eq!(place.ok(&["fs", "run", "--rerun", "kept", "--", "cat", &cat]), "hello from kiln");
    place.ok(&["fs", "runtimes", "rm", "kept"]);
    place.ok(&["system", "prune", "--all"]);
    assert_eq!(place.ok(&["images", "-q"]), "");
}
