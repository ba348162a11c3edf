//! Views of images of which only the trees are here: from an empty store on demand.

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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

/// A way to a registry that can be made to break off every answer in its middle.
struct Way {
    port: u16,
    broken: Arc<AtomicBool>,
    /// How many answers were broken off.
    broken_off: Arc<AtomicUsize>,
}

/// More than the head of an answer, less than a part of a large file.
const BROKEN_AFTER: usize = 300_000;

impl Way {
    /// It ends with the test's process.
    fn to(registry: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let way = Self {
            port: listener.local_addr().unwrap().port(),
            broken: Arc::default(),
            broken_off: Arc::default(),
        };
        let (broken, broken_off) = (way.broken.clone(), way.broken_off.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", registry)) else { continue };
                let (mut from_client, mut to_server) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || {
                    // An error is the end of the connection, as is its end.
                    let _ = std::io::copy(&mut from_client, &mut to_server);
                    let _ = to_server.shutdown(Shutdown::Write);
                });
                let (broken, broken_off) = (broken.clone(), broken_off.clone());
                std::thread::spawn(move || answer(server, client, &broken, &broken_off));
            }
        });
        way
    }
}

fn answer(mut server: TcpStream, mut client: TcpStream, broken: &AtomicBool, broken_off: &AtomicUsize) {
    let (mut buffer, mut passed) = ([0; 8192], 0);
    while let Ok(length @ 1..) = server.read(&mut buffer) {
        if broken.load(Ordering::SeqCst) && passed > BROKEN_AFTER {
            broken_off.fetch_add(1, Ordering::SeqCst);
            break;
        }
        passed += length;
        if client.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}

#[test]
fn a_registry_that_goes_away_in_the_middle_of_a_file_is_an_error_until_it_is_back() {
    for place in Place::all() {
        let Some(image) = image(&place, "zstd:chunked") else { return };
        let way = Way::to(image.server.port);
        let reference = format!("localhost:{}/env:1", way.port);
        place.ok(&["fs", "pull", "-q", "--lazy", &reference]);
        // The router asks with the configuration's retries, which take seconds: once is enough.
        for backend in if place.user.is_some() { &["fuse", "router"][..] } else { &["fuse"] } {
            let backend = *backend;
            let at =
                if backend == "router" { place.beside("routed").display().to_string() } else { place.at() };
            if backend == "router" {
                fs::create_dir_all(&at).unwrap();
                if let Some((user, _)) = &place.user {
                    std::os::unix::fs::chown(&at, Some(user.uid), Some(user.gid)).unwrap();
                }
            }
            // The other file is for the other back end.
            let (name, bytes) = image
                .files
                .iter()
                .find(|(name, _)| *name == if backend == "fuse" { "large" } else { "middle" })
                .unwrap();
            let before = way.broken_off.load(Ordering::SeqCst);
            way.broken.store(true, Ordering::SeqCst);
            let go = place.beside("go");
            // Two wait for it. What a reader gets before the error must be none of the file that is not whole.
            let script = format!(
                "cd {at}; for n in 1 2; do (head -c 1000000 {name} > {out}.$n 2> {out}.$n.error && echo read; wc -c < {out}.$n) & done; wait; cat tiny
                 until test -e {go}; do sleep 0.05; done
                 tries=0; until sum=$(sha256sum 2>/dev/null {name}) || test $tries = 200; do tries=$((tries+1)); sleep 0.1; done; echo $sum",
                out = place.beside("out").display(),
                go = go.display(),
            );
            let flags = ["--name", "v", "--keep", "--retries", "1"];
            let words = fs_run(&reference, &at, backend, &flags, &["sh", "-c", &script]);
            let (mut reader, said) = {
                let mut child = place.command(&words).stdout(Stdio::piped()).spawn().unwrap();
                let said = std::io::BufReader::new(child.stdout.take().unwrap());
                (child, said)
            };
            let mut lines = std::io::BufRead::lines(said).map(Result::unwrap);
            let told: Vec<String> = lines.by_ref().take(3).collect();
            assert_eq!(told, ["0", "0", "tiny"], "{backend}");
            for number in [1, 2] {
                let error = fs::read_to_string(place.beside(&format!("out.{number}.error"))).unwrap();
                assert!(error.contains("Input/output error"), "{backend}: {error}");
            }
            assert!(way.broken_off.load(Ordering::SeqCst) > before, "{backend}: nothing was under way");
            way.broken.store(false, Ordering::SeqCst);
            fs::write(&go, "").unwrap();
            let sum = lines.next().unwrap();
            assert_eq!(sum.split_whitespace().next(), Some(hex(bytes).as_str()), "{backend}");
            assert!(reader.wait().unwrap().success(), "{backend}");
            place.ok(&["fs", "runtimes", "rm", "v"]);
            for name in ["go", "out.1", "out.2", "out.1.error", "out.2.error"] {
                fs::remove_file(place.beside(name)).unwrap();
            }
        }
        place.ok(&["fs", "service", "stop"]);
        assert_eq!(place.ok(&["system", "check"]).lines().filter(|line| line.contains("damaged")).count(), 0);
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
