//! Logging in to machines over SSH, and their consoles: real kernels under QEMU, and this host's own OpenSSH.

mod common;

use std::fs;
use std::io::{BufRead as _, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use common::terminal::Terminal;
use common::{Ended, Home, IMAGE, finish, until};
use kiln_boot::{Kernels, Source};

static HOME: LazyLock<Option<Home>> = LazyLock::new(|| {
    kiln_fixtures::require("qemu-system-x86_64")?;
    kiln_fixtures::require("ssh")?;
    kiln_fixtures::require("scp")?;
    kiln_fixtures::require("sftp")?;
    let package = kiln_fixtures::debian_kernel()?;
    let home = Home::with_busybox()?.until_the_end();
    let kernels = Kernels::open(&kiln_contract::Home::at(home.path()));
    kernels.install(&Source::Packages(vec![package]), None, &kiln_contract::Silent).unwrap();
    let ended = home.kiln(["run", "--vm", "--rm", "--memory", "256m", IMAGE, "true"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    Some(home)
});

/// A machine in the background that waits.
fn sleeper(home: &Home, name: &str) {
    home.ok([
        "run",
        "--vm",
        "--memory",
        "256m",
        "-d",
        "--name",
        name,
        "-e",
        "FROM=image",
        IMAGE,
        "sleep",
        "600",
    ]);
}

/// A client of this host that is told of `name`, and of nothing else.
fn client(home: &Home, program: &str, name: &str) -> Command {
    let config = home.beside(&format!("{name}.conf"));
    fs::write(&config, home.ok(["ssh-config", name])).unwrap();
    let mut command = Command::new(program);
    command.arg("-F").arg(config).args(["-o", "BatchMode=yes"]).stdin(Stdio::null());
    command
}

/// The key of a machine, as `known_hosts` has it.
fn host_key(home: &Home, name: &str) -> String {
    let config = home.ok(["ssh-config", name]);
    let value = |name: &str| {
        let line = config.lines().find_map(|line| line.trim().strip_prefix(name)).expect("it is said");
        line.trim().trim_matches('"').to_owned()
    };
    let known = fs::read_to_string(value("UserKnownHostsFile")).unwrap();
    let line = known.strip_prefix(&value("HostKeyAlias")).expect("known by its alias");
    line.trim().to_owned()
}

#[test]
fn a_machine_without_an_ssh_server_is_logged_in_to_and_files_are_carried() {
    let Some(home) = &*HOME else { return };
    sleeper(home, "dev");
    let ended = home.kiln(["ssh", "dev", "--", "echo $USER $HOME $FROM; echo err >&2; exit 7"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (7, "err\n"), "{ended:?}");
    assert!(ended.stdout.starts_with("root ") && ended.stdout.ends_with(" image\n"), "{ended:?}");
    // The same key again, and not a word of it.
    let ended = finish({
        let mut ssh = client(home, "ssh", "dev");
        ssh.args(["dev", "uname -n; cat"]);
        ssh
    });
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
    assert_eq!(ended.stdout, home.ok(["exec", "dev", "hostname"]) + "\n");

    let content = kiln_fixtures::noise((2 << 20) + 5, 1);
    let (local, back) = (home.beside("local"), home.beside("back"));
    fs::write(&local, &content).unwrap();
    fs::set_permissions(&local, fs::Permissions::from_mode(0o750)).unwrap();
    let copy = |from: &str, to: &str| {
        let mut scp = client(home, "scp", "dev");
        scp.args(["-p", from, to]);
        let ended = finish(scp);
        assert_eq!(ended.code, 0, "{from} to {to}: {ended:?}");
    };
    copy(local.to_str().unwrap(), "dev:/tmp/there");
    copy("dev:/tmp/there", back.to_str().unwrap());
    assert!(fs::read(&back).unwrap() == content, "the same bytes");
    assert_eq!(fs::metadata(&back).unwrap().permissions().mode() & 0o777, 0o750);
    let script = home.beside("script");
    fs::write(&script, "ls -l /tmp\nrename /tmp/there /tmp/elsewhere\nls /tmp\n").unwrap();
    let mut sftp = client(home, "sftp", "dev");
    sftp.arg("-b").arg(script).arg("dev");
    let listed = finish(sftp);
    assert_eq!(listed.code, 0, "{listed:?}");
    assert!(listed.stdout.contains("-rwxr-x---") && listed.stdout.contains("/tmp/elsewhere"), "{listed:?}");
    assert_eq!(home.ok(["exec", "dev", "sh", "-c", "wc -c < /tmp/elsewhere"]), content.len().to_string());

    // Another user, by name and by number, and one that is not there.
    home.ok(["exec", "dev", "sh", "-c", "echo own:x:1007:1007::/tmp:/bin/sh >> /etc/passwd"]);
    assert_eq!(home.ok(["ssh", "own@dev", "id -u; pwd"]), "1007\n/tmp");
    assert_eq!(home.ok(["ssh", "-l", "1007", "dev", "id -u"]), "1007");
    let ended = home.kiln(["ssh", "-l", "nobody-there", "dev", "id"]);
    assert!(ended.code == 255 && ended.stderr.contains("Permission denied"), "{ended:?}");

    // The way in is kept through a stop, a start and another name.
    let key = host_key(home, "dev");
    home.ok(["stop", "-t", "10", "dev"]);
    let ended = home.kiln(["ssh", "dev", "true"]);
    assert!(
        ended.code == 1 && ended.stderr.contains("cannot log in to instance dev: it does not run"),
        "{ended:?}"
    );
    home.ok(["rename", "dev", "renamed"]);
    home.ok(["start", "renamed"]);
    assert_eq!(home.ok(["ssh", "renamed", "cat /etc/passwd | tail -n 1 | cut -d: -f1"]), "own");
    assert_eq!(host_key(home, "renamed"), key);
    home.ok(["rm", "-f", "renamed"]);
}

#[test]
fn a_fork_has_another_host_key_and_what_was_under_way_ends_in_it() {
    let Some(home) = &*HOME else { return };
    sleeper(home, "first");
    // A session that lasts.
    let mut session = home.command(["ssh", "first", "echo begun; cat; echo over"]);
    let mut session = session.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut begun = [0; 6];
    session.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    for name in ["second", "third"] {
        home.ok(["fork", "first", name]);
    }
    let keys = ["first", "second", "third"].map(|name| host_key(home, name));
    assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2], "{keys:?}");
    for name in ["first", "second", "third"] {
        let expected = home.ok(["exec", name, "hostname"]);
        assert_eq!(home.ok(["ssh", name, "hostname"]), expected);
    }
    // Whoever holds the fork for its original is told.
    let config = home.ok(["ssh-config", "second"]);
    let path = home.path().join("instances");
    let mixed: Vec<String> = config
        .lines()
        .map(|line| match line.trim().strip_prefix("UserKnownHostsFile") {
            Some(_) => format!("    UserKnownHostsFile {}/mixed", path.display()),
            None => line.to_owned(),
        })
        .collect();
    let alias = config.lines().find_map(|line| line.trim().strip_prefix("HostKeyAlias ")).unwrap();
    fs::write(path.join("mixed"), format!("{alias} {}\n", keys[0])).unwrap();
    fs::write(home.beside("mixed.conf"), mixed.join("\n")).unwrap();
    let mut ssh = Command::new("ssh");
    ssh.arg("-F").arg(home.beside("mixed.conf")).args(["second", "true"]).stdin(Stdio::null());
    let ended = finish(ssh);
    assert!(ended.code == 255 && ended.stderr.contains("Host key verification failed"), "{ended:?}");
    fs::remove_file(path.join("mixed")).unwrap();
    // The original's session goes on; in the fork there is nothing of it.
    session.stdin.take().unwrap().write_all(b"still\n").unwrap();
    let ended = Ended::from(session.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "still\nover\n"), "{ended:?}");
    until("the fork's session has ended", || !home.ok(["top", "second"]).contains("kiln-ssh"));
    for name in ["first", "second", "third"] {
        home.ok(["rm", "-f", name]);
    }
}

#[test]
fn a_terminal_follows_the_clients_size() {
    let Some(home) = &*HOME else { return };
    sleeper(home, "term");
    let mut terminal = Terminal::open(31, 97);
    let mut ssh = client(home, "ssh", "term");
    ssh.args(["-tt", "term"]).env("TERM", "vt100");
    let mut child = terminal.start(ssh);
    terminal.type_in("stty size; echo term=$TERM\n");
    terminal.expect("31 97\r\n");
    terminal.expect("term=vt100");
    terminal.resize(42, 78);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    // The new size travels beside what is typed.
    terminal.type_in("until stty size | grep '^42 78'; do sleep 0.1; done; exit 5\n");
    terminal.expect("42 78\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(5), "{}", terminal.seen);
    home.ok(["rm", "-f", "term"]);
}

#[test]
fn ports_are_forwarded_to_the_machine() {
    let Some(home) = &*HOME else { return };
    sleeper(home, "ports");
    home.ok([
        "exec",
        "-d",
        "ports",
        "sh",
        "-c",
        "mkdir /www; echo inside > /www/index.html; httpd -f -p 127.0.0.1:8080 -h /www",
    ]);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let forward = format!("127.0.0.1:{free}:localhost:8080");
    let mut child = home.command(["ssh", "-N", "-L", &forward, "ports"]).spawn().unwrap();
    until("the port answers", || {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", free)) else { return false };
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).is_ok() && answer.ends_with("inside\n")
    });
    child.kill().unwrap();
    child.wait().unwrap();
    home.ok(["rm", "-f", "ports"]);
}

#[test]
fn a_container_and_what_is_not_there_are_refused_with_what_to_do() {
    let Some(home) = &*HOME else { return };
    home.sleeper("box");
    for verb in ["ssh", "ssh-config"] {
        let ended = home.kiln([verb, "box"]);
        assert!(ended.code == 1 && ended.stderr.contains("kiln exec -it box sh"), "{verb}: {ended:?}");
    }
    let ended = home.kiln(["console", "box"]);
    assert!(ended.code == 1 && ended.stderr.contains("kiln attach box"), "{ended:?}");
    assert_eq!(home.kiln(["ssh", "nothing", "true"]).code, 1);
    let missing = home.beside("no-key");
    let ended = home.kiln(["ssh", "--ssh-key", missing.to_str().unwrap(), "box"]);
    assert_eq!(ended.code, 1, "{ended:?}");
    // Where there is no ssh, the package that has it is named.
    sleeper(home, "bare");
    let mut command = home.command(["ssh", "bare"]);
    let ended = finish({
        command.env("PATH", "/nowhere");
        command
    });
    assert!(ended.code == 1 && ended.stderr.contains("openssh-client"), "{ended:?}");
    for name in ["box", "bare"] {
        home.ok(["rm", "-f", name]);
    }
}

#[test]
fn the_console_shows_what_was_said_and_takes_what_is_typed() {
    let Some(home) = &*HOME else { return };
    // Somebody who answers at the console, as a login would.
    let script = "while read -r line; do echo \"heard <$line>\" > /dev/console; done < /dev/console";
    home.ok(["run", "--vm", "--memory", "256m", "-d", "--name", "serial", IMAGE, "sh", "-c", script]);
    home.ok(["exec", "serial", "sh", "-c", "echo said before > /dev/console"]);
    let mut terminal = Terminal::open(24, 80);
    let mut child = terminal.start(home.command(["console", "serial"]));
    terminal.expect("said before");
    terminal.type_in("typed\r");
    terminal.expect("heard <typed>");
    let second = home.kiln(["console", "serial"]);
    assert!(second.code == 1 && second.stderr.contains("somebody is at the console"), "{second:?}");
    terminal.type_in("\x10\x11");
    assert_eq!(child.wait().unwrap().code(), Some(0), "{}", terminal.seen);
    // It ends with the machine.
    let mut looking = home.command(["console", "--no-stdin", "serial"]);
    let mut looking = looking.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut shown = String::new();
    let mut said = std::io::BufReader::new(looking.stdout.take().unwrap());
    while !shown.contains("heard <typed>") {
        assert_ne!(said.read_line(&mut shown).unwrap(), 0, "{shown}");
    }
    home.ok(["kill", "serial"]);
    let ended = Ended::from(looking.wait_with_output().unwrap());
    assert_eq!(ended.code, 0, "{ended:?}");
    home.ok(["rm", "-f", "serial"]);
}
