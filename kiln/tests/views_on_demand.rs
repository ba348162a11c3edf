//! Views of images whose data are not here, or not what they were.

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::place::{Place, fs_run};
use kiln_fixtures::{RegistryOptions, RegistryServer};

/// How long something may take that must not take long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A view in which files are read when the test says so.
struct Reader {
    child: Child,
    paths: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    at: String,
}

impl Reader {
    fn start(place: &Place, reference: &str) -> Self {
        let at = place.at();
        let script = "while read -r path; do sum=$(sha256sum < \"$path\" 2>/dev/null) && echo \"$sum\" || echo failed; done";
        let words = fs_run(reference, &at, "fuse", &["--name", "v"], &["sh", "-c", script]);
        let mut child = place.command(&words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (paths, answers) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, paths, answers, at }
    }

    /// The SHA-256 of a file's bytes, as the view gives them.
    fn read(&mut self, name: &str) -> String {
        writeln!(self.paths.as_mut().unwrap(), "{}/{name}", self.at).unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.split_whitespace().next().unwrap_or("nothing").to_owned()
    }

    fn end(mut self) {
        self.paths = None;
        assert!(self.child.wait().unwrap().success());
    }
}

fn hex(bytes: &[u8]) -> String {
    kiln_contract::Digest::of(bytes).hex()
}

fn object(place: &Place, bytes: &[u8]) -> PathBuf {
    let hex = hex(bytes);
    place.home().join("store/objects").join(&hex[..2]).join(&hex[2..])
}

fn remove_objects(place: &Place) {
    let objects = place.home().join("store/objects");
    for directory in fs::read_dir(objects).unwrap() {
        for file in fs::read_dir(directory.unwrap().path()).unwrap() {
            fs::remove_file(file.unwrap().path()).unwrap();
        }
    }
}

fn log(place: &Place) -> String {
    fs::read_to_string(place.home().join("views/v/log")).unwrap()
}

/// An image of three files, the last of them large, in a registry that the store knows.
fn image(place: &Place, server: &RegistryServer, files: &[(&str, Vec<u8>)]) -> String {
    let source = place.beside("source");
    let reference = format!("{}/env:1", server.address());
    fs::create_dir_all(&source).unwrap();
    for (name, bytes) in files {
        fs::write(source.join(name), bytes).unwrap();
    }
    let tar = place.beside("source.tar");
    let made =
        std::process::Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&source).arg(".").status();
    assert!(made.unwrap().success());
    place.ok(&["image", "import", "-q", tar.to_str().unwrap(), &reference]);
    place.ok(&["push", "-q", &reference]);
    reference
}

fn blobs_given(server: &RegistryServer) -> usize {
    server
        .requests()
        .iter()
        .filter(|request| {
            request.starts_with("GET") && request.contains("/blobs/") && request.ends_with(" 200")
        })
        .count()
}

fn registry_data(server: &RegistryServer) -> (PathBuf, PathBuf) {
    let data = server.directory.path().join("data/docker/registry/v2/blobs");
    (data.clone(), Path::new(&data).with_file_name("hidden"))
}

#[test]
fn what_is_missing_is_fetched_once_and_what_is_damaged_is_never_shown() {
    let files = [
        ("first", b"first ".repeat(1000)),
        ("second", b"second ".repeat(1000)),
        ("large", b"large ".repeat(400_000)),
    ];
    let sum = |at: usize| hex(&files[at].1);
    for place in Place::all() {
        let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
        let reference = image(&place, &server, &files);
        remove_objects(&place);
        let before = blobs_given(&server);
        let mut reader = Reader::start(&place, &reference);
        for (at, (name, _)) in files.iter().enumerate() {
            assert_eq!(reader.read(name), sum(at), "{name}: {}", log(&place));
        }
        assert_eq!(blobs_given(&server), before + 1, "one layer, once: {:?}", server.requests());
        reader.end();

        // A registry that has lost it, and finds it again.
        let (data, hidden) = registry_data(&server);
        fs::rename(&data, &hidden).unwrap();
        fs::remove_file(object(&place, &files[2].1)).unwrap();
        let mut reader = Reader::start(&place, &reference);
        assert_eq!(reader.read("large"), "failed");
        assert_eq!(reader.read("first"), sum(0));
        let said = log(&place);
        assert!(said.contains(&sum(2)[2..]) && said.contains("cannot be fetched"), "{said}");
        fs::rename(&hidden, &data).unwrap();
        std::thread::sleep(Duration::from_millis(2500));
        assert_eq!(reader.read("large"), sum(2), "{}", log(&place));
        reader.end();

        // Damaged ones come back too.
        let damage = |at: usize| {
            let path = object(&place, &files[at].1);
            let mut bytes = files[at].1.clone();
            bytes[4000] = b'!';
            fs::remove_file(&path).unwrap();
            fs::write(&path, bytes).unwrap();
        };
        damage(0);
        let mut reader = Reader::start(&place, &reference);
        assert_eq!(reader.read("first"), sum(0), "{}", log(&place));
        reader.end();

        // Nobody to ask.
        drop(server);
        damage(1);
        damage(2);
        let mut reader = Reader::start(&place, &reference);
        for (at, name) in [(1, "second"), (2, "large")] {
            assert_eq!(reader.read(name), "failed");
            let said = log(&place);
            assert!(said.contains(&sum(at)[2..]) && said.contains("have the digest"), "{said}");
        }
        assert_eq!(reader.read("first"), sum(0));
        reader.end();
        let ended = place.kiln(&["fs", "cat", &reference, "/second"]);
        assert!(ended.code != 0 && ended.stderr.contains("have the digest"), "{ended:?}");
    }
}

/// The kernel's list of FUSE's connections, at a directory.
struct Connections(PathBuf);

impl Connections {
    fn at(directory: PathBuf) -> Self {
        fs::create_dir_all(&directory).unwrap();
        let none: Option<&std::ffi::CStr> = None;
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &directory, "fusectl", flags, none).unwrap();
        Self(directory)
    }

    /// How many requests of a mount, by its device number, have no answer yet.
    fn waiting(&self, device: &str) -> usize {
        let minor = rustix::fs::minor(device.parse().unwrap());
        fs::read_to_string(self.0.join(minor.to_string()).join("waiting")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// The lines that a program says, for who does not wait for ever.
fn lines(said: impl std::io::BufRead + Send + 'static) -> Receiver<String> {
    let (told, lines) = channel();
    std::thread::spawn(move || said.lines().map_while(Result::ok).try_for_each(|line| told.send(line)));
    lines
}

#[test]
fn a_registry_that_hangs_keeps_nobody_from_what_is_here() {
    // More than a server has threads or fetches at once, and than the kernel reads ahead at once if nobody tells it otherwise.
    let missing: Vec<(String, Vec<u8>)> =
        (0..24).map(|n| (n.to_string(), n.to_string().repeat(300_000).into())).collect();
    let here = kiln_fixtures::noise(4 << 20, 5);
    for place in Place::all() {
        let Some(server) = RegistryServer::start(&RegistryOptions::default()) else { return };
        let mut files: Vec<_> = missing.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
        files.push(("here", here.clone()));
        let reference = image(&place, &server, &files);
        let (connections, out) = (Connections::at(place.beside("connections")), place.beside("out"));
        for backend in if place.user.is_some() { &["fuse", "router"][..] } else { &["fuse"] } {
            let (at, go) = (place.at_by(backend), out.join("go"));
            fs::create_dir(&out).unwrap();
            fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
            missing.iter().for_each(|(_, bytes)| fs::remove_file(object(&place, bytes)).unwrap());
            let before = blobs_given(&server);
            let script = format!(
                "cd {at}; stat -c %d .
                 for n in $(seq 0 23); do (sha256sum < $n > {out}/$n) & done
                 until test -e {go}; do sleep 0.05; done
                 sha256sum < here; ls | wc -l; wait; cat {out}/[0-9] {out}/[0-9][0-9]",
                out = out.display(),
                go = go.display()
            );
            let hanging = server.hang();
            let words = fs_run(&reference, &at, backend, &[], &["sh", "-c", &script]);
            let mut child = place.command(&words).stdout(Stdio::piped()).spawn().unwrap();
            let said = lines(BufReader::new(child.stdout.take().unwrap()));
            let device = said.recv_timeout(PATIENCE).unwrap();
            let begun = Instant::now();
            while connections.waiting(&device) < missing.len() {
                assert!(begun.elapsed() < PATIENCE, "{backend}: {} wait", connections.waiting(&device));
                std::thread::sleep(Duration::from_millis(10));
            }
            fs::write(&go, "").unwrap();
            let looked = [0, 1].map(|_| said.recv_timeout(PATIENCE));
            let is_read = |name: &str| fs::metadata(out.join(name)).is_ok_and(|sum| sum.len() > 0);
            let read = missing.iter().filter(|(name, _)| is_read(name));
            assert_eq!(read.count(), 0, "{backend}: the registry has answered nothing");
            drop(hanging);
            let sum = |bytes: &[u8]| format!("{}  -", hex(bytes));
            assert_eq!(looked, [sum(&here), files.len().to_string()].map(Ok), "{backend}");
            let expected: Vec<_> = missing.iter().map(|(_, bytes)| sum(bytes)).collect();
            assert_eq!(said.iter().collect::<Vec<_>>(), expected, "{backend}");
            assert!(child.wait().unwrap().success(), "{backend}");
            assert_eq!(
                blobs_given(&server),
                before + 1,
                "{backend}: one layer, once: {:?}",
                server.requests()
            );
            fs::remove_dir_all(&out).unwrap();
        }
        place.ok(&["fs", "service", "stop"]);
    }
}

#[test]
fn what_nobody_has_is_an_error_that_names_it() {
    for place in Place::all() {
        let source = place.beside("source");
        fs::create_dir_all(&source).unwrap();
        let bytes = b"only here ".repeat(100);
        fs::write(source.join("only"), &bytes).unwrap();
        let tar = place.beside("source.tar");
        let made =
            std::process::Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&source).arg(".").status();
        assert!(made.unwrap().success());
        place.ok(&["image", "import", "-q", tar.to_str().unwrap(), "only:1"]);
        fs::remove_file(object(&place, &bytes)).unwrap();
        let mut reader = Reader::start(&place, "only:1");
        assert_eq!(reader.read("only"), "failed");
        let said = log(&place);
        assert!(said.contains(&hex(&bytes)[2..]) && said.contains("cannot be fetched"), "{said}");
        reader.end();
    }
}
