//! Views are changed while programs go on in them: made editable, set back, given another stack; and taken away after the last.

mod common;

use std::fs;
use std::process::Stdio;

use common::place::Place;
use common::{IMAGE, until};

const BACKENDS: [&str; 3] = ["overlay", "fuse", "router"];

/// Makes an image of one file.
fn image(place: &Place, name: &str, path: &str, text: &str) {
    let file = place.beside("content");
    fs::write(&file, text).unwrap();
    place.ok(&["fs", "write", name, path, "--file", file.to_str().unwrap()]);
}

/// Runs a script in a view; `$K` is Kiln, `$V` where the view is.
fn script(place: &Place, backend: &str, options: &[&str], text: &str) -> common::Ended {
    let at = place.at_by(backend);
    let text = format!("set -e; K={}; V={at}; {text}", place.program());
    let words =
        [&["fs", "run", IMAGE, "--at", &at, "--backend", backend], options, &["--", "sh", "-c", &text]];
    place.kiln(&words.concat())
}

#[test]
fn another_stack_is_shown_while_files_are_open_and_changes_are_not_committed() {
    for place in Place::all() {
        image(&place, "me/two", "two", "second");
        image(&place, "me/three", "etc/group", "third");
        for backend in BACKENDS {
            let ended = script(
                &place,
                backend,
                &["-e"],
                "echo edit > $V/edit; rm $V/etc/passwd; exec 3< $V/var/www/index.html 4>> $V/edit
                 $K fs add me/two
                 cat $V/two; echo; cat $V/edit
                 echo late >&4; cat $V/edit; cat <&3
                 $K fs add me/three; cat $V/etc/group; echo; echo more >> $V/edit; cat $V/edit $V/two; echo
                 $K fs diff; $K fs commit -t me/all > /dev/null
                 $K fs switch me/two; cat $V/two; echo; test ! -e $V/etc/group; cat $V/edit
                 exec 3<&- 4>&-",
            );
            assert_eq!(
                (ended.code, ended.stdout.as_str()),
                (
                    0,
                    "second\nedit\nedit\nlate\nhello from kiln\nthird\nedit\nlate\nmore\nsecond\nA /edit\nC /etc\nD /etc/passwd\nsecond\nedit\nlate\nmore\n"
                ),
                "{backend}: {ended:?}"
            );
            assert_eq!(place.views(), "", "{backend}");
            assert_eq!(place.ok(&["fs", "read", "me/all", "edit"]), "edit\nlate\nmore");
            assert_eq!(place.ok(&["fs", "read", "me/all", "etc/group"]), "third");
            assert_eq!(place.kiln(&["fs", "read", "me/all", "etc/passwd"]).code, 1);
        }
    }
}

#[test]
fn a_view_becomes_editable_and_read_only_while_programs_are_in_it() {
    for place in Place::all() {
        for backend in BACKENDS {
            let ended = script(
                &place,
                backend,
                &[],
                "exec 3< $V/etc/group
                 touch $V/x 2>/dev/null && exit 1; $K fs edit; touch $V/x; $K fs diff
                 $K fs edit --off; touch $V/y 2>/dev/null && exit 2; test -e $V/x
                 $K fs edit; exec 4> $V/y; $K fs edit --off 2>&1 | grep -c 'open for writing'; exec 4>&-
                 $K fs edit --off; $K fs commit -t me/edited > /dev/null
                 head -c 4 <&3; exec 3<&-",
            );
            assert_eq!((ended.code, ended.stdout.as_str()), (0, "A /x\n1\nroot"), "{backend}: {ended:?}");
            assert_eq!(place.ok(&["fs", "diff", IMAGE, "me/edited"]), "A /x\nA /y");
        }
        let never = script(&place, "overlay", &[], "$K fs reset");
        assert!(never.code != 0 && never.stderr.contains("never editable"), "{never:?}");
        assert_eq!(place.views(), "");
    }
}

#[test]
fn what_was_changed_is_taken_back_whole_or_by_path() {
    for place in Place::all() {
        for backend in BACKENDS {
            let ended = script(
                &place,
                backend,
                &["-e"],
                "echo x >> $V/etc/group; rm $V/etc/passwd; mkdir $V/new; echo n > $V/new/file; rm -r $V/var
                 exec 3< $V/new/file
                 $K fs reset $V/etc/passwd /new; $K fs diff; read text <&3; echo $text
                 cd $V/etc; $K fs reset group; cd /; $K fs diff
                 $K fs reset /var/www/index.html 2>&1 | grep -c '/var. was removed'
                 $K fs reset; $K fs diff; cat $V/var/www/index.html; echo again > $V/again; $K fs diff",
            );
            assert_eq!(
                (ended.code, ended.stdout.as_str()),
                (0, "C /etc\nC /etc/group\nD /var\nn\nC /etc\nD /var\n1\nhello from kiln\nA /again\n"),
                "{backend}: {ended:?}"
            );
        }
        // Also where nobody is.
        let kept = ["-e", "--keep", "--name", "kept"];
        let ended = script(&place, "fuse", &kept, "echo 1 > $V/one; echo 2 > $V/two");
        assert_eq!(ended.code, 0, "{ended:?}");
        place.ok(&["fs", "reset", "--view", "kept", "/one"]);
        assert_eq!(place.ok(&["fs", "diff", "kept"]), "A /two");
        image(&place, "me/three", "three", "3");
        place.ok(&["fs", "add", "--view", "kept", "me/three"]);
        let (two, three) = (format!("{}/two", place.at()), format!("{}/three", place.at()));
        assert_eq!(place.ok(&["fs", "run", "--rerun", "kept", "--", "cat", &two, &three]), "2\n3");
        place.ok(&["fs", "runtimes", "rm", "kept"]);
    }
}

#[test]
fn a_view_goes_by_itself_after_its_last_process_also_when_its_maker_was_killed() {
    for place in Place::all() {
        for backend in BACKENDS {
            for options in [&["-e"][..], &["-e", "--keep", "--name", "kept"]] {
                let (there, go) = (place.beside("there"), place.beside("go"));
                let at = place.at_by(backend);
                let text = format!(
                    "touch {}; until test -e {}; do sleep 0.02; done; echo done > {at}/done",
                    there.display(),
                    go.display()
                );
                let words = [&["fs", "run", IMAGE, "--at", &at, "--backend", backend], options];
                let mut command = place.command(&[&words.concat()[..], &["--", "sh", "-c", &text]].concat());
                let mut running = command.stdout(Stdio::null()).spawn().unwrap();
                until("the command runs", || there.exists());
                running.kill().unwrap();
                running.wait().unwrap();
                let name = place.views();
                let record = place.home().join("views").join(&name).join("view.json");
                assert!(record.exists(), "{backend}: somebody is in it");
                fs::write(&go, "").unwrap();
                // Nobody asks for anything meanwhile: only files are looked at.
                if options.contains(&"--keep") {
                    until("nobody is in it", || {
                        let record = fs::read_to_string(&record).unwrap();
                        !record.contains("namespace") && !record.contains("shown_to")
                    });
                    assert_eq!(place.ok(&["fs", "diff", "kept"]), "A /done");
                    place.ok(&["fs", "runtimes", "rm", "kept"]);
                } else {
                    until("it has gone", || !record.parent().unwrap().exists());
                }
                fs::remove_file(&there).unwrap();
                fs::remove_file(&go).unwrap();
            }
        }
    }
}

#[test]
fn what_a_boot_left_is_nobodys_although_a_namespace_has_the_same_number() {
    let Some(place) = Place::of_root() else { return };
    let at = place.at();
    place.ok(&["fs", "run", IMAGE, "-e", "--keep", "--name", "old", "--at", &at, "--", "true"]);
    let path = place.home().join("views/old/view.json");
    let mut record: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let namespace = std::os::unix::fs::MetadataExt::ino(&fs::metadata("/proc/self/ns/mnt").unwrap());
    record["namespace"] = namespace.into();
    record["boot"] = "another".into();
    record["keep"] = false.into();
    fs::write(&path, record.to_string()).unwrap();
    let refused = place.kiln(&["fs", "join", "old", "--", "true"]);
    assert!(refused.code == 125 && refused.stderr.contains("nobody is in"), "{refused:?}");
    assert_eq!(place.ok(&["fs", "runtimes", "prune"]), "old");
}

#[test]
fn who_looks_at_a_view_or_is_about_to_leave_it_is_waited_for() {
    let Some(place) = Place::of_root() else { return };
    let at = place.at();
    let make = ["fs", "run", IMAGE, "-e", "--keep", "--name", "kept", "--at", &at, "--", "true"];
    let states = |place: &Place| place.ok(&["fs", "runtimes", "ls"]).matches("active").count();
    type Lock = fn(&fs::File) -> std::io::Result<()>;
    for (lock, active) in [(fs::File::lock_shared as Lock, 0), (fs::File::lock as Lock, 1)] {
        for take in [&["fs", "run", "--rerun", "kept", "--", "true"][..], &["fs", "runtimes", "rm", "kept"]] {
            if take.contains(&"--rerun") {
                place.ok(&make);
            }
            let held = fs::File::open(place.home().join("views/kept/lock")).unwrap();
            lock(&held).unwrap();
            assert_eq!(states(&place), active, "only who looks is not seen by others who do");
            let letting_go = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(200));
                drop(held);
            });
            place.ok(take);
            letting_go.join().unwrap();
        }
        assert_eq!(place.views(), "");
    }
}
