//! Containers from their making to their end, as root on the real kernel.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Ended, Home, IMAGE, fed, until, write};
use serde_json::json;

#[test]
fn exit_codes_are_the_commands_own_or_say_why_there_is_none() {
    let Some(home) = Home::with_busybox() else { return };
    let table: [(&[&str], i32); 5] = [
        (&["true"], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["/no/such/program"], 127),
        (&["no-such-program"], 127),
        (&["/etc/passwd"], 126),
    ];
    for (command, code) in table {
        let ended = home.kiln([&["run", "--rm", "--network", "none", IMAGE][..], command].concat());
        assert_eq!(ended.code, code, "{command:?}: {ended:?}");
    }
    let killed = home.kiln(["run", "--rm", "--init", "--network", "none", IMAGE, "sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.code, 137, "{killed:?}");
    assert_eq!(home.ok(["ps", "-aq"]), "", "--rm leaves nothing, even of what could not be started");
    let ended = home.kiln(["run", "--rm", "--pull", "never", "localhost/nothing", "true"]);
    assert_eq!(ended.code, 125, "{ended:?}");
}

#[test]
fn a_foreground_run_passes_streams_through() {
    let Some(home) = Home::with_busybox() else { return };
    let words =
        ["run", "-i", "--rm", "--network", "none", IMAGE, "sh", "-c", "cat; echo err >&2; echo $A $B"];
    let mut command = home.command([&words[..2], &["-e", "A=1", "-e", "B"], &words[2..]].concat());
    command.env("B", "two");
    let ended = fed(command, b"from the host\n");
    assert_eq!(
        (ended.code, ended.stdout.as_str(), ended.stderr.as_str()),
        (0, "from the host\n1 two\n", "err\n")
    );
}

#[test]
fn flags_reach_the_container() {
    let Some(home) = Home::with_busybox() else { return };
    write(&home.beside("src/file"), "bound\n");
    let script = "id -u; id -g; pwd; hostname; cat /src/file; cat /run/x/y 2>/dev/null; \
                  touch /blocked 2>/dev/null || echo read-only; df /t | tail -1 | awk '{print $2}'; ulimit -n";
    let shown = home.ok([
        "run",
        "--rm",
        "--network",
        "none",
        "-u",
        "1000:100",
        "-w",
        "/tmp",
        "-h",
        "box",
        "-v",
        "./src:/src:ro",
        "--read-only",
        "--tmpfs",
        "/t:size=1m",
        "--ulimit",
        "nofile=77",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(
        shown.lines().collect::<Vec<_>>(),
        ["1000", "100", "/tmp", "box", "bound", "read-only", "1024", "77"]
    );
}

#[test]
fn the_life_of_a_container_in_the_background() {
    let Some(home) = Home::with_busybox() else { return };
    let id = home.sleeper("web");
    assert_eq!(id.len(), 64);
    let rows = home.json(["ps", "--format", "json"]);
    let row = &rows[0];
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!((&row["id"], &row["name"], &row["status"]), (&json!(id), &json!("web"), &json!("running")));
    assert_eq!((&row["image"], &row["command"]), (&json!(IMAGE), &json!(["sleep", "600"])));
    assert!(row["pid"].as_u64().unwrap() > 1 && row["exit_code"].is_null(), "{row}");

    assert_eq!(home.ok(["exec", "web", "sh", "-c", "echo inside $PPID"]), "inside 0");
    assert_eq!(home.kiln(["exec", "web", "sh", "-c", "exit 9"]).code, 9);
    assert_eq!(home.kiln(["exec", "web", "no-such-program"]).code, 127);
    assert_eq!(home.kiln(["exec", "nobody", "true"]).code, 125);
    let top = home.ok(["top", "web"]);
    assert!(top.contains("sleep 600"), "{top}");

    home.ok(["rename", "web", "site"]);
    let wrong = home.kiln(["stop", "sitr"]);
    assert!(wrong.stderr.contains("did you mean `site`?"), "{wrong:?}");
    home.ok(["stop", "-t", "1", "site"]);
    assert_eq!(home.ok(["ps", "-q"]), "");
    let state = home.json(["inspect", "site"]);
    assert_eq!(state[0]["status"], "exited");
    assert_eq!(home.kiln(["exec", "site", "true"]).code, 125);
    home.ok(["start", "site"]);
    let refused = home.kiln(["rm", "site"]);
    assert!(refused.code == 1 && refused.stderr.contains("--force"), "{refused:?}");
    home.ok(["kill", "--signal", "KILL", "site"]);
    assert_eq!(home.ok(["wait", "site"]), "137");
    assert_eq!(home.ok(["rm", "site"]), "site");
    assert_eq!(home.ok(["ps", "-aq"]), "");
}

#[test]
fn ps_shows_what_fits_the_filters() {
    let Some(home) = Home::with_busybox() else { return };
    home.ok([
        "run",
        "-d",
        "--name",
        "a-run",
        "--network",
        "none",
        "--label",
        "tier=web",
        IMAGE,
        "sleep",
        "600",
    ]);
    home.kiln([
        "run",
        "--name",
        "b-done",
        "--network",
        "none",
        "--label",
        "tier=db",
        IMAGE,
        "sh",
        "-c",
        "exit 3",
    ]);
    home.ok(["create", "--name", "c-new", "--network", "none", IMAGE, "true"]);
    let names = |words: &[&str]| -> Vec<String> {
        let text = home.ok([&["ps", "--format", "jsonl"], words].concat());
        let mut names: Vec<String> = text
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["name"].as_str().unwrap().to_owned()
            })
            .collect();
        names.sort();
        names
    };
    let table: [(&[&str], &[&str]); 11] = [
        (&[], &["a-run"]),
        (&["-a"], &["a-run", "b-done", "c-new"]),
        (&["-l"], &["c-new"]),
        (&["-n", "2"], &["b-done", "c-new"]),
        (&["-f", "status=exited"], &["b-done"]),
        (&["-f", "exited=3"], &["b-done"]),
        (&["-f", "exited=0"], &[]),
        (&["-a", "-f", "label=tier"], &["a-run", "b-done"]),
        (&["-a", "-f", "label=tier=db"], &["b-done"]),
        (&["-a", "-f", "name=-"], &["a-run", "b-done", "c-new"]),
        (&["-a", "-f", "ancestor=localhost/busybox:test", "-f", "name=c"], &["c-new"]),
    ];
    for (words, expected) in table {
        assert_eq!(names(words), expected, "{words:?}");
    }
    let table = home.ok(["ps", "-a"]);
    let done = table.lines().find(|line| line.contains("b-done")).unwrap();
    assert!(done.contains("Exited (3)"), "{table}");
    assert!(table.lines().next().unwrap().starts_with("ID "), "{table}");
}

#[test]
fn logs_keep_streams_apart_and_follow() {
    let Some(home) = Home::with_busybox() else { return };
    let script = "echo one; echo two >&2; echo three; sleep 1; echo four";
    home.ok(["run", "-d", "--name", "talker", "--network", "none", IMAGE, "sh", "-c", script]);
    let followed = home.kiln(["logs", "--follow", "talker"]);
    assert_eq!((followed.stdout.as_str(), followed.stderr.as_str()), ("one\nthree\nfour\n", "two\n"));
    assert_eq!(home.ok(["logs", "--tail", "1", "talker"]), "four");
    let rows = home.ok(["logs", "--format", "jsonl", "talker"]);
    let first: serde_json::Value = serde_json::from_str(rows.lines().next().unwrap()).unwrap();
    assert_eq!((&first["stream"], &first["log"]), (&json!("stdout"), &json!("one\n")));
    let stamped = home.ok(["logs", "-t", "--tail", "1", "talker"]);
    let (time, text) = stamped.split_once(' ').unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z') && text == "four", "{stamped}");
    assert_eq!(home.kiln(["logs", "--until", "2000-01-01T00:00:00Z", "talker"]).stdout, "");
}

#[test]
fn files_are_copied_in_and_out_as_docker_copies_them() {
    let Some(home) = Home::with_busybox() else { return };
    home.sleeper("box");
    let at = |name: &str| home.beside(name);
    write(&at("tree/sub/file"), "content\n");
    write(&at("single"), "one\n");
    fs::set_permissions(at("tree/sub/file"), fs::Permissions::from_mode(0o640)).unwrap();
    let inside = |script: &str| home.ok(["exec", "box", "sh", "-c", script]);

    home.ok(["cp", "tree", "box:/root"]);
    assert_eq!(inside("cat /root/tree/sub/file; stat -c %a:%u /root/tree/sub/file"), "content\n640:0");
    home.ok(["cp", "tree/.", "box:/opt"]);
    assert_eq!(inside("cat /opt/sub/file"), "content");
    home.ok(["cp", "single", "box:/root/renamed"]);
    assert_eq!(inside("cat /root/renamed"), "one");
    let refused = home.kiln(["cp", "single", "box:/missing/"]);
    assert_eq!(refused.code, 1, "{refused:?}");

    // Names of one file stay names of one file; a link stands for what is in its directory, or is one.
    fs::hard_link(at("tree/sub/file"), at("tree/same")).unwrap();
    std::os::unix::fs::symlink("tree", at("link")).unwrap();
    home.ok(["cp", "link/.", "box:/srv"]);
    assert_eq!(inside("stat -c %h /srv/same /srv/sub/file"), "2\n2");
    home.ok(["cp", "link", "box:/srv"]);
    home.ok(["cp", "-L", "link", "box:/srv/followed"]);
    assert_eq!(inside("readlink /srv/link; cat /srv/followed/same"), "tree\ncontent");

    inside("mkdir -p /out/d && echo back > /out/d/f && ln -s f /out/d/l");
    home.ok(["cp", "box:/out", "copied"]);
    assert_eq!(fs::read_to_string(at("copied/d/f")).unwrap(), "back\n");
    assert_eq!(fs::read_link(at("copied/d/l")).unwrap().to_str(), Some("f"));
    home.ok(["cp", "box:/out/d/f", "."]);
    assert_eq!(fs::read_to_string(at("f")).unwrap(), "back\n");
    assert_eq!(fs::metadata(at("f")).unwrap().uid(), 0);
    write(&at("taken/out"), "a file\n");
    let refused = home.kiln(["cp", "box:/out", "taken"]);
    let expected =
        "error: cannot copy to taken\ncaused by: cannot unpack `out`\ncaused by: something else is there";
    assert!(refused.code == 1 && refused.stderr.starts_with(expected), "{refused:?}");
    let missing = home.kiln(["cp", "box:/not/there", "."]);
    assert!(missing.code == 1 && missing.stderr.contains("/not/there"), "{missing:?}");

    let archive = home.command(["cp", "box:/out/d", "-"]).output().unwrap().stdout;
    let ended = fed(home.command(["cp", "-", "box:/tmp"]), &archive);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(inside("cat /tmp/d/f"), "back");
}

#[test]
fn changes_become_an_image() {
    let Some(home) = Home::with_busybox() else { return };
    home.sleeper("box");
    home.ok(["exec", "box", "sh", "-c", "echo new > /root/new; rm /etc/group"]);
    let changes = home.ok(["diff", "box"]);
    let lines: Vec<&str> = changes.lines().collect();
    assert!(lines.contains(&"A /root/new") && lines.contains(&"D /etc/group"), "{changes}");
    let id =
        home.ok(["commit", "-m", "a change", "-c", "CMD [\"cat\", \"/root/new\"]", "box", "me/changed:1"]);
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(home.ok(["run", "--rm", "--network", "none", "me/changed:1"]), "new");
    assert_eq!(home.json(["image", "inspect", "me/changed:1"])[0]["id"], json!(id));
    let diff = home.ok(["image", "diff", IMAGE, "me/changed:1"]);
    assert!(diff.lines().any(|line| line == "A /root/new"), "{diff}");
}

#[test]
fn limits_and_usage_are_shown() {
    let Some(home) = Home::with_busybox() else { return };
    home.ok(["run", "-d", "--name", "small", "--network", "none", "-m", "64m", IMAGE, "sleep", "600"]);
    let rows = home.json(["stats", "--no-stream", "--format", "json"]);
    assert_eq!((&rows[0]["name"], &rows[0]["memory_limit"]), (&json!("small"), &json!(64 << 20)));
    assert!(rows[0]["pids"].as_u64().unwrap() >= 1, "{rows}");
    home.ok(["pause", "small"]);
    assert_eq!(home.json(["ps", "--format", "json"])[0]["status"], "paused");
    home.ok(["unpause", "small"]);
    assert_eq!(home.json(["ps", "--format", "json"])[0]["status"], "running");
}

#[test]
fn ids_are_written_to_a_file_that_must_not_exist() {
    let Some(home) = Home::with_busybox() else { return };
    let id = home.ok(["create", "--cidfile", "cid", "--network", "none", IMAGE, "true"]);
    assert_eq!(fs::read_to_string(home.beside("cid")).unwrap(), id);
    let again = home.kiln(["create", "--cidfile", "cid", "--network", "none", IMAGE, "true"]);
    assert!(again.code == 125 && again.stderr.contains("cid"), "{again:?}");
    let failed = home.kiln(["create", "--cidfile", "other", "--pull", "never", "localhost/nothing"]);
    assert_eq!(failed.code, 125);
    assert!(!home.beside("other").exists());
}

#[test]
fn names_are_unique_and_random_ones_readable() {
    let Some(home) = Home::with_busybox() else { return };
    home.ok(["create", "--name", "taken", "--network", "none", IMAGE, "true"]);
    let again = home.kiln(["create", "--name", "taken", "--network", "none", IMAGE, "true"]);
    assert!(
        again.code == 125 && again.stderr.contains("taken") && again.stderr.contains("hint: "),
        "{again:?}"
    );
    let id = home.ok(["create", "--network", "none", IMAGE, "true"]);
    let name = home.json(["inspect", &id[..12]])[0]["spec"]["name"].as_str().unwrap().to_owned();
    assert!(name.contains('_') && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
}

#[test]
fn a_published_port_is_shown_and_answers() {
    let Some(home) = Home::with_busybox() else { return };
    if kiln_fixtures::require("nft").is_none() {
        return;
    }
    let serve = "mkdir /www; echo hello > /www/index.html; exec httpd -f -p 80 -h /www";
    home.ok(["run", "-d", "--name", "web", "-p", "127.0.0.1::80", IMAGE, "sh", "-c", serve]);
    let address = home.ok(["port", "web", "80"]);
    assert!(address.starts_with("127.0.0.1:") && !address.ends_with(":0"), "{address}");
    assert_eq!(home.ok(["port", "web"]), format!("80/tcp -> {address}"));
    assert_eq!(home.kiln(["port", "web", "81"]).code, 1);
    let fetch = || {
        use std::io::Read;
        let mut stream = std::net::TcpStream::connect(&address).ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        text.contains("hello").then_some(())
    };
    until("the web server answers", || fetch().is_some());

    // A range of the host's ports: each takes the first that is free.
    let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
    let range = format!("127.0.0.1:{port}-{}:80", port.saturating_add(20));
    home.ok(["create", "--name", "next", "-p", &range, IMAGE, "sleep", "1000"]);
    assert!(home.ok(["ps", "-a"]).contains(&format!("{}->80/tcp", &range[..range.len() - 3])));
    home.ok(["start", "next"]);
    let got = home.ok(["port", "next", "80"]);
    let got: u16 = got.rsplit(':').next().unwrap().parse().unwrap();
    assert!(got > port && got <= port.saturating_add(20), "{got} of {range}");
}

#[test]
fn other_runtimes_run_the_same() {
    let Some(home) = Home::with_busybox() else { return };
    for runtime in ["runc", "crun"] {
        if kiln_fixtures::require(runtime).is_none() {
            continue;
        }
        let ended = home.kiln([
            "run",
            "--rm",
            "--network",
            "none",
            "--runtime",
            runtime,
            IMAGE,
            "sh",
            "-c",
            "echo hi; exit 4",
        ]);
        assert_eq!((ended.code, ended.stdout.as_str()), (4, "hi\n"), "{runtime}: {ended:?}");
        // What asks it to end reaches the command: nothing that its supervisor blocks is blocked in it.
        let wait = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done";
        home.ok([
            "run",
            "-d",
            "--name",
            runtime,
            "--network",
            "none",
            "--runtime",
            runtime,
            IMAGE,
            "sh",
            "-c",
            wait,
        ]);
        common::until("it listens", || home.ok(["logs", runtime]) == "ready");
        home.ok(["stop", "-t", "20", runtime]);
        assert_eq!(home.ok(["wait", runtime]), "7", "{runtime}");
    }
}

/// `kiln` as an ordinary user, who is given `/dev/fuse` as udev does everywhere: where this host has no udev, in a mount
/// namespace in which `device` is in its place.
fn with_fuse(user: &kiln_fixtures::OrdinaryUser, device: &Path) -> Command {
    let plain = user.command(env!("CARGO_BIN_EXE_kiln").as_ref());
    let there = fs::metadata("/dev/fuse").unwrap();
    if there.permissions().mode() & 0o666 == 0o666 {
        return plain;
    }
    if !device.exists() {
        let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty());
        rustix::fs::mknodat(rustix::fs::CWD, device, kind, mode, there.rdev()).unwrap();
        fs::set_permissions(device, fs::Permissions::from_mode(0o666)).unwrap();
    }
    let script = "mount --bind \"$1\" /dev/fuse && shift && exec setpriv \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(device);
    command.args([
        format!("--reuid={}", user.uid),
        format!("--regid={}", user.gid),
        "--clear-groups".to_owned(),
    ]);
    command.arg(plain.get_program()).env_clear().current_dir("/");
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

#[test]
fn a_removed_working_directory_matters_only_to_paths_that_begin_there() {
    let Some(home) = Home::with_busybox() else { return };
    let gone = |words: &[&str]| {
        let kiln = home.command(words);
        let mut command = Command::new("sh");
        command.args(["-c", "mkdir gone && cd gone && rmdir ../gone && exec \"$@\"", "sh"]);
        command.arg(kiln.get_program()).args(words).current_dir(home.beside("")).stdin(Stdio::null());
        command.envs(kiln.get_envs().filter_map(|(name, value)| Some((name, value?))));
        common::finish(command)
    };
    let ran = gone(&["run", "--rm", "-v", "/tmp:/host", IMAGE, "echo", "hi"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "hi\n"), "{}", ran.stderr);
    let refused = gone(&["run", "--rm", "-v", "./here:/here", IMAGE, "true"]);
    assert_eq!(refused.code, 125);
    assert!(refused.stderr.contains("`./here` for --volume"), "{}", refused.stderr);
    assert!(refused.stderr.contains("has been removed"), "{}", refused.stderr);
}

#[test]
fn an_ordinary_user_runs_containers_too() {
    let Some(user) = kiln_fixtures::OrdinaryUser::get() else { return };
    let Some(root) = Home::with_busybox() else { return };
    let directory = user.tempdir();
    let archive = directory.path().join("busybox.tar");
    root.ok(["image", "export", "-q", "-o", archive.to_str().unwrap(), IMAGE]);
    fs::set_permissions(&archive, fs::Permissions::from_mode(0o644)).unwrap();
    let kiln = |words: &[&str]| -> Ended {
        let mut command = with_fuse(&user, &directory.path().join("fuse"));
        command.args(words).env("KILN_HOME", directory.path().join("home")).stdin(Stdio::null());
        common::finish(command)
    };
    let imported = kiln(&["image", "import", "-q", archive.to_str().unwrap()]);
    assert_eq!(imported.code, 0, "{imported:?}");
    let ended = kiln(&[
        "run",
        "--rm",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        "id -u; echo x > /root/x && cat /root/x; exit 5",
    ]);
    assert_eq!((ended.code, ended.stdout.as_str()), (5, "0\nx\n"), "{ended:?}");
    let started = kiln(&["run", "-d", "--name", "bg", "--network", "none", IMAGE, "sleep", "600"]);
    assert_eq!(started.code, 0, "{started:?}");
    let inside = kiln(&["exec", "bg", "echo", "hi"]);
    assert_eq!((inside.code, inside.stdout.as_str()), (0, "hi\n"), "{inside:?}");
    let removed = kiln(&["rm", "-f", "bg"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    assert_eq!(kiln(&["ps", "-aq"]).stdout, "");
}
