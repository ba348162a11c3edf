//! The verbs of `kiln fs` that need no view: files, names, layers and what becomes of them.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::place::Place;
use common::{Home, IMAGE};
use kiln_fixtures::{RegistryOptions, RegistryServer};

/// Runs a command that reads a text.
fn with_input(place: &Place, words: &[&str], text: &str) -> common::Ended {
    let input = place.beside("input");
    fs::write(&input, text).unwrap();
    let mut command = place.command(words);
    command.stdin(Stdio::from(fs::File::open(&input).unwrap()));
    common::finish(command)
}

#[test]
fn a_file_is_written_read_and_laid_over_an_image() {
    let Some(place) = Place::of_root() else { return };
    let written =
        with_input(&place, &["fs", "write", "me/settings:1", "/etc/app.conf", "--mode", "600"], "level=3\n");
    assert_eq!(written.code, 0, "{written:?}");
    assert_eq!(place.ok(&["fs", "read", "me/settings:1"]), "level=3");
    assert_eq!(place.ok(&["fs", "cat", &format!("{IMAGE}+me/settings:1"), "etc/app.conf"]), "level=3");
    // The rest of the image is what it was.
    assert_eq!(
        place.ok(&["fs", "cat", &format!("{IMAGE}+me/settings:1"), "var/www/index.html"]),
        "hello from kiln"
    );
    let rows = place.json(&["fs", "ls", "me/settings:1", "etc", "--format", "json"]);
    assert_eq!((&rows[0]["mode"], &rows[0]["uid"]), (&"0600".into(), &0.into()));
    // Equal bytes are an equal layer; a large one is not held in memory, and comes out as it went in.
    let layer = |name: &str| place.ok(&["fs", "layers", name, "-q"]);
    with_input(&place, &["fs", "write", "me/again", "etc/app.conf", "--mode", "0600"], "level=3\n");
    assert_eq!(layer("me/again"), layer("me/settings:1"));
    let large = "0123456789abcdef".repeat(200_001);
    assert_eq!(with_input(&place, &["fs", "write", "me/large"], &large).code, 0);
    assert_eq!(place.ok(&["fs", "read", "me/large", "blob"]), large);
    assert_eq!(with_input(&place, &["fs", "write", "me/none"], "").code, 0);
    assert_eq!(place.ok(&["fs", "read", "me/none"]), "");
    let several = place.kiln(&["fs", "read", IMAGE]);
    assert!(several.code == 2 && several.stderr.contains(&format!("kiln fs ls {IMAGE}")), "{several:?}");
    for (words, why) in [
        (&["fs", "write", "me/x", "../x"][..], "lead out"),
        (&["fs", "write", "me/x", "/"], "no name"),
        (&["fs", "write", "me/x", "x", "--mode", "9"], "octal"),
        (&["fs", "write", "ME", "x"], "lower case"),
        (&["fs", "write", "me/x", "x", "--file", "/no/such"], "/no/such"),
    ] {
        let refused = with_input(&place, words, "text");
        assert!(refused.code != 0 && refused.stderr.contains(why), "{refused:?}");
    }
    assert_eq!(place.kiln(&["fs", "read", "me/x"]).code, 1, "nothing is left of what failed");
}

#[test]
fn a_render_is_a_plain_directory_with_all_files() {
    for place in Place::all() {
        let directory = place.beside("rendered");
        let text = directory.to_str().unwrap();
        assert_eq!(with_input(&place, &["fs", "write", "me/over", "etc/over"], "over").code, 0);
        let reference = format!("{IMAGE}+me/over");
        assert_eq!(
            place.ok(&["fs", "render", &reference, text]),
            fs::canonicalize(&directory).unwrap().to_str().unwrap()
        );
        assert_eq!(fs::read_to_string(directory.join("var/www/index.html")).unwrap(), "hello from kiln\n");
        assert_eq!(fs::read_to_string(directory.join("etc/over")).unwrap(), "over");
        let program = fs::metadata(directory.join("bin/busybox")).unwrap();
        assert_eq!(program.permissions().mode() & 0o777, 0o755);
        assert_eq!(program.uid(), place.user.as_ref().map_or(0, |(user, _)| user.uid));
        // It is nobody's but the user's: what is done in it is not done in the store.
        fs::write(directory.join("var/www/index.html"), "mine").unwrap();
        assert_eq!(place.ok(&["fs", "cat", IMAGE, "var/www/index.html"]), "hello from kiln");
        let refused = place.kiln(&["fs", "render", IMAGE, text]);
        assert!(refused.code == 1 && refused.stderr.contains("--allow-existing"), "{refused:?}");
        place.ok(&["fs", "render", IMAGE, text, "--allow-existing"]);
        assert_eq!(fs::read_to_string(directory.join("var/www/index.html")).unwrap(), "hello from kiln\n");
        let unknown = place.kiln(&["fs", "render", "localhost/busybix:test", text]);
        assert!(unknown.code == 1 && unknown.stderr.contains(IMAGE), "near names are told: {unknown:?}");
    }
}

#[test]
fn names_are_listed_by_path_found_by_a_part_and_taken_away_version_by_version() {
    let Some(place) = Place::of_root() else { return };
    for (name, text) in [("me/tools:1", "1"), ("me/tools:1", "2"), ("me/libs/zlib:9", "3"), ("metal:1", "4")]
    {
        assert_eq!(with_input(&place, &["fs", "write", name], text).code, 0);
    }
    for (words, expected) in [
        (&["ls-tags", "me"][..], "me/libs/zlib:9\nme/tools:1"),
        (&["ls-tags", "me/"], "me/libs/zlib:9\nme/tools:1"),
        (&["ls-tags", "me/libs/zlib"], "me/libs/zlib:9"),
        (&["ls-tags", "metal:1"], "metal:1"),
        (&["ls-tags", "docker.io/library"], "metal:1"),
        (&["ls-tags", "localhost"], IMAGE),
        (&["ls-tags", "none"], ""),
        (&["search", "ZLIB"], "me/libs/zlib:9"),
        (&["search", "me"], "metal:1\nme/libs/zlib:9\nme/tools:1"),
        (&["search", "*"], ""),
    ] {
        assert_eq!(place.ok(&[&["fs"], words, &["-q"]].concat()), expected, "{words:?}");
    }
    let rows = place.json(&["fs", "ls-tags", "me/tools", "--format", "json"]);
    assert_eq!((&rows[0]["versions"], &rows[0]["note"]), (&2.into(), &"written".into()));
    assert_eq!(place.ok(&["fs", "read", "me/tools:1~1"]), "1");
    assert_eq!(place.ok(&["fs", "untag", "me/tools:1", "--latest"]), "me/tools:1");
    assert_eq!(place.ok(&["fs", "read", "me/tools:1"]), "1");
    assert_eq!(place.ok(&["fs", "untag", "me/tools:1", "metal:1"]), "me/tools:1\nmetal:1");
    assert_eq!(place.ok(&["fs", "search", "t", "-q"]), IMAGE);
    for words in [&["fs", "untag", "me/libs/zlip:9"][..], &["fs", "untag", "me/libs/zlip:9", "--latest"]] {
        let refused = place.kiln(words);
        assert!(
            refused.code == 1 && refused.stderr.contains("did you mean `me/libs/zlib:9`?"),
            "{refused:?}"
        );
    }
}

#[test]
fn layers_are_told_with_the_images_that_have_them() {
    let Some(place) = Place::of_root() else { return };
    assert_eq!(with_input(&place, &["fs", "write", "me/one"], &"x".repeat(1000)).code, 0);
    place.ok(&["fs", "tag", "me/one", "me/two"]);
    let rows = place.json(&["fs", "layers", "me/one", "--format", "json"]);
    let [row] = rows.as_array().unwrap().as_slice() else { panic!("{rows}") };
    assert_eq!((&row["files"], &row["size"]), (&1.into(), &1000.into()));
    assert_eq!(row["images"], serde_json::json!(["me/one:latest", "me/two:latest"]));
    let all = place.ok(&["fs", "layers", "-q"]);
    assert_eq!(all.lines().count(), 2, "{all}");
    let stacked = place.ok(&["fs", "layers", &format!("{IMAGE}+me/one"), "-q"]);
    assert_eq!(stacked.lines().last(), row["layer"].as_str());
}

#[test]
fn a_policy_says_which_versions_stay_and_the_rest_gives_its_space_back() {
    let Some(place) = Place::of_root() else { return };
    for text in ["first", "second", "third"] {
        assert_eq!(with_input(&place, &["fs", "write", "me/tools"], &text.repeat(1000)).code, 0);
    }
    // Without a policy, all stay.
    place.ok(&["fs", "clean"]);
    assert_eq!(place.ok(&["fs", "read", "me/tools~2"]), "first".repeat(1000));
    let told = place.json(&["fs", "clean", "--keep", "2", "--dry-run", "--format", "json"]);
    assert_eq!((&told["versions"], &told["layers"]), (&serde_json::json!(["me/tools:latest~2"]), &1.into()));
    assert!(told["bytes"].as_u64().unwrap() >= 5000, "{told}");
    assert_eq!(place.json(&["fs", "log", "me/tools", "--format", "json"]).as_array().unwrap().len(), 3);
    // None of them is so old.
    let young = place.json(&["fs", "clean", "--keep", "2", "--older-than", "1h", "--format", "json"]);
    assert_eq!((&young["versions"], &young["layers"]), (&serde_json::json!([]), &0.into()));
    let done = place.json(&["fs", "clean", "--keep", "2", "--older-than", "0s", "--format", "json"]);
    assert_eq!((&done["versions"], &done["bytes"]), (&told["versions"], &told["bytes"]));
    assert_eq!(place.ok(&["fs", "read", "me/tools~1"]), "second".repeat(1000));
    let gone = place.kiln(&["fs", "read", "me/tools~2"]);
    assert!(gone.code == 1 && gone.stderr.contains("has 2 version"), "{gone:?}");
    // A view has its image, whatever becomes of the name.
    let at = place.at();
    place.ok(&["fs", "run", "me/tools~1", "--keep", "--name", "kept", "--at", &at, "--", "true"]);
    place.ok(&["fs", "clean", "--keep", "1"]);
    let read = format!("{at}/blob");
    assert_eq!(place.ok(&["fs", "run", "--rerun", "kept", "--", "cat", &read]), "second".repeat(1000));
    let told = place.json(&["fs", "clean", "--kept-views", "--dry-run", "--format", "json"]);
    assert_eq!(told["views"], serde_json::json!(["kept"]));
    let done = place.json(&["fs", "clean", "--kept-views", "--format", "json"]);
    assert_eq!((&done["views"], &done["layers"]), (&serde_json::json!(["kept"]), &1.into()));
    assert_eq!(place.views(), "");
    assert_eq!(place.kiln(&["fs", "clean", "--keep", "0"]).code, 2);
    assert_eq!(place.ok(&["fs", "check"]).lines().count(), 1);
}

#[test]
fn a_damaged_store_is_repaired_from_where_one_says() {
    let Some(place) = Place::of_root() else { return };
    let options = RegistryOptions::default();
    let (Some(first), Some(second)) = (RegistryServer::start(&options), RegistryServer::start(&options))
    else {
        return;
    };
    let names = [&first, &second].map(|server| format!("{}/me/tools:1", server.address()));
    assert_eq!(with_input(&place, &["fs", "write", "me/tools:1"], &"x".repeat(1000)).code, 0);
    for name in &names {
        place.ok(&["fs", "push", "-q", "--tls-verify=false", "me/tools:1", name]);
    }
    let other = Home::new();
    other.ok(["fs", "pull", "-q", "--tls-verify=false", &names[0]]);
    drop(first);
    for entry in walk(&other.path().join("store/objects")) {
        fs::remove_file(entry).unwrap();
    }
    let check = ["fs", "check", "--tls-verify=false", "--retries", "0", "--registry-timeout", "2s"];
    let ended = other.kiln([&check[..], &["--repair"]].concat());
    assert_eq!(ended.code, 1, "it came from a registry that is gone: {ended:?}");
    let repository = names[1].trim_end_matches(":1");
    let ended = other.kiln([&check[..], &["--repair", repository]].concat());
    assert!(ended.code == 0 && ended.stdout.contains("repaired: "), "{ended:?}");
    assert_eq!(other.ok(["fs", "read", &names[0]]), "x".repeat(1000));
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}
