//! Views of images of which only the trees are here: from an empty store on demand.

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::place::{Place, fs_run};
use kiln_fixtures::{RegistryOptions, RegistryServer, noise};

fn hex(bytes: &[u8]) -> String {
    kiln_contract::Digest::of(bytes).hex()
}

/// An image in a registry, which is not in the store any more, and its files.
struct Image {
    server: RegistryServer,
    reference: String,
    files: Vec<(&'static str, Vec<u8>)>,
}

fn image(place: &Place, compression: &str) -> Option<Image> {
    let server = RegistryServer::start(&RegistryOptions::default())?;
    let files = vec![
        ("first", b"first ".repeat(1000)),
        ("large", noise(24 << 20, 1)),
        ("middle", noise(3 << 20, 2)),
        ("tiny", b"tiny\n".to_vec()),
    ];
    let reference = format!("{}/env:1", server.address());
    let source = place.beside("source");
    fs::create_dir_all(source.join("bin")).unwrap();
    for (name, bytes) in &files {
        fs::write(source.join(name), bytes).unwrap();
    }
    let tar = place.beside("source.tar");
    let made =
        Command::new("tar").arg("--sort=name").arg("-cf").arg(&tar).arg("-C").arg(&source).arg(".").status();
    assert!(made.unwrap().success());
    place.ok(&["image", "import", "-q", tar.to_str().unwrap(), &reference]);
    place.ok(&["push", "-q", "--compression", compression, &reference]);
    forget(place, &reference);
    Some(Image { server, reference, files })
}

/// Removes an image from the store, with all that only it needs.
fn forget(place: &Place, reference: &str) {
    place.ok(&["image", "rm", reference]);
    place.ok(&["system", "prune", "-f"]);
}

/// Bytes of blobs that the registry has given so far.
fn given(server: &RegistryServer) -> u64 {
    let log = server.log();
    let lines = log.lines().filter(|line| line.contains("\"GET /v2/") && line.contains("/blobs/"));
    lines.filter_map(|line| line.split('"').nth(2)?.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

fn blob_requests(server: &RegistryServer) -> usize {
    server.requests().iter().filter(|request| request.starts_with("GET") && request.ends_with(" 206")).count()
}

#[test]
fn a_view_starts_from_an_empty_store_and_takes_only_what_is_read() {
    for place in Place::all() {
        let Some(image) = image(&place, "zstd:chunked") else { return };
        let (at, sum) =
            (place.at(), |name: &str| hex(&image.files.iter().find(|(file, _)| *file == name).unwrap().1));
        let script = format!("cat {at}/tiny; sha256sum < {at}/first; find {at} | wc -l");
        let words = fs_run(&image.reference, &at, "auto", &["--pull", "lazy"], &["sh", "-c", &script]);
        let said = place.ok(&words);
        assert!(
            said.starts_with("tiny\n") && said.contains(&sum("first")) && said.ends_with("\n6"),
            "{said}"
        );
        let (bytes, requests) = (given(&image.server), blob_requests(&image.server));
        assert!(bytes < 100_000, "{bytes} bytes for some hundreds: {:?}", image.server.requests());
        assert_eq!(requests, 2, "the table of contents and one file: {:?}", image.server.requests());

        // What is said of it.
        let inspected = &place.json(&["image", "inspect", &image.reference])[0];
        assert_eq!(
            (&inspected["whole"], &inspected["absent_files"]),
            (&false.into(), &2.into()),
            "{inspected}"
        );
        assert_eq!(inspected["absent_size"].as_u64().unwrap(), (24 + 3) << 20);
        assert!(place.ok(&["image", "ls"]).contains("(partly here)"));
        assert!(place.ok(&["fs", "layers", &image.reference]).contains("(27.0 MiB not here)"));
        let checked = place.ok(&["system", "check"]);
        assert!(checked.contains("not here yet: layer") && checked.contains("1 of 3 files"), "{checked}");

        // A second view asks nobody for what the first one has read, and many readers fetch a file once.
        let script =
            format!("sha256sum < {at}/first; for n in 1 2 3 4; do sha256sum < {at}/large & done; wait");
        let words = fs_run(&image.reference, &at, "fuse", &["--pull", "lazy"], &["sh", "-c", &script]);
        let said = place.ok(&words);
        assert_eq!(said.matches(&sum("large")).count(), 4, "{said}");
        let large = given(&image.server) - bytes;
        assert!((24 << 20..25 << 20).contains(&large), "{large}");
        assert!(blob_requests(&image.server) - requests >= 4, "in parts");

        // A collection keeps what is here.
        place.ok(&["system", "prune", "-f"]);
        let before = blob_requests(&image.server);
        place.ok(&fs_run(
            &image.reference,
            &at,
            "fuse",
            &[],
            &["sh", "-c", &format!("cat {at}/large >/dev/null")],
        ));
        assert_eq!(blob_requests(&image.server), before);

        // The registry gone in the middle: what is here is shown, what is not is an error.
        let Image { server, reference, .. } = image;
        drop(server);
        let script = format!("cat {at}/middle >/dev/null && exit 1; sha256sum < {at}/first; cat {at}/tiny");
        let words = fs_run(&reference, &at, "fuse", &["--name", "v", "--keep"], &["sh", "-c", &script]);
        let ended = place.kiln(&words);
        assert!(ended.code == 0 && ended.stderr.contains("Input/output error"), "{ended:?}");
        let log = fs::read_to_string(place.home().join("views/v/log")).unwrap();
        assert!(log.contains("cannot be fetched"), "{log}");
        let ended = place.kiln(&["push", "-q", &reference]);
        assert!(ended.code != 0 && ended.stderr.contains("no connection"), "{ended:?}");
    }
}

#[test]
fn what_needs_the_whole_image_pulls_the_rest() {
    type Need = (&'static str, fn(&Place, &str));
    let needs: [Need; 7] = [
        ("the overlay", |place, reference| {
            let at = place.at();
            let script = format!("cat {at}/middle {at}/large | wc -c");
            let backend = if place.user.is_some() { "fuse" } else { "overlay" };
            assert_eq!(place.ok(&fs_run(reference, &at, backend, &[], &["sh", "-c", &script])), "28311552");
            if backend == "fuse" {
                place.ok(&["image", "pull", "-q", reference]);
            }
        }),
        ("a push", |place, reference| {
            place.ok(&["push", "-q", reference, &reference.replace("env:1", "other:1")]);
        }),
        ("an export", |place, reference| {
            let out = place.beside("out.tar");
            place.ok(&["image", "export", "-q", "-o", out.to_str().unwrap(), reference]);
            assert!(fs::metadata(out).unwrap().len() > 27 << 20);
        }),
        ("a directory", |place, reference| {
            let out = place.beside("out");
            place.ok(&["fs", "render", reference, out.to_str().unwrap()]);
            assert_eq!(fs::metadata(out.join("large")).unwrap().len(), 24 << 20);
        }),
        ("a pull", |place, reference| {
            place.ok(&["image", "pull", "-q", reference]);
        }),
        ("a repair", |place, _| {
            place.ok(&["system", "check", "--repair"]);
        }),
        ("a commit on it", |place, reference| {
            let at = place.at();
            let script = format!("echo new > {at}/new && {} fs commit -t mine:1", place.program());
            place.ok(&fs_run(reference, &at, "fuse", &["--edit"], &["sh", "-c", &script]));
            assert_eq!(place.ok(&["fs", "cat", "mine:1", "/new"]), "new");
            assert_eq!(place.ok(&["fs", "cat", "mine:1", "/tiny"]), "tiny");
        }),
    ];
    for place in Place::all() {
        let Some(image) = image(&place, "zstd:chunked") else { return };
        for (what, need) in needs {
            let before = given(&image.server);
            place.ok(&["fs", "pull", "-q", "--lazy", &image.reference]);
            assert!(given(&image.server) - before < 10_000, "{what}");
            need(&place, &image.reference);
            let inspected = &place.json(&["image", "inspect", &image.reference])[0];
            assert_eq!(
                (&inspected["whole"], &inspected["absent_files"]),
                (&true.into(), &0.into()),
                "{what}"
            );
            assert!(!place.ok(&["system", "check"]).contains("not here yet"), "{what}");
            place.kiln(&["image", "rm", "mine:1"]);
            place.kiln(&["image", "rm", &image.reference.replace("env:1", "other:1")]);
            forget(&place, &image.reference);
        }
        // Nobody is asked who was not to be.
        place.ok(&["fs", "pull", "-q", "--lazy", &image.reference]);
        let ended = place.kiln(&["create", "--pull", "never", &image.reference, "true"]);
        assert!(ended.code != 0 && ended.stderr.contains("kiln image pull"), "{ended:?}");
    }
}

#[test]
fn what_is_not_chunked_is_pulled_whole_and_that_is_said() {
    for place in Place::all() {
        let Some(image) = image(&place, "gzip") else { return };
        let mut command = place.command(&["image", "pull", "--lazy", &image.reference]);
        let ended = command.stderr(Stdio::piped()).stdout(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && said.contains("is taken whole"), "{said}");
        assert_eq!(place.json(&["image", "inspect", &image.reference])[0]["whole"], true);
    }
}

#[test]
fn other_ways_to_see_an_image_whose_data_are_not_here() {
    for place in Place::all() {
        let Some(image) = image(&place, "zstd:chunked") else { return };
        let at = place.at();
        let first = hex(&image.files[0].1);

        // The router's service fetches for all. Everybody sees its directory, which must be the user's own.
        let routed = place.beside("routed");
        fs::create_dir(&routed).unwrap();
        if let Some((user, _)) = &place.user {
            std::os::unix::fs::chown(&routed, Some(user.uid), Some(user.gid)).unwrap();
        }
        let routed = routed.to_str().unwrap();
        let script = format!("sha256sum < {routed}/first");
        let flags = ["--pull", "lazy"];
        let said = place.ok(&fs_run(&image.reference, routed, "router", &flags, &["sh", "-c", &script]));
        assert!(said.contains(&first), "{said}");
        assert!(given(&image.server) < 100_000);
        place.ok(&["fs", "service", "stop"]);

        // Without a mount.
        place.ok(&["image", "rm", &image.reference]);
        place.ok(&["system", "prune", "-f"]);
        place.ok(&["fs", "pull", "-q", "--lazy", &image.reference]);
        assert!(place.ok(&["fs", "ls", &image.reference]).contains("middle"));
        assert_eq!(place.ok(&["fs", "cat", &image.reference, "/tiny"]), "tiny");
        let before = blob_requests(&image.server);
        let whole = "first ".repeat(1000);
        assert_eq!(place.ok(&["fs", "cat", &image.reference, "/first"]), whole.trim_end());
        assert_eq!(blob_requests(&image.server), before + 1);

        // Changed in an editable view: a file is fetched before it is copied.
        let script = format!(
            "printf x | dd of={at}/middle conv=notrunc status=none; head -c 1 {at}/middle; wc -c < {at}/middle"
        );
        let words = fs_run(&image.reference, &at, "auto", &["--edit"], &["sh", "-c", &script]);
        assert_eq!(place.ok(&words), "x3145728");
        assert_eq!(place.json(&["image", "inspect", &image.reference])[0]["whole"], false);
    }
}

#[test]
fn credentials_that_a_view_was_made_with_fetch_its_files() {
    for place in Place::all() {
        let account = Some(("user".to_owned(), "secret".to_owned()));
        let options = RegistryOptions { basic_auth: account, ..RegistryOptions::default() };
        let Some(server) = RegistryServer::start(&options) else { return };
        let reference = format!("{}/env:1", server.address());
        let source = place.beside("source");
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("file"), noise(100_000, 3)).unwrap();
        let tar = place.beside("source.tar");
        let made = Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&source).arg(".").status();
        assert!(made.unwrap().success());
        let authfile = place.beside("auth.json");
        let auth = serde_json::json!({"auths": {server.address(): {"auth": "dXNlcjpzZWNyZXQ="}}}).to_string();
        fs::write(&authfile, auth).unwrap();
        let authfile = authfile.to_str().unwrap();
        place.ok(&["image", "import", "-q", tar.to_str().unwrap(), &reference]);
        place.ok(&["push", "-q", "--compression", "zstd:chunked", "--authfile", authfile, &reference]);
        forget(&place, &reference);
        let at = place.at();
        let script = format!("sha256sum < {at}/file");
        let flags = ["--pull", "lazy", "--authfile", authfile, "--keep", "--name", "v"];
        place.ok(&fs_run(&reference, &at, "auto", &flags, &["true"]));
        let again = |flags: &[&str]| {
            let words = [&["fs", "run", "--rerun", "v"], flags, &["--", "sh", "-c", &script]];
            place.kiln(&words.concat())
        };
        let refused = again(&[]);
        assert!(refused.stderr.contains("Input/output error"), "{refused:?}");
        let entered = again(&["--authfile", authfile]);
        assert!(entered.stdout.contains(&hex(&noise(100_000, 3))), "{entered:?}");
        place.ok(&["fs", "runtimes", "rm", "v"]);
        let flags = ["--pull", "lazy", "--authfile", authfile];
        forget(&place, &reference);
        let said = place.ok(&fs_run(&reference, &at, "auto", &flags, &["sh", "-c", &script]));
        assert!(said.contains(&hex(&noise(100_000, 3))), "{said}");
    }
}

#[test]
fn an_instance_of_an_image_whose_data_are_not_here_gets_all_of_them_first() {
    for place in Place::all() {
        let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
        let reference = format!("{}/busybox:1", server.address());
        place.ok(&["image", "tag", common::IMAGE, &reference]);
        place.ok(&["push", "-q", "--compression", "zstd:chunked", &reference]);
        place.ok(&["image", "rm", common::IMAGE]);
        forget(&place, &reference);
        place.ok(&["fs", "pull", "-q", "--lazy", &reference]);
        assert_eq!(place.json(&["image", "inspect", &reference])[0]["whole"], false);
        let id = place.ok(&["create", "-q", &reference, "true"]);
        assert_eq!(place.json(&["image", "inspect", &reference])[0]["whole"], true);
        place.ok(&["rm", &id]);
    }
}
