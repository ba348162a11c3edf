//! The command lines in the documents do what the documents say.
//!
//! In the README and below `docs/`, a fenced block marked `console` is typed into a shell line by line: what follows `$ `
//! is a command and must succeed; the lines under it must be in its output, in that order, where `…` stands for anything.
//! A block marked `console user` is typed by an ordinary user. The blocks of one document share a home and a working
//! directory. `docker.io` is a registry on loopback, `localhost:5000` another name of it, and port 8080 a free one.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_fixtures::{
    OrdinaryUser, RegistryOptions, RegistryServer, busybox_rootfs, oci_layout, require, require_root,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A command line and what the document shows under it.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    command: String,
    output: Vec<String>,
    as_user: bool,
}

/// All commands of the `console` blocks in `markdown`.
fn commands(markdown: &str) -> Vec<Line> {
    let mut found: Vec<Line> = Vec::new();
    let mut block = None;
    let mut continued = false;
    for line in markdown.lines() {
        let line = line.strip_prefix("  ").filter(|rest| rest.starts_with("```")).unwrap_or(line);
        if let Some(kind) = line.strip_prefix("```") {
            block = if block.is_some() { None } else { Some(kind.to_owned()) };
            continued = false;
            continue;
        }
        let as_user = match block.as_deref() {
            Some("console") => false,
            Some("console user") => true,
            _ => continue,
        };
        if let Some(last) = found.last_mut().filter(|_| continued) {
            last.command.push('\n');
            last.command += line;
            continued = line.ends_with('\\');
        } else if let Some(command) = line.strip_prefix("$ ") {
            found.push(Line { command: command.to_owned(), output: Vec::new(), as_user });
            continued = command.ends_with('\\');
        } else if let Some(last) = found.last_mut() {
            last.output.push(line.to_owned());
        }
    }
    found
}

/// Whether `actual` is `pattern`, where `…` stands for anything.
fn matches(pattern: &str, actual: &str) -> bool {
    let mut parts = pattern.trim_end().split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = actual.trim_end().strip_prefix(first) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// The first of the `expected` lines that is not in `actual`, in order.
fn first_missing<'a>(expected: &'a [String], actual: &str) -> Option<&'a str> {
    let mut lines = actual.lines();
    expected.iter().map(String::as_str).find(|pattern| !lines.any(|line| matches(pattern, line)))
}

/// One document's shell: a home, a working directory, and the names that its lines use.
struct Shell {
    kiln: PathBuf,
    user: Option<OrdinaryUser>,
    place: tempfile::TempDir,
    configuration: PathBuf,
}

impl Shell {
    fn run(&self, command: &str) -> (bool, String) {
        let mut shell = match &self.user {
            Some(user) => user.command(Path::new("/bin/sh")),
            None => Command::new("/bin/sh"),
        };
        let directories = self.kiln.parent().unwrap().display();
        let work = self.place.path().join("work");
        shell
            .args(["-c", &format!("exec 2>&1\n{command}")])
            .env("PATH", format!("{directories}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"))
            .env("KILN_HOME", self.place.path().join("home"))
            .env("KILN_SPARE", "off")
            .env("HOME", &work)
            .env("CONTAINERS_REGISTRIES_CONF", &self.configuration)
            .env("NO_COLOR", "1")
            .current_dir(&work)
            .stdin(Stdio::null());
        // A background container must not keep the pipe open, so the output goes to a file.
        let output = self.place.path().join("output");
        shell.stdout(fs::File::create(&output).unwrap());
        let status = shell.status().unwrap();
        (status.success(), String::from_utf8_lossy(&fs::read(&output).unwrap()).into_owned())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.run("ids=$(kiln ps --all --quiet) && test -z \"$ids\" || kiln rm --force $ids");
    }
}

fn built_kiln() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let target = program.ancestors().nth(3).unwrap();
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--package", "kiln", "--target-dir"])
        .arg(target)
        .current_dir(root())
        .status();
    assert!(built.unwrap().success(), "kiln can be built");
    target.join("debug/kiln")
}

/// What the documents call `docker.io` is a registry on loopback.
fn registry() -> Option<RegistryServer> {
    let skopeo = require("skopeo")?;
    let rootfs = busybox_rootfs()?;
    let layout = oci_layout(&rootfs, "latest")?;
    let server = RegistryServer::start(&RegistryOptions::default())?;
    for name in ["alpine", "busybox"] {
        let status = Command::new(&skopeo)
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(format!("docker://{}/library/{name}:latest", server.address()))
            .status();
        assert!(status.unwrap().success(), "{name} can be pushed");
    }
    Some(server)
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Types every command of one document.
fn type_document(path: &str, kiln: &Path, server: &RegistryServer) {
    let markdown = fs::read_to_string(root().join(path)).unwrap();
    let lines = commands(&markdown);
    assert!(!lines.is_empty(), "{path} has no console block");
    let as_user = lines[0].as_user;
    assert!(lines.iter().all(|line| line.as_user == as_user), "{path} is typed by one user");
    let user = if as_user { Some(OrdinaryUser::get().expect("an ordinary user")) } else { None };
    let place =
        user.as_ref().map_or_else(|| tempfile::tempdir_in("/var/tmp").unwrap(), OrdinaryUser::tempdir);
    let work = place.path().join("work");
    fs::create_dir(&work).unwrap();
    let mut reached = kiln.to_owned();
    if let Some(user) = &user {
        std::os::unix::fs::chown(&work, Some(user.uid), Some(user.gid)).unwrap();
        // Where that user can reach it.
        reached = PathBuf::from(user.command(kiln).get_program());
        let link = place.path().join("bin/kiln");
        fs::create_dir(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&reached, &link).unwrap();
        reached = link;
    }
    let configuration = place.path().join("registries.conf");
    let address = server.address();
    let mut text = String::new();
    for prefix in ["docker.io", "localhost:5000"] {
        writeln!(text, "[[registry]]\nprefix = \"{prefix}\"\nlocation = \"{address}\"\ninsecure = true\n")
            .unwrap();
    }
    fs::write(&configuration, text).unwrap();
    let port = free_port().to_string();
    let shell = Shell { kiln: reached, user, place, configuration };
    for Line { command, output, .. } in &lines {
        let typed = command.replace("8080", &port).replace("localhost:5000", &address);
        let (succeeded, printed) = shell.run(&typed);
        assert!(succeeded, "{path}: $ {command}\nfailed:\n{printed}");
        let expected: Vec<String> = output
            .iter()
            .map(|line| line.replace("8080", &port).replace("localhost:5000", &address))
            .collect();
        if let Some(missing) = first_missing(&expected, &printed) {
            panic!("{path}: $ {command}\ndid not print {missing:?} where it should, but:\n{printed}");
        }
    }
}

macro_rules! documents {
    ($($name:ident: $path:literal,)*) => {
        const DOCUMENTS: &[&str] = &[$($path),*];
        $(
            #[test]
            fn $name() {
                if !require_root() { return; }
                let Some(server) = registry() else { return };
                type_document($path, &built_kiln(), &server);
            }
        )*
    };
}

documents! {
    the_readme_does_what_it_says: "README.md",
    getting_started_does_what_it_says: "docs/guides/getting-started.md",
    the_rootless_guide_does_what_it_says: "docs/guides/rootless.md",
    the_registries_guide_does_what_it_says: "docs/guides/registries.md",
    the_networking_guide_does_what_it_says: "docs/guides/networking.md",
    the_guide_to_machines_does_what_it_says: "docs/guides/machines.md",
    the_guide_to_sandboxes_does_what_it_says: "docs/guides/agent-sandbox.md",
    the_guide_to_ssh_does_what_it_says: "docs/guides/ssh.md",
    the_guide_to_environments_does_what_it_says: "docs/guides/environments.md",
    the_guide_to_a_shared_toolchain_does_what_it_says: "docs/guides/shared-toolchain.md",
    the_troubleshooting_guide_does_what_it_says: "docs/guides/troubleshooting.md",
    the_page_on_the_store_does_what_it_says: "docs/concepts/store.md",
    the_page_on_layers_does_what_it_says: "docs/concepts/layers-and-trees.md",
    the_page_on_supervisors_does_what_it_says: "docs/concepts/supervisor.md",
    the_page_on_disks_does_what_it_says: "docs/concepts/disks.md",
    the_page_on_machines_does_what_it_says: "docs/concepts/machines.md",
    the_page_on_network_policy_does_what_it_says: "docs/concepts/network-policy.md",
    the_page_on_views_does_what_it_says: "docs/concepts/views.md",
    the_page_on_why_there_are_views_does_what_it_says: "docs/concepts/why-views.md",
    the_page_on_the_router_does_what_it_says: "docs/concepts/router.md",
    the_page_on_volumes_of_machines_does_what_it_says: "docs/concepts/volumes-of-machines.md",
}

#[test]
fn every_guide_and_concept_is_typed() {
    for folder in ["docs/guides", "docs/concepts"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let path = format!("{folder}/{}", entry.unwrap().file_name().to_string_lossy());
            assert!(DOCUMENTS.contains(&path.as_str()), "{path} is not in the list above");
        }
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let listing = Command::new("git").args(["ls-files", "*.md"]).current_dir(root()).output().unwrap();
    let listing = String::from_utf8(listing.stdout).unwrap();
    let mut links = 0;
    for document in listing.lines() {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for (_, rest) in text.match_indices("](").map(|(at, _)| text.split_at(at + 2)) {
            let target = rest.split([')', '#', ' ']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            links += 1;
            let path = root().join(document).parent().unwrap().join(target);
            assert!(path.exists(), "{document}: {target} is not there");
        }
    }
    assert!(links > 5, "only {links} links were found");
}

/// `room: name` of every test that the specification names.
fn tests_named_in(specification: &str) -> Vec<(&str, &str)> {
    let spans = specification.split('`').skip(1).step_by(2);
    spans.filter_map(|span| span.split_once(": ")).filter(|(_, name)| !name.contains(' ')).collect()
}

#[test]
fn every_promise_names_tests_that_exist() {
    let specification = fs::read_to_string(root().join("docs/SPECIFICATION.md")).unwrap();
    let mut number = 0;
    for line in specification.lines() {
        let Some((label, promise)) = line.split_once(". ") else { continue };
        let Ok(found) = label.parse::<u32>() else { continue };
        number += 1;
        assert_eq!(found, number, "promises are numbered without gaps");
        let tests = tests_named_in(promise);
        assert!(!tests.is_empty() || promise.ends_with("*bench*"), "nothing holds promise {number}");
        for (room, name) in tests {
            let found = Command::new("git")
                .args([
                    "grep",
                    "--quiet",
                    "--untracked",
                    "-E",
                    &format!("fn {name}\\(|^ *{name}:"),
                    "--",
                    &format!("{room}/*.rs"),
                ])
                .current_dir(root())
                .status();
            assert!(found.unwrap().success(), "promise {number}: {room} has no test {name}");
        }
    }
    assert!(number >= 40, "only {number} promises were found");
}

#[test]
fn blocks_are_read_as_described() {
    let text =
        "a\n```sh\n$ no\n```\n```console\n$ one \\\n  two\nout\n$ three\n```\n```console user\n$ four\n```\n";
    let line = |command: &str, output: &[&str], as_user| Line {
        command: command.to_owned(),
        output: output.iter().map(|&line| line.to_owned()).collect(),
        as_user,
    };
    let expected =
        [line("one \\\n  two", &["out"], false), line("three", &[], false), line("four", &[], true)];
    assert_eq!(commands(text), expected);
}

#[test]
fn an_ellipsis_stands_for_anything_and_lines_must_come_in_order() {
    for (pattern, actual, expected) in [
        ("hi", "hi", true),
        ("hi", "hi there", false),
        ("a … c", "a b c", true),
        ("…index…", "C /home/index.html", true),
        ("… x", "a y", false),
    ] {
        assert_eq!(matches(pattern, actual), expected, "{pattern} {actual}");
    }
    let lines = ["one".to_owned(), "three".to_owned()];
    assert_eq!(first_missing(&lines, "one\ntwo\nthree\n"), None);
    assert_eq!(first_missing(&lines, "three\none\n"), Some("three"));
}
