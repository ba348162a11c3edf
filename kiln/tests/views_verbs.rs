//! Verbs of `kiln fs` in their less usual forms, and images named by their digests.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;

use common::IMAGE;
use common::place::{Place, fs_run};
use kiln_contract::Digest;
use kiln_store::Store;
use oci_spec::image::ImageConfiguration;

const BACKENDS: [&str; 3] = ["overlay", "fuse", "router"];

/// A directory of whoever it is, which the router can mount at, too.
fn own_directory(place: &Place, name: &str) -> String {
    let directory = place.beside(name);
    fs::create_dir_all(&directory).unwrap();
    if let Some((user, _)) = &place.user {
        std::os::unix::fs::chown(&directory, Some(user.uid), Some(user.gid)).unwrap();
    }
    directory.display().to_string()
}

#[test]
fn a_shell_reads_what_it_is_given() {
    for place in Place::all() {
        let at = own_directory(&place, "at");
        let script = place.beside("script");
        fs::write(
            &script,
            format!("cd {at}\ncat var/www/index.html\necho new > new\necho $KILN_VIEW\nexit 3\n"),
        )
        .unwrap();
        for backend in BACKENDS {
            let words = ["fs", "shell", IMAGE, "-e", "--name", "v", "--at", &at, "--backend", backend];
            let mut command = place.command(&words);
            command.env("SHELL", "/bin/sh").stdin(Stdio::from(fs::File::open(&script).unwrap()));
            let ended = common::finish(command);
            assert_eq!(
                (ended.code, ended.stdout.as_str()),
                (3, "hello from kiln\nv\n"),
                "{backend}: {ended:?}"
            );
            assert_eq!(place.views(), "", "{backend}");
        }
    }
}

#[test]
fn kept_views_are_told_of_and_go_only_with_all() {
    for place in Place::all() {
        let at = own_directory(&place, "at");
        for backend in BACKENDS {
            let flags = ["-e", "--keep", "--name", "kept"];
            let change = format!("echo new > {at}/new");
            place.ok(&fs_run(IMAGE, &at, backend, &flags, &["sh", "-c", &change]));
            let told = place.json(&["fs", "runtimes", "info", "kept"]);
            assert_eq!(told, place.json(&["fs", "info", "kept"]), "{backend}");
            for (key, value) in [("name", "kept"), ("backend", backend), ("reference", IMAGE)] {
                assert_eq!(told[key], value, "{backend}: {told}");
            }
            assert_eq!((&told["active"], &told["keep"]), (&false.into(), &true.into()), "{backend}: {told}");
            assert_eq!(place.ok(&["fs", "runtimes", "prune"]), "", "{backend}");
            assert_eq!(place.ok(&["fs", "diff", "kept"]), "A /new", "{backend}");
            assert_eq!(place.ok(&["fs", "runtimes", "prune", "-a"]), "kept", "{backend}");
            assert_eq!(place.views(), "", "{backend}");
            let gone = place.kiln(&["fs", "runtimes", "info", "kept"]);
            assert!(gone.code == 1 && gone.stderr.contains("kept"), "{backend}: {gone:?}");
        }
    }
}

#[test]
fn an_image_of_a_view_has_all_layers_and_one_of_its_layer_has_that() {
    let Some(place) = Place::of_root() else { return };
    let at = own_directory(&place, "at");
    for backend in BACKENDS {
        let script = format!(
            "echo {backend} > {at}/new; {0} fs commit --image -t me/whole; {0} fs commit --layer -t me/layer",
            place.program()
        );
        place.ok(&fs_run(IMAGE, &at, backend, &["-e"], &["sh", "-ec", &script]));
        let layers = |name: &str| {
            place.ok(&["fs", "layers", name, "-q"]).lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let (base, whole, alone) = (layers(IMAGE), layers("me/whole"), layers("me/layer"));
        assert_eq!(whole, [&base[..], &alone].concat(), "{backend}");
        assert_eq!(alone.len(), 1, "{backend}");
        assert_eq!(place.ok(&["fs", "cat", "me/whole", "new"]), backend);
    }
    let both = place.kiln(&["fs", "commit", "v", "--image", "--layer"]);
    assert_eq!(both.code, 2, "{both:?}");
}

#[test]
fn digits_that_begin_one_digest_name_its_image_and_of_two_both_are_told() {
    let Some(place) = Place::of_root() else { return };
    let store = Store::open(&kiln_contract::Home::at(place.home())).unwrap();
    let layers = store.resolve(IMAGE).unwrap().layers;
    let mut seen: BTreeMap<String, Digest> = BTreeMap::new();
    // By chance, some hundred ids are enough for two that begin alike.
    let (one, other) = (0..5000)
        .find_map(|number| {
            let mut config = ImageConfiguration::default();
            config.set_author(Some(number.to_string()));
            let id = store.make_image(&config, &layers).unwrap().id;
            let before = seen.insert(id.hex()[..4].to_owned(), id)?;
            (before != id).then_some((before, id))
        })
        .unwrap();
    let at = own_directory(&place, "at");
    let differ = one.hex().bytes().zip(other.hex().bytes()).take_while(|(a, b)| a == b).count();
    let show = format!("{at}/var/www/index.html");
    for verb in [&["fs", "ls"][..], &["fs", "run", "--at", &at]] {
        let command: &[&str] = if verb[1] == "run" { &["--", "cat", &show] } else { &["var/www"] };
        let ended = place.kiln(&[verb, &[&one.hex()[..4]], command].concat());
        assert_ne!(ended.code, 0, "{ended:?}");
        for candidate in [one, other] {
            assert!(ended.stderr.contains(&candidate.hex()[..12]), "{candidate}: {ended:?}");
        }
        for (id, prefix) in [(one, differ + 1), (other, differ + 1), (one, 64)] {
            let said = place.ok(&[verb, &[&id.hex()[..prefix.max(12)]], command].concat());
            assert!(said.contains(if verb[1] == "run" { "hello from kiln" } else { "index.html" }), "{said}");
        }
        place.ok(&[verb, &[&one.to_string()], command].concat());
    }
}
