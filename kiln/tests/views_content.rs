//! What views are made of besides images: files that list them, live layers, start-up scripts, annotations.

mod common;

use std::fs;
use std::path::Path;

use common::IMAGE;
use common::place::{Place, fs_run};

const BACKENDS: [&str; 2] = ["overlay", "fuse"];

/// Writes a file beside the home, as the user whose it is, and gives its path.
fn write(place: &Place, name: &str, text: &str) -> String {
    let path = place.beside(name);
    let owner = |path: &Path| {
        if let Some((user, _)) = &place.user {
            std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).unwrap();
        }
    };
    let parent = path.parent().unwrap();
    if !parent.exists() {
        fs::create_dir_all(parent).unwrap();
        owner(parent);
    }
    fs::write(&path, text).unwrap();
    owner(&path);
    path.to_str().unwrap().to_owned()
}

/// Makes an image of one file.
fn image(place: &Place, name: &str, path: &str, text: &str) {
    let file = write(place, "content", text);
    place.ok(&["fs", "write", name, path, "--file", &file]);
}

#[test]
fn a_file_lists_what_is_to_be_seen() {
    let Some(place) = Place::of_root() else { return };
    image(&place, "me/one", "one", "1");
    image(&place, "me/two", "one", "2");
    write(&place, "specs/inner.yaml", "api: kiln/v1/stack\nrefs: [me/two]\n");
    let outer = write(
        &place,
        "specs/outer.yaml",
        &format!("api: kiln/v1/stack\nrefs:\n  - {IMAGE}+me/one\n  - ./inner.yaml\n"),
    );
    let at = place.at();
    let script = format!("cat {at}/one {at}/var/www/index.html");
    assert_eq!(place.ok(&["fs", "run", &outer, "--at", &at, "--", "sh", "-c", &script]), "2hello from kiln");
    assert_eq!(place.ok(&["fs", "read", &format!("{outer}+me/one"), "one"]), "2", "it is there already");
    assert_eq!(place.ok(&["fs", "diff", IMAGE, &outer]), "A /one");
    let circle = write(&place, "specs/circle.yaml", "api: kiln/v1/stack\nrefs: [./circle.yaml]\n");
    for (reference, why) in [
        (circle.as_str(), "in a circle"),
        ("./none.yaml", "cannot read ./none.yaml"),
        (&write(&place, "specs/near.yaml", "api: kiln/v1/stack\nrefs: [me/tow]\n"), "me/two:latest"),
        (
            &write(&place, "specs/far.yaml", "api: kiln/v1/stack\nrefs: [other/thing]\n"),
            "kiln fs pull other/thing",
        ),
        (&write(&place, "specs/other.yaml", "services: {}\n"), "other.yaml: "),
    ] {
        let refused = place.kiln(&["fs", "run", reference, "--at", &at, "--", "true"]);
        assert!(refused.code == 125 && refused.stderr.contains(why), "{refused:?}");
    }
    assert_eq!(place.views(), "");
}

#[test]
fn a_live_layer_shows_files_of_the_host_in_a_view() {
    for place in Place::all() {
        for backend in BACKENDS {
            write(&place, "tree/src/main.c", "int main;");
            write(&place, "tree/passwd", "live");
            let live = write(
                &place,
                "tree/live.yaml",
                "api: kiln/v1/live\ncontents:\n  - {bind: src, dest: work/src}\n  - {bind: passwd, dest: etc/passwd}\n",
            );
            let at = place.at();
            // It is the host's file that is written to, and no change of the view; the one below can be committed.
            let script = format!(
                "set -e; cat {at}/work/src/main.c {at}/etc/passwd; echo; echo more > {at}/work/src/new; echo x > {at}/work/x
                 {} fs diff; {} fs commit -t me/live-{backend} >/dev/null",
                place.program(),
                place.program(),
            );
            let reference = format!("{IMAGE}+{live}");
            let words =
                ["fs", "run", &reference, "-e", "--at", &at, "--backend", backend, "--", "sh", "-c", &script];
            assert_eq!(place.ok(&words), "int main;live\nC /work\nA /work/x", "{backend}");
            assert_eq!(fs::read_to_string(place.beside("tree/src/new")).unwrap(), "more\n");
            let listed = place.ok(&["fs", "diff", IMAGE, &format!("me/live-{backend}")]);
            assert_eq!(listed, "A /work\nA /work/x", "{backend}");
            // Read-only views have it too, and a kept one finds it again.
            let show = format!("cat {at}/work/src/new");
            let words = fs_run(&reference, &at, backend, &["--keep", "--name", "kept"], &[]);
            place.ok(&[&words[..], &["true"]].concat());
            assert_eq!(place.ok(&["fs", "run", "--rerun", "kept", "--", "sh", "-c", &show]), "more");
            let info = place.json(&["fs", "info", "kept"]);
            assert_eq!(info["binds"][0]["dest"], "work/src");
            place.ok(&["system", "prune"]);
            assert_eq!(place.ok(&["fs", "run", "--rerun", "kept", "--", "sh", "-c", &show]), "more");
            fs::remove_file(place.beside("tree/passwd")).unwrap();
            let refused = place.kiln(&["fs", "run", "--rerun", "kept", "--", "true"]);
            assert!(refused.code == 125 && refused.stderr.contains("tree/passwd"), "{refused:?}");
            place.ok(&["fs", "runtimes", "rm", "kept"]);
            fs::remove_file(place.beside("tree/src/new")).unwrap();
        }
        let wrong = write(
            &place,
            "tree/wrong.yaml",
            "api: kiln/v1/live\ncontents: [{bind: src, dest: etc/passwd}]\n",
        );
        let at = place.at();
        let refused = place.kiln(&["fs", "run", &format!("{IMAGE}+{wrong}"), "--at", &at, "--", "true"]);
        assert!(refused.code == 125 && refused.stderr.contains("over a directory only"), "{refused:?}");
        let alone = place.kiln(&["fs", "run", &wrong, "--at", &at, "--", "true"]);
        assert!(alone.code == 125 && alone.stderr.contains("names no image"), "{alone:?}");
        assert_eq!(place.views(), "");
    }
}

#[test]
fn start_up_scripts_set_the_environment_of_the_command_in_their_order() {
    for place in Place::all() {
        image(
            &place,
            "me/ten",
            "etc/kiln/startup.d/10-first.sh",
            "export A=ten; B=unseen; set -- other words; false",
        );
        image(&place, "me/twenty", "etc/kiln/startup.d/20-second.sh", "export A=$A-twenty");
        image(&place, "me/text", "etc/kiln/startup.d/README", "exit 1");
        let at = place.at();
        let reference = format!("{IMAGE}+me/twenty+me/ten+me/text");
        let show = ["sh", "-c", "echo $A,$B,$KILN_VIEW,$#,$1", "sh", "a b"];
        // All processes see the router's directory: it must be there, and an ordinary user's must be his.
        let routed = write(&place, "routed/.keep", "");
        let routed = routed.trim_end_matches("/.keep");
        for (backend, at) in [("overlay", at.as_str()), ("fuse", &at), ("router", routed)] {
            let words = ["fs", "run", &reference, "--name", "v", "--at", at, "--backend", backend, "--"];
            assert_eq!(place.ok(&[&words[..], &show].concat()), "ten-twenty,,v,1,a b", "{backend}");
            let ended = place.kiln(&[&words[..], &["sh", "-c", "exit 7"]].concat());
            assert_eq!(ended.code, 7, "{ended:?}");
            let ended = place.kiln(&[&words[..], &["/no/such/program"]].concat());
            assert_eq!(ended.code, 127, "{ended:?}");
        }
        // Also those that were made in the view.
        let make = format!("echo export A=made > {at}/etc/kiln/startup.d/30.sh");
        place.ok(&[
            "fs", "run", &reference, "-e", "--keep", "--name", "k", "--at", &at, "--", "sh", "-c", &make,
        ]);
        assert_eq!(place.ok(&["fs", "run", "--rerun", "k", "--", "sh", "-c", "echo $A"]), "made");
        place.ok(&["fs", "runtimes", "rm", "k"]);
        for (name, text) in [("exit", "exit 0"), ("syntax", "if then"), ("set", "set -e; false")] {
            image(&place, "me/bad", &format!("etc/kiln/startup.d/30-{name}.sh"), text);
            let reference = format!("{reference}+me/bad");
            let ended = place.kiln(&["fs", "run", &reference, "--at", &at, "--", "echo", "ran"]);
            assert!(ended.code == 125 && ended.stdout.is_empty(), "{name}: {ended:?}");
            assert!(ended.stderr.contains(&format!("30-{name}.sh has ended the shell")), "{ended:?}");
        }
        assert_eq!(place.views(), "");
    }
}

#[test]
fn annotations_are_remembered_and_told() {
    let Some(place) = Place::of_root() else { return };
    let at = place.at();
    let words = ["fs", "run", IMAGE, "--keep", "--name", "noted", "--at", &at];
    let notes = ["--annotation", "ticket=42", "--annotation", "why=a=b", "--", "true"];
    place.ok(&[&words[..], &notes].concat());
    let info = place.json(&["fs", "info", "noted"]);
    assert_eq!(info["annotations"], serde_json::json!({"ticket": "42", "why": "a=b"}));
    assert_eq!(place.kiln(&["fs", "run", IMAGE, "--annotation", "none", "--", "true"]).code, 2);
    // What is no view is looked for among images.
    let named = place.json(&["fs", "info", IMAGE]);
    assert_eq!(named["names"], serde_json::json!([IMAGE]));
    assert_eq!(named["layers"].as_array().unwrap().len(), 1);
    let near = place.kiln(&["fs", "info", "notde"]);
    assert!(near.code == 1 && near.stderr.contains("did you mean `noted`?"), "{near:?}");
}
