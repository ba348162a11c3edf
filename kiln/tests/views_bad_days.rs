//! Views on bad days: what is missing, full, busy, killed, and what is said about it.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::place::{Place, fs_run};
use common::{Home, IMAGE, until};
use kiln_contract::Digest;
use kiln_store::Store;
use oci_spec::image::ImageConfiguration;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};

const BACKENDS: [&str; 3] = ["overlay", "fuse", "router"];

/// Makes images until the ids of two begin with the same four digits, and gives these.
fn ambiguous_prefix(home: &Home) -> String {
    let store = Store::open(&kiln_contract::Home::at(home.path())).unwrap();
    let layers = store.resolve(IMAGE).unwrap().layers;
    let mut seen: BTreeMap<String, Digest> = BTreeMap::new();
    for number in 0..2000 {
        let mut config = ImageConfiguration::default();
        config.set_author(Some(number.to_string()));
        let id = store.make_image(&config, &layers).unwrap().id;
        if let Some(other) = seen.insert(id.hex()[..4].to_owned(), id)
            && other != id
        {
            return id.hex()[..4].to_owned();
        }
    }
    panic!("two thousand ids had different first digits");
}

#[test]
fn references_that_name_nothing_or_too_much_are_told_with_what_they_could_be() {
    let Some(place) = Place::of_root() else { return };
    place.ok(&["fs", "tag", IMAGE, "me/tools:1"]);
    let prefix = ambiguous_prefix(&place.root);
    let verbs: [&[&str]; 4] = [&["fs", "ls"], &["fs", "diff", IMAGE], &["fs", "run", "--at"], &["fs", "tag"]];
    for (reference, says) in [
        ("me/tolls:1", vec!["me/tools:1"]),
        ("me/tools:2", vec!["me/tools:1"]),
        ("me/tools:1~1", vec!["1 version", "~1"]),
        ("me/tools:1+me/tolls:1", vec!["me/tools:1"]),
        (prefix.as_str(), vec!["is ambiguous", prefix.as_str()]),
    ] {
        for verb in verbs {
            let at = place.at();
            let mut words = verb.to_vec();
            match verb {
                ["fs", "run", ..] => words.extend([at.as_str(), reference, "--", "true"]),
                ["fs", "tag"] if reference.contains('+') => continue,
                ["fs", "tag"] => words.extend([reference, "me/other"]),
                _ => words.push(reference),
            }
            let ended = place.kiln(&words);
            assert_ne!(ended.code, 0, "{words:?}: {ended:?}");
            for part in &says {
                assert!(ended.stderr.contains(part), "{words:?}: {ended:?}");
            }
        }
    }
    assert_eq!(place.views(), "");
}

/// Where the store has a file of an image.
fn object_of(place: &Place, bytes: &[u8]) -> PathBuf {
    let hex = Digest::of(bytes).hex();
    place.home().join("store/objects").join(&hex[..2]).join(&hex[2..])
}

#[test]
fn a_missing_object_is_an_error_to_who_reads_it_and_named_in_the_log() {
    for place in Place::all() {
        let busybox = place.command(&["fs", "cat", IMAGE, "bin/busybox"]).output().unwrap().stdout;
        let object = object_of(&place, &busybox);
        fs::remove_file(&object).unwrap();
        for backend in BACKENDS {
            let (name, at) = (format!("of-{backend}"), place.at_by(backend));
            let script = format!("cat {at}/bin/busybox | wc -c; cat {at}/bin/busybox >/dev/null");
            let ended = place.kiln(&fs_run(
                IMAGE,
                &at,
                backend,
                &["-e", "--keep", "--name", &name],
                &["sh", "-c", &script],
            ));
            assert_eq!((ended.code, ended.stdout.trim()), (1, "0"), "{backend}: {ended:?}");
            // The rest is there.
            let page = format!("{at}/var/www/index.html");
            assert_eq!(place.ok(&["fs", "run", "--rerun", &name, "--", "cat", &page]), "hello from kiln");
            let log = match backend {
                "fuse" => Some(place.home().join("views").join(&name).join("log")),
                "router" => Some(place.home().join("router/log")),
                _ => None,
            };
            if let Some(log) = log {
                let log = fs::read_to_string(log).unwrap();
                let hex = Digest::of(&busybox).hex();
                assert!(log.contains(&hex[2..]), "{log}");
            }
            place.ok(&["fs", "runtimes", "rm", &name]);
        }
        let check = place.kiln(&["system", "check"]);
        assert!(check.code != 0 && check.stdout.contains(&Digest::of(&busybox).hex()), "{check:?}");
    }
}

#[test]
fn after_a_full_scratch_has_room_again_what_is_there_is_committed() {
    let Some(place) = Place::of_root() else { return };
    let (views, at, kiln) = (place.home().join("views"), place.at(), place.program());
    fs::create_dir_all(&views).unwrap();
    rustix::mount::mount("small", &views, "tmpfs", MountFlags::empty(), Some(c"size=2m")).unwrap();
    let committed: Vec<_> = BACKENDS
        .iter()
        .map(|backend| {
            let script = format!(
                "cd {at}; echo kept > kept; head -c 1500000 /dev/zero > big || exit 2
                 said=$(head -c 1500000 /dev/zero 2>&1 > bigger) && exit 3; echo $said | grep -qi 'no space' || exit 4
                 rm bigger big; echo late > late || exit 5
                 {kiln} fs commit -t of/{backend} >/dev/null || exit 6; echo more > more"
            );
            place.kiln(&fs_run(IMAGE, &at, backend, &["-e"], &["sh", "-c", &script]))
        })
        .collect();
    rustix::mount::unmount(&views, UnmountFlags::DETACH).unwrap();
    for (backend, ended) in BACKENDS.iter().zip(committed) {
        assert_eq!(ended.code, 0, "{backend}: {ended:?}");
        let diff = place.ok(&["fs", "diff", IMAGE, &format!("of/{backend}")]);
        assert_eq!(diff, "A /kept\nA /late", "{backend}");
        assert_eq!(place.ok(&["fs", "cat", &format!("of/{backend}"), "late"]), "late");
    }
}

#[test]
fn a_mount_point_may_be_full_or_in_use_and_is_as_it_was_afterwards() {
    for place in Place::all() {
        for backend in BACKENDS {
            let at = place.beside(&format!("at-{backend}"));
            let (shown, kiln) = (at.display().to_string(), place.program());
            let run = |command: &str| {
                let words = fs_run(IMAGE, &shown, backend, &["-e"], &["sh", "-ec", command]);
                place.kiln(&words)
            };
            // Missing: made for root; others are asked for one that is there.
            let missing = format!("{shown}/none/of/these");
            let script = format!("cat {missing}/var/www/index.html");
            let ended = place.kiln(&fs_run(IMAGE, &missing, backend, &[], &["sh", "-c", &script]));
            if place.user.is_some() {
                assert!(ended.code == 125 && ended.stderr.contains("--at"), "{backend}: {ended:?}");
                assert!(ended.stderr.contains(&missing) && !at.exists(), "{backend}: {ended:?}");
            } else {
                assert_eq!(ended.stdout, "hello from kiln\n", "{backend}: {ended:?}");
                assert_eq!(fs::read_dir(&missing).unwrap().count(), 0);
                fs::remove_dir_all(&at).unwrap();
            }
            fs::create_dir(&at).unwrap();
            fs::write(at.join("own"), "own").unwrap();
            if let Some((user, _)) = &place.user {
                for path in [at.clone(), at.join("own")] {
                    std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).unwrap();
                }
            }
            // Not empty, and somebody works in it.
            let mut inside = std::process::Command::new("sleep").arg("60").current_dir(&at).spawn().unwrap();
            let ended = run(&format!("test ! -e {shown}/own; echo new > {shown}/own; cat {shown}/own"));
            assert_eq!((ended.code, ended.stdout.as_str()), (0, "new\n"), "{backend}: {ended:?}");
            assert_eq!(fs::read_to_string(at.join("own")).unwrap(), "own");
            // A view is there already: the inner one is seen in it, and then the outer one again.
            let inner = format!(
                "echo outer > {shown}/text; {kiln} fs run {IMAGE} --at {shown} --backend {backend} -- sh -c 'test ! -e {shown}/text && echo inner'; cat {shown}/text"
            );
            let ended = run(&inner);
            assert_eq!((ended.code, ended.stdout.as_str()), (0, "inner\nouter\n"), "{backend}: {ended:?}");
            inside.kill().unwrap();
            inside.wait().unwrap();
            assert_eq!(fs::read_dir(&at).unwrap().count(), 1);
            fs::remove_dir_all(&at).unwrap();
        }
        assert_eq!(place.views(), "");
    }
}

/// The servers of the views of a home: they are copies of the process that made them, environment and all.
fn servers(home: &Path) -> Vec<Pid> {
    let home = format!("KILN_HOME={}\0", home.display());
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        read("comm") == b"kiln-view\n"
            && read("environ").windows(home.len()).any(|part| part == home.as_bytes())
    })
    .filter_map(Pid::from_raw)
    .collect()
}

#[test]
fn a_view_whose_server_was_killed_ends_and_goes_on_when_it_is_entered_again() {
    for place in Place::all() {
        let (at, go) = (place.at(), place.beside("go"));
        let script = format!(
            "cd {at}; echo 1 > one; sync one; touch {0}.there; until test -e {0}; do sleep 0.05; done
             cat {at}/one 2>&1; echo 2 > {at}/two",
            go.display()
        );
        let words = fs_run(IMAGE, &at, "fuse", &["-e", "--keep", "--name", "v"], &["sh", "-c", &script]);
        let mut command = place.command(&words);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let running = command.spawn().unwrap();
        let there = PathBuf::from(format!("{}.there", go.display()));
        until("the command runs", || there.exists());
        let all = servers(&place.home());
        assert_eq!(all.len(), 1);
        kill_process(all[0], Signal::KILL).unwrap();
        fs::write(&go, "").unwrap();
        let ended: common::Ended = running.wait_with_output().unwrap().into();
        assert!(ended.code != 0 && ended.stdout.contains("not connected"), "{ended:?}");
        // No mount is left, and nothing that was written before is lost.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(&format!(" {at} ")), "{mounts}");
        assert_eq!(place.ok(&["fs", "diff", "v"]), "A /one");
        let script = format!("cat {at}/one; echo 3 > {at}/three");
        assert_eq!(place.ok(&["fs", "run", "--rerun", "v", "--", "sh", "-c", &script]), "1");
        place.ok(&["fs", "commit", "v", "-t", "after"]);
        assert_eq!(place.ok(&["fs", "diff", IMAGE, "after"]), "A /one\nA /three");
        place.ok(&["fs", "runtimes", "rm", "v"]);
        assert_eq!(place.views(), "");
        for path in [&go, &there] {
            fs::remove_file(path).unwrap();
        }
    }
}

/// A command of an ordinary user's where nobody may make a user namespace: in one in which the kernel's limit is 0, and so the
/// host's stays what it is.
fn where_namespaces_are_forbidden(place: &Place, words: &[&str]) -> common::Ended {
    let (user, directory) = place.user.as_ref().unwrap();
    let command = place.command(words);
    // Set-user-ID programs, such as fusermount3, are what they are outside: the numbers of users are the same.
    let script = r#"echo 0 > /proc/sys/user/max_user_namespaces && ! unshare --user true 2>/dev/null && \
                    exec setpriv --reuid="$0" --regid="$0" --clear-groups -- "$@""#;
    let mut child = Command::new("unshare")
        .args(["--user", "--mount", "--propagation", "private", "sh", "-c", "read go; exec \"$@\"", "sh"])
        .args(["sh", "-c", script, &user.uid.to_string()])
        .arg(command.get_program())
        .args(words)
        .env_clear()
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    let there = || fs::read_link(format!("/proc/{}/ns/user", child.id())).is_ok_and(|other| other != own);
    until("there is a namespace", there);
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", child.id()), "0 0 65536\n").unwrap();
    }
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    child.wait_with_output().unwrap().into()
}

#[test]
fn where_user_namespaces_are_forbidden_views_are_shown_by_fuse_and_the_overlay_says_why_not() {
    let Some(place) = Place::of_user() else { return };
    let (at, kiln) = (place.at_by("router"), place.program());
    let doctor = where_namespaces_are_forbidden(&place, &["system", "doctor"]);
    assert!(doctor.stdout.contains("user.max_user_namespaces is 0"), "{doctor:?}");
    for (backend, reached) in [("auto", "fuse"), ("fuse", "fuse"), ("router", "router")] {
        let script = format!(
            "set -e; cd {at}; cat var/www/index.html; echo new > new; rm -r etc; mv home moved; cat new
             {kiln} fs diff; {kiln} fs info | grep -o '\"backend\": \"[a-z]*\"'; {kiln} fs commit -t of/{backend} >/dev/null"
        );
        let words = fs_run(IMAGE, &at, backend, &["-e"], &["sh", "-c", &script]);
        let ended = where_namespaces_are_forbidden(&place, &words);
        let wanted = format!(
            "hello from kiln\nnew\nD /etc\nD /home\nA /moved\nA /moved/app\nA /new\n\"backend\": \"{reached}\"\n"
        );
        assert_eq!((ended.code, ended.stdout.as_str()), (0, wanted.as_str()), "{backend}: {ended:?}");
        let told = ended.stderr.contains("all your processes see the view");
        assert_eq!(told, backend != "router", "{backend}: {ended:?}");
        assert_eq!(place.ok(&["fs", "cat", &format!("of/{backend}"), "new"]), "new");
        assert_eq!(place.views(), "", "{backend}");
    }
    // Nor may the directory be added that is missing.
    for backend in ["auto", "fuse"] {
        let ended = where_namespaces_are_forbidden(&place, &fs_run(IMAGE, "/kiln", backend, &[], &["true"]));
        assert!(ended.code == 125 && ended.stderr.contains("--at"), "{backend}: {ended:?}");
    }
    let ended = where_namespaces_are_forbidden(&place, &fs_run(IMAGE, &at, "overlay", &[], &["true"]));
    assert_eq!(ended.code, 125, "{ended:?}");
    for part in ["cannot make a user namespace", "kiln system doctor", "--backend fuse"] {
        assert!(ended.stderr.contains(part), "{part}: {ended:?}");
    }
    assert_eq!(place.views(), "");
}
