//! Images in, out, named, listed and removed; volumes and networks; the store's care.

mod common;

use std::fs;

use common::{Home, IMAGE};
use kiln_fixtures::{RegistryOptions, RegistryServer};
use serde_json::json;

#[test]
fn images_are_listed_with_their_names_and_filtered() {
    let Some(home) = Home::with_busybox() else { return };
    home.ok(["tag", IMAGE, "me/app:1", "me/app:2"]);
    let rows = home.json(["image", "ls", "--format", "json"]);
    let names: Vec<String> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|row| format!("{}:{}", row["repository"].as_str().unwrap(), row["tag"].as_str().unwrap()))
        .collect();
    assert_eq!(names, [IMAGE, "me/app:1", "me/app:2"]);
    assert!(rows[0]["id"].as_str().unwrap().starts_with("sha256:"), "{rows}");
    assert_eq!(home.ok(["images", "-q"]).lines().count(), 1, "ids are listed once");
    let listed = |words: &[&str]| home.ok([&["images", "--format", "jsonl"], words].concat()).lines().count();
    for (words, count) in [
        (&["me/app"][..], 2),
        (&["me/app:2"], 1),
        (&["-f", "reference=me/*"], 2),
        (&["-f", "reference=*busybox:t*"], 0),
        (&["-f", "dangling=true"], 0),
        (&["-f", "label=x"], 0),
    ] {
        assert_eq!(listed(words), count, "{words:?}");
    }
    assert_eq!(home.ok(["rmi", "me/app:1"]), "me/app:1");
    assert_eq!(listed(&["me/app"]), 1);
    let wrong = home.kiln(["image", "inspect", "me/ap:2"]);
    assert!(wrong.code == 1 && wrong.stderr.contains("me/app:2"), "{wrong:?}");
}

#[test]
fn a_name_remembers_what_it_pointed_to() {
    let Some(home) = Home::with_busybox() else { return };
    home.ok(["tag", IMAGE, "me/app"]);
    let first = home.json(["image", "inspect", "me/app"])[0]["id"].clone();
    home.ok(["create", "--name", "box", "--network", "none", IMAGE, "true"]);
    home.ok(["commit", "-c", "ENV A=1", "box", "me/app"]);
    let second = home.json(["image", "inspect", "me/app"])[0].clone();
    assert_ne!(second["id"], first);
    assert_eq!(home.json(["image", "inspect", "me/app:latest~1"])[0]["id"], first);
    let history = home.json(["image", "history", "--tag", "--format", "json", "me/app"]);
    assert_eq!(history.as_array().unwrap().len(), 2);
    assert_eq!(history[1]["name"], "me/app:latest~1");
    assert_eq!(home.ok(["run", "--rm", "--network", "none", "me/app", "sh", "-c", "echo $A"]), "1");
}

#[test]
fn archives_go_out_and_come_in_again() {
    let Some(home) = Home::with_busybox() else { return };
    let id = home.json(["image", "inspect", IMAGE])[0]["id"].clone();
    for format in ["oci-archive", "docker-archive", "oci-layout"] {
        let path = home.beside(format);
        let path = path.to_str().unwrap();
        home.ok(["image", "export", "-q", "--format", format, "-o", path, IMAGE]);
        let other = Home::new();
        let named = other.ok(["image", "import", "-q", path]);
        assert_eq!(named, IMAGE, "{format}");
        assert_eq!(other.json(["image", "inspect", IMAGE])[0]["id"], id, "{format}");
    }
}

#[test]
fn layers_are_refused_beyond_their_limits_and_the_flag_that_allows_more_is_named() {
    let home = Home::new();
    let root = home.beside("root");
    fs::create_dir(&root).unwrap();
    for index in 0..20 {
        fs::write(root.join(format!("{index}")), [b'x'; 1000]).unwrap();
    }
    let archive = home.beside("archive.tar");
    home.ok(["image", "import", "-q", root.to_str().unwrap(), "files"]);
    home.ok([
        "image",
        "export",
        "-q",
        "--format",
        "docker-archive",
        "-o",
        archive.to_str().unwrap(),
        "files",
    ]);
    home.ok(["rmi", "files"]);
    home.ok(["system", "prune", "--force", "--all"]);
    let (root, archive) = (root.to_str().unwrap(), archive.to_str().unwrap());
    let sources: [&[&str]; 3] =
        [&["image", "import", root], &["image", "import", archive], &["image", "load", "-i", archive]];
    for words in sources {
        for (flag, small, enough) in
            [("--max-size", "19999", "20k"), ("--max-entries", "19", "21"), ("--max-metadata", "4k", "1m")]
        {
            let ended = home.kiln([words, &[flag, small]].concat());
            assert!(ended.code == 1 && ended.stderr.contains("too large"), "{words:?} {flag}: {ended:?}");
            assert!(
                ended
                    .stderr
                    .contains(&format!("hint: if you trust where it comes from, allow more with {flag}"))
            );
            assert_eq!(home.ok(["images", "-q"]), "", "{words:?} {flag}");
            home.ok([words, &[flag, enough]].concat());
            for id in home.ok(["images", "-q"]).lines() {
                home.ok(["rmi", id]);
            }
            home.ok(["system", "prune", "--force", "--all"]);
        }
    }
}

#[test]
fn images_travel_through_a_registry() {
    let Some(home) = Home::with_busybox() else { return };
    let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
    let name = format!("{}/team/busybox:1", server.address());
    home.ok(["tag", IMAGE, &name]);
    let digest = home.ok(["push", "-q", "--tls-verify=false", &name]);
    assert!(digest.starts_with("sha256:"), "{digest}");
    let other = Home::new();
    for words in [&["pull", &name][..], &["run", "--rm", "--network", "none", &name, "true"]] {
        let ended =
            other.kiln([&words[..1], &["--tls-verify=false", "--max-entries", "3"], &words[1..]].concat());
        assert!(ended.code != 0 && ended.stderr.contains("allow more with --max-entries"), "{ended:?}");
    }
    let ended =
        other.kiln(["run", "--rm", "--network", "none", "--tls-verify=false", &name, "echo", "pulled"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "pulled\n"), "{ended:?}");
    assert!(ended.stderr.contains("pulling"), "{ended:?}");
    let quiet = other.kiln(["run", "--rm", "-q", "--network", "none", &name, "echo", "warm"]);
    assert_eq!(
        (quiet.stdout.as_str(), quiet.stderr.as_str()),
        ("warm\n", ""),
        "a warm image needs no registry"
    );
    let pulled = other.kiln(["pull", "--tls-verify=false", &name]);
    assert!(pulled.code == 0 && pulled.stderr.contains("up to date"), "{pulled:?}");
    let missing =
        other.kiln(["run", "--rm", "--tls-verify=false", &format!("{}/none", server.address()), "true"]);
    assert!(missing.code == 125 && missing.stderr.contains("none"), "{missing:?}");
}

#[test]
fn an_image_in_use_is_kept_and_the_rest_is_collected() {
    let Some(home) = Home::with_busybox() else { return };
    home.ok(["create", "--name", "user", "--network", "none", IMAGE, "true"]);
    let refused = home.kiln(["rmi", IMAGE]);
    assert!(refused.code == 1 && refused.stderr.contains("user"), "{refused:?}");
    home.ok(["rm", "user"]);
    home.ok(["rmi", IMAGE]);
    let planned = home.json(["system", "prune", "--dry-run", "--format", "json"]);
    assert_eq!(planned["dry_run"], json!(true));
    let removed = home.json(["system", "prune", "--format", "json"]);
    assert!(removed["bytes"].as_u64().unwrap() > 100_000, "{removed}");
    assert_eq!(home.json(["system", "df", "--format", "json"])["objects"], json!(0));
}

#[test]
fn what_instances_start_from_is_kept_by_a_prune() {
    let Some(home) = Home::with_busybox() else { return };
    home.ok(["run", "--rm", "--network", "none", IMAGE, "true"]);
    let removed = home.json(["system", "prune", "--format", "json"]);
    assert_eq!((&removed["layers"], &removed["renders"]), (&json!(0), &json!(0)), "{removed}");
    home.ok(["run", "--rm", "--network", "none", IMAGE, "true"]);
}

#[test]
fn a_prune_leaves_anonymous_volumes_to_those_who_ask() {
    let Some(home) = Home::with_busybox() else { return };
    let volumes = || home.json(["volume", "ls", "--format", "json"]).as_array().unwrap().len();
    home.ok(["run", "--name", "box", "--network", "none", "-v", "/data", IMAGE, "true"]);
    home.ok(["system", "prune"]);
    assert_eq!((home.ok(["ps", "-a", "-q"]).as_str(), volumes()), ("", 1));
    home.ok(["system", "prune", "--volumes"]);
    assert_eq!(volumes(), 0);
}

#[test]
fn an_archive_can_be_written_to_what_is_no_file() {
    let Some(home) = Home::with_busybox() else { return };
    // A `/dev/null` of the test's own.
    let null = home.beside("null");
    let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::from_raw_mode(0o666));
    rustix::fs::mknodat(rustix::fs::CWD, &null, kind, mode, rustix::fs::makedev(1, 3)).unwrap();
    home.ok(["image".as_ref(), "export".as_ref(), IMAGE.as_ref(), "-o".as_ref(), null.as_os_str()]);
    let metadata = fs::metadata(&null).unwrap();
    assert!(std::os::unix::fs::FileTypeExt::is_char_device(&metadata.file_type()));
}

fn largest_object(home: &Home) -> std::path::PathBuf {
    let directories = fs::read_dir(home.path().join("store/objects")).unwrap();
    let files =
        directories.flat_map(|directory| fs::read_dir(directory.unwrap().path()).into_iter().flatten());
    files.map(|file| file.unwrap()).max_by_key(|file| file.metadata().unwrap().len()).unwrap().path()
}

#[test]
fn the_store_is_verified_and_damage_is_named() {
    let Some(home) = Home::with_busybox() else { return };
    let sound = home.json(["system", "check", "--format", "json"]);
    assert_eq!((&sound["damaged"], &sound["images"]), (&json!([]), &json!(1)));
    let object = largest_object(&home);
    fs::remove_file(&object).unwrap();
    fs::write(&object, "rotten").unwrap();
    let ended = home.kiln(["system", "check"]);
    assert!(ended.code == 1 && ended.stdout.contains("damaged: "), "{ended:?}");
}

#[test]
fn what_no_registry_has_is_repaired_by_bringing_its_image_in_again() {
    let Some(home) = Home::with_busybox() else { return };
    let archive = home.beside("archive.tar");
    let archive = archive.to_str().unwrap();
    home.ok(["save", "-o", archive, IMAGE]);
    home.ok(["rm", "-f", &home.ok(["create", IMAGE, "true"])]);
    let object = largest_object(&home);
    let before = fs::read(&object).unwrap();
    fs::remove_file(&object).unwrap();
    fs::write(&object, vec![0; before.len()]).unwrap();
    let ended = home.kiln(["system", "check", "--repair", "--registry-timeout", "2s"]);
    assert!(
        ended.code == 1 && ended.stderr.contains("hint: bring in the images that need it again"),
        "{ended:?}"
    );
    home.ok(["load", "-q", "-i", archive]);
    assert!(fs::read(&object).unwrap() == before);
    home.ok(["system", "check"]);
}

#[test]
fn a_damaged_store_is_repaired_from_the_registry() {
    let Some(home) = Home::with_busybox() else { return };
    let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
    let name = format!("{}/busybox:1", server.address());
    home.ok(["push", "-q", "--tls-verify=false", IMAGE, &name]);
    let other = Home::new();
    other.ok(["pull", "-q", "--tls-verify=false", &name]);
    let object = largest_object(&other);
    let before = fs::read(&object).unwrap();
    fs::remove_file(&object).unwrap();
    assert_eq!(other.kiln(["system", "check"]).code, 1);
    let report = other.json(["system", "check", "--repair", "--tls-verify=false", "--format", "json"]);
    assert_eq!(report["repaired"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(fs::read(&object).unwrap(), before);
    other.ok(["system", "check"]);
    let left: Vec<_> = fs::read_dir(other.path())
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().into_string().ok())
        .collect();
    assert!(!left.iter().any(|name| name.starts_with("repair-")), "{left:?}");
}

#[test]
fn volumes_keep_what_is_written() {
    let Some(home) = Home::with_busybox() else { return };
    assert_eq!(home.ok(["volume", "create", "--label", "a=b", "data"]), "data");
    home.ok([
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        "data:/data",
        IMAGE,
        "sh",
        "-c",
        "echo kept > /data/f",
    ]);
    assert_eq!(
        home.ok(["run", "--rm", "--network", "none", "-v", "data:/d:ro", IMAGE, "cat", "/d/f"]),
        "kept"
    );
    let volumes = home.json(["volume", "ls", "--format", "json"]);
    assert_eq!((&volumes[0]["name"], &volumes[0]["labels"]["a"]), (&json!("data"), &json!("b")));
    assert_eq!(home.ok(["volume", "ls", "-q", "-f", "dangling=true"]), "data");
    home.ok(["create", "--name", "user", "--network", "none", "-v", "data:/data", IMAGE, "true"]);
    assert_eq!(home.ok(["volume", "ls", "-q", "-f", "dangling=true"]), "");
    assert_eq!(home.kiln(["volume", "rm", "data"]).code, 1, "it is in use");
    home.ok(["rm", "user"]);
    assert_eq!(home.ok(["volume", "rm", "data"]), "data");
    assert_eq!(home.ok(["volume", "rm", "--force", "data"]), "");
    assert_eq!(home.kiln(["volume", "inspect", "data"]).code, 1);
}

#[test]
fn networks_are_made_listed_and_removed() {
    let Some(home) = Home::with_busybox() else { return };
    let names = home.ok(["network", "ls", "-q"]);
    for built_in in ["kiln", "none", "host", "pasta"] {
        assert!(names.lines().any(|name| name == built_in), "{names}");
    }
    if kiln_fixtures::require("nft").is_none() {
        return;
    }
    home.ok(["network", "create", "--internal", "--label", "x=y", "back"]);
    let network = home.json(["network", "inspect", "back"]);
    assert_eq!((&network[0]["name"], &network[0]["internal"]), (&json!("back"), &json!(true)));
    assert_eq!(home.ok(["network", "ls", "-q", "-f", "label=x=y"]), "back");
    assert_eq!(home.kiln(["network", "create", "back"]).code, 1);
    assert_eq!(home.ok(["network", "rm", "back"]), "back");
    assert_eq!(home.kiln(["network", "rm", "none"]).code, 1);
}

/// A docker-archive of a busybox root and 126 layers on top, each of which adds a file, takes away the one before, and
/// replaces `last`.
fn archive_of_127_layers(rootfs: &std::path::Path) -> Vec<u8> {
    let layer = |fill: &dyn Fn(&mut tar::Builder<Vec<u8>>)| {
        let mut layer = tar::Builder::new(Vec::new());
        layer.follow_symlinks(false);
        fill(&mut layer);
        layer.into_inner().unwrap()
    };
    let file = |archive: &mut tar::Builder<Vec<u8>>, name: &str, data: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        archive.append_data(&mut header, name, data).unwrap();
    };
    let mut layers = vec![layer(&|archive| archive.append_dir_all(".", rootfs).unwrap())];
    for number in 1..127 {
        layers.push(layer(&|archive| {
            file(archive, &format!("file-{number}"), b"");
            file(archive, &format!(".wh.file-{}", number - 1), b"");
            file(archive, "last", number.to_string().as_bytes());
        }));
    }
    let diff_ids: Vec<String> =
        layers.iter().map(|layer| kiln_contract::Digest::of(layer).to_string()).collect();
    let config = json!({
        "architecture": kiln_contract::Platform::host().architecture, "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let names: Vec<String> = (0..layers.len()).map(|number| format!("{number}.tar")).collect();
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["many:1"], "Layers": names }]);
    layer(&|archive| {
        file(archive, "manifest.json", manifest.to_string().as_bytes());
        file(archive, "config.json", config.to_string().as_bytes());
        names.iter().zip(&layers).for_each(|(name, layer)| file(archive, name, layer));
    })
}

#[test]
fn an_image_of_127_layers_runs_and_travels() {
    let Some(home) = Home::with_busybox() else { return };
    let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
    let archive = home.beside("many.tar");
    fs::write(&archive, archive_of_127_layers(&kiln_fixtures::busybox_rootfs().unwrap())).unwrap();
    home.ok(["image".as_ref(), "import".as_ref(), archive.as_os_str()]);
    let look = "ls -d /file-*; cat /last";
    assert_eq!(home.ok(["run", "--rm", "--network", "none", "many:1", "sh", "-c", look]), "/file-126\n126");
    let name = format!("{}/many:1", server.address());
    home.ok(["tag", "many:1", &name]);
    home.ok(["push", "-q", "--tls-verify=false", &name]);
    let other = Home::new();
    let ended =
        other.ok(["run", "--rm", "-q", "--network", "none", "--tls-verify=false", &name, "sh", "-c", look]);
    assert_eq!(ended, "/file-126\n126");
}
