//! The SSH server of one connection, as it runs in a machine, but on this host: OpenSSH's own clients log in to it.

#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kiln_link::message::{self, Process, SshServer};
use kiln_ssh::{KeyPair, PublicKey};

/// A server on a port of loopback, and what a client needs to log in.
struct Server {
    directory: tempfile::TempDir,
    port: u16,
}

impl Server {
    /// `None` where the host has not got what is needed.
    fn start() -> Option<Self> {
        if !kiln_fixtures::require_root() {
            return None;
        }
        kiln_fixtures::require("ssh")?;
        let own = KeyPair::generate().unwrap();
        let server = Self::letting_in(&[own.public()]);
        let key = server.path("key");
        fs::write(&key, own.to_file("test")).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        Some(server)
    }

    fn letting_in(keys: &[PublicKey]) -> Self {
        let host_key = KeyPair::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        fs::write(directory.path().join("known_hosts"), format!("machine {}\n", host_key.public())).unwrap();
        let greeting = SshServer {
            host_key: host_key.seed().to_vec(),
            authorised: keys.iter().map(|key| key.blob().to_vec().into()).collect(),
            process: Process {
                env: vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), "FROM_IMAGE=yes".to_owned()],
                ..Process::default()
            },
        };
        let greeting = message::encode(&greeting);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, greeting) = (stream.unwrap(), greeting.clone());
                std::thread::spawn(move || serve(&stream, &greeting));
            }
        });
        Self { directory, port }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A client's command line up to where its own arguments begin.
    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(["-F", "none", "-o", "HostKeyAlias=machine", "-o", "StrictHostKeyChecking=yes"]);
        command.args(["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR"]);
        command.arg("-o").arg(format!("UserKnownHostsFile={}", self.path("known_hosts").display()));
        command.arg("-i").arg(self.path("key"));
        command.arg(if program == "ssh" { "-p" } else { "-P" }).arg(self.port.to_string());
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command over `ssh`, as a user of this host.
    fn run(&self, user: &str, words: &[&str]) -> Output {
        output(self.client("ssh").arg(format!("{user}@127.0.0.1")).args(words))
    }
}

/// The directory of the control group (v2) that this process is in.
fn own_group() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let hierarchy = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("there is cgroup v2");
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    PathBuf::from(hierarchy.split(' ').nth(4).unwrap()).join(own)
}

/// One connection: a process, as the agent starts it.
fn serve(stream: &TcpStream, greeting: &[u8]) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let length = u32::try_from(greeting.len()).unwrap().to_le_bytes();
    ours.write_all(&[&length, greeting].concat()).unwrap();
    // In the place of the workload's control group.
    let group = File::open(own_group()).unwrap();
    let mut server = Command::new(env!("CARGO_BIN_EXE_kiln-guest"))
        .arg("ssh")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(group)
        .spawn()
        .unwrap();
    let (mut from_client, mut to_server) = (stream.try_clone().unwrap(), ours.try_clone().unwrap());
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(std::net::Shutdown::Write);
    });
    let _ = std::io::copy(&mut ours, &mut &*stream);
    let _ = stream.shutdown(std::net::Shutdown::Both);
    server.wait().unwrap();
}

/// Runs a client to its end; one that hangs is killed and fails its test.
fn output(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait(child)
}

fn wait(child: Child) -> Output {
    let pid = rustix::process::Pid::from_child(&child);
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(Duration::from_secs(60)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(done);
    watchdog.join().unwrap();
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Bytes that no compression and no luck makes equal.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn commands_have_their_streams_codes_users_and_variables() {
    let Some(server) = Server::start() else { return };
    let table: [(&str, &str, i32, &str, &str); 4] = [
        ("root", "echo out; echo err >&2; exit 7", 7, "out\n", "err\n"),
        (
            "root",
            "id -un; pwd; echo $HOME $USER $LOGNAME $FROM_IMAGE",
            0,
            "root\n/root\n/root root root yes\n",
            "",
        ),
        ("root", "kill -KILL $$", 255, "", ""),
        ("root", "exec /no/such", 127, "", "/no/such"),
    ];
    for (user, command, code, stdout, stderr) in table {
        let ended = server.run(user, &[command]);
        assert_eq!(ended.status.code(), Some(code), "{command}: {ended:?}");
        assert_eq!(text(&ended.stdout), stdout, "{command}");
        assert!(text(&ended.stderr).contains(stderr), "{command}: {ended:?}");
    }
}

#[test]
fn who_has_no_shell_that_lets_in_runs_nothing() {
    let Some(server) = Server::start() else { return };
    let ended = server.run("nobody", &["id"]);
    assert!(ended.status.code() != Some(0) && !text(&ended.stdout).contains("uid="), "{ended:?}");
}

#[test]
fn nobody_enters_without_the_key_or_as_a_user_that_is_not_there() {
    let Some(server) = Server::start() else { return };
    let ended = server.run("no-such-user", &["true"]);
    assert!(text(&ended.stderr).contains("Permission denied"), "{ended:?}");
    let stranger = KeyPair::generate().unwrap();
    fs::write(server.path("key"), stranger.to_file("stranger")).unwrap();
    let ended = server.run("root", &["true"]);
    assert!(text(&ended.stderr).contains("Permission denied (publickey)"), "{ended:?}");
}

#[test]
fn another_host_key_is_noticed() {
    let Some(server) = Server::start() else { return };
    let other = KeyPair::generate().unwrap().public();
    fs::write(server.path("known_hosts"), format!("machine {other}\n")).unwrap();
    let ended = server.run("root", &["true"]);
    assert!(text(&ended.stderr).contains("Host key verification failed"), "{ended:?}");
}

#[test]
fn users_may_bring_keys_of_every_common_kind() {
    let Some(_) = Server::start() else { return };
    let Some(keygen) = kiln_fixtures::require("ssh-keygen") else { return };
    for kind in [&["ed25519"][..], &["ecdsa", "-b", "256"], &["ecdsa", "-b", "384"], &["rsa", "-b", "2048"]] {
        let directory = tempfile::tempdir().unwrap();
        let key = directory.path().join("key");
        let made = Command::new(&keygen).args(["-q", "-N", "", "-t"]).args(kind).arg("-f").arg(&key).status();
        assert!(made.unwrap().success());
        let public = fs::read_to_string(key.with_extension("pub")).unwrap();
        let server = Server::letting_in(&[PublicKey::parse(&public).unwrap()]);
        fs::copy(&key, server.path("key")).unwrap();
        let ended = server.run("root", &["echo", "in"]);
        assert_eq!(text(&ended.stdout), "in\n", "{kind:?}: {ended:?}");
    }
}

#[test]
fn a_file_of_keys_that_we_write_is_one_that_openssh_reads() {
    let Some(keygen) = kiln_fixtures::require("ssh-keygen") else { return };
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("key");
    for comment in ["", "a", "kiln@host", "a comment of several words"] {
        let pair = KeyPair::generate().unwrap();
        fs::write(&key, pair.to_file(comment)).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        let read = output(Command::new(&keygen).arg("-y").arg("-f").arg(&key));
        assert_eq!(
            text(&read.stdout).trim_end(),
            format!("{} {comment}", pair.public()).trim_end(),
            "{read:?}"
        );
    }
}

#[test]
fn a_terminal_has_its_name_and_size_and_both_follow_the_clients() {
    use rustix::event::{PollFd, PollFlags, Timespec};
    use rustix::termios::{Winsize, tcsetwinsize};
    const A_SECOND: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
    let Some(server) = Server::start() else { return };
    // The client's own terminal.
    let master =
        rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let near = rustix::pty::ioctl_tiocgptpeer(
        &master,
        rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY,
    )
    .unwrap();
    let size = |rows, columns| Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&near, size(33, 101)).unwrap();
    let end = || Stdio::from(near.try_clone().unwrap());
    let mut client = server.client("ssh");
    client.args(["-tt", "root@127.0.0.1"]).env("TERM", "vt220").stdin(end()).stdout(end()).stderr(end());
    let child = client.spawn().unwrap();
    drop(client);
    let mut terminal = File::from(master);
    terminal.write_all(b"stty size; echo term=$TERM; test -t 0 && echo on-a-tty\n").unwrap();
    let mut seen = String::new();
    let mut expect = |words: &str, seen: &mut String| {
        let begun = Instant::now();
        let mut buffer = [0; 4096];
        while !seen.contains(words) {
            assert!(begun.elapsed() < Duration::from_secs(30), "no `{words}` in {seen}");
            // This end is open too, so that a client that has gone is no end of it.
            let mut ready = [PollFd::new(&terminal, PollFlags::IN)];
            if rustix::event::poll(&mut ready, Some(&A_SECOND)).unwrap() == 0 {
                continue;
            }
            let count = terminal.read(&mut buffer).unwrap();
            seen.push_str(&text(&buffer[..count]));
        }
        terminal.try_clone().unwrap()
    };
    for words in ["33 101", "term=vt220", "\non-a-tty"] {
        expect(words, &mut seen);
    }
    tcsetwinsize(&near, size(44, 77)).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    let mut typed = expect("on-a-tty", &mut seen);
    // The new size travels beside what is typed.
    typed.write_all(b"until stty size | grep '^44 77'; do sleep 0.1; done; echo do''ne; exit 5\n").unwrap();
    expect("44 77\r\n", &mut seen);
    expect("\ndone", &mut seen);
    drop(near);
    let ended = wait(child);
    assert_eq!(ended.status.code(), Some(5), "{seen}");
}

#[test]
fn scp_and_sftp_carry_files_both_ways() {
    let Some(server) = Server::start() else { return };
    if kiln_fixtures::require("scp").is_none() || kiln_fixtures::require("sftp").is_none() {
        return;
    }
    let there = server.path("there");
    fs::create_dir_all(there.join("sub")).unwrap();
    let content = noise((3 << 20) + 17);
    fs::write(server.path("local"), &content).unwrap();
    fs::set_permissions(server.path("local"), fs::Permissions::from_mode(0o640)).unwrap();
    let remote = |path: &str| format!("root@127.0.0.1:{}/{path}", there.display());
    let copy = |from: &str, to: &str| {
        let ended = output(server.client("scp").args(["-p", from, to]));
        assert!(ended.status.success(), "{from} to {to}: {ended:?}");
    };
    copy(server.path("local").to_str().unwrap(), &remote("sub/file"));
    let arrived = there.join("sub/file");
    assert!(fs::read(&arrived).unwrap() == content, "the same bytes");
    let stat = |path: &PathBuf| {
        let found = path.metadata().unwrap();
        (
            found.permissions().mode() & 0o7777,
            found.modified().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(),
        )
    };
    assert_eq!(stat(&arrived), stat(&server.path("local")), "mode and time");
    copy(&remote("sub/file"), server.path("back").to_str().unwrap());
    assert!(fs::read(server.path("back")).unwrap() == content, "the same bytes");

    let script = server.path("script");
    let lines = [
        "cd sub",
        "ls -l",
        "rename file renamed",
        "symlink renamed link",
        "ln renamed hard",
        "mkdir deep",
        "chmod 600 renamed",
        "-mkdir deep",
        "rm link",
        "rmdir deep",
        "df",
        "pwd",
    ];
    fs::write(&script, lines.join("\n")).unwrap();
    let listed = output(server.client("sftp").arg("-b").arg(&script).arg(remote("")));
    assert!(listed.status.success(), "{listed:?}");
    let shown = text(&listed.stdout);
    let line = shown.lines().find(|line| line.ends_with(" file")).unwrap_or_else(|| panic!("{shown}"));
    assert!(line.starts_with("-rw-r-----") && line.contains(" 3145745 "), "{line}");
    let mut names: Vec<_> =
        fs::read_dir(there.join("sub")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["hard", "renamed"]);
    assert_eq!(stat(&there.join("sub/renamed")).0, 0o600);
}

#[test]
fn files_are_their_users_and_names_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt as _;
    let Some(server) = Server::start() else { return };
    if kiln_fixtures::require("sftp").is_none() {
        return;
    }
    fs::set_permissions(server.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let own = server.path("own");
    fs::create_dir(&own).unwrap();
    rustix::fs::chown(&own, Some(rustix::fs::Uid::from_raw(65534)), None).unwrap();
    let strange = std::ffi::OsStr::from_bytes(b"str\xffnge");
    fs::write(own.join(strange), "x").unwrap();
    fs::write(server.path("secret"), "x").unwrap();
    fs::set_permissions(server.path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    let script = server.path("script");
    let secret = server.path("secret");
    fs::write(
        &script,
        format!("-get {} {}\nmkdir made\nls\n", secret.display(), server.path("stolen").display()),
    )
    .unwrap();
    let ended = output(
        server.client("sftp").arg("-b").arg(&script).arg(format!("nobody@127.0.0.1:{}", own.display())),
    );
    assert!(ended.status.success(), "{ended:?}");
    assert!(
        text(&ended.stderr).contains("Permission denied") && !server.path("stolen").exists(),
        "{ended:?}"
    );
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&own.join("made").metadata().unwrap()), 65534);
    assert!(text(&ended.stdout).contains("made"), "{ended:?}");
}

#[test]
fn a_command_that_does_not_read_stops_its_writer_and_one_that_writes_more_than_it_reads_does_not_hang() {
    let Some(server) = Server::start() else { return };
    // 6 MB of compressed zeros are some 6 GB; here the factor is 64, both ways at once and far beyond every window.
    let script = "while read -r line; do head -c 65536 /dev/zero; done | wc -c; cat > /dev/null";
    let mut child = server
        .client("ssh")
        .args(["root@127.0.0.1", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || input.write_all(&b"x\n".repeat(500)));
    let ended = wait(child);
    writer.join().unwrap().unwrap();
    assert_eq!(text(&ended.stdout).trim(), (500 * 65536).to_string());

    let content = noise(40 << 20);
    let mut child = server
        .client("ssh")
        .args(["root@127.0.0.1", "sleep 1; cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let copy = content.clone();
    let writer = std::thread::spawn(move || input.write_all(&copy));
    let ended = wait(child);
    writer.join().unwrap().unwrap();
    assert!(ended.stdout == content, "the same bytes, {} of {}", ended.stdout.len(), content.len());
}

#[test]
fn keys_are_exchanged_again_in_the_middle_of_a_copy() {
    let Some(server) = Server::start() else { return };
    let content = noise(8 << 20);
    fs::write(server.path("local"), &content).unwrap();
    let path = server.path("local");
    let ended =
        output(server.client("ssh").args(["-o", "RekeyLimit=1M", "root@127.0.0.1", "cat"]).arg(&path));
    assert!(ended.stdout == content, "{} bytes: {}", ended.stdout.len(), text(&ended.stderr));
    let into = server.path("into");
    let ended = output(
        server
            .client("ssh")
            .args(["-o", "RekeyLimit=1M", "root@127.0.0.1"])
            .arg(format!("cat > {}", into.display()))
            .stdin(File::open(&path).unwrap()),
    );
    assert!(ended.status.success() && fs::read(into).unwrap() == content, "{}", text(&ended.stderr));
}

#[test]
fn many_variables_compression_and_names_of_no_encoding_are_no_trouble() {
    let Some(server) = Server::start() else { return };
    let mut ssh = server.client("ssh");
    // One option: of several, ssh takes the first.
    let variables: Vec<String> = (0..100).map(|number| format!("V{number}=is{number}")).collect();
    ssh.arg("-C").arg("-o").arg(format!("SetEnv={}", variables.join(" ")));
    let ended = output(ssh.args(["root@127.0.0.1", "echo $V0 $V99"]));
    assert_eq!((text(&ended.stdout).as_str(), ended.status.code()), ("is0 is99\n", Some(0)), "{ended:?}");
    let mut ssh = server.client("ssh");
    let words = std::os::unix::ffi::OsStrExt::from_bytes(b"echo \xff");
    let ended = output(ssh.arg("root@127.0.0.1").arg::<&std::ffi::OsStr>(words));
    assert!(
        ended.status.code() == Some(255) && text(&ended.stderr).contains("exec request failed"),
        "{ended:?}"
    );
}

#[test]
fn one_connection_carries_many_sessions_of_which_some_end_while_much_is_sent_to_them() {
    let Some(server) = Server::start() else { return };
    let socket = server.path("master");
    let control = format!("ControlPath={}", socket.display());
    let mut master = server.client("ssh");
    master.args(["-o", &control, "-o", "RekeyLimit=64K", "-M", "-N", "root@127.0.0.1"]);
    let master = master.stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the first connection stands");
        std::thread::sleep(Duration::from_millis(20));
    }
    let content = server.path("content");
    fs::write(&content, noise(2 << 20)).unwrap();
    let run = |input: &std::path::Path, words: &str| {
        let mut ssh = server.client("ssh");
        ssh.args(["-o", &control, "-o", "ControlMaster=no", "root@127.0.0.1", words]);
        ssh.stdin(File::open(input).unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for _ in 0..3 {
        let children: Vec<_> = (0..12)
            .map(|number| match number % 3 {
                0 => (run(&content, "cat"), true),
                // It ends while the client is still sending.
                1 => (run(&content, "head -c 1"), false),
                _ => (run(std::path::Path::new("/dev/null"), "head -c 700000 /dev/zero; exit 3"), false),
            })
            .collect();
        for (child, whole) in children {
            let ended = wait(child);
            assert!(matches!(ended.status.code(), Some(0 | 3)), "{:?} {}", ended.status, text(&ended.stderr));
            assert!(!whole || ended.stdout == fs::read(&content).unwrap(), "the same bytes");
        }
    }
    let mut ssh = server.client("ssh");
    assert!(output(ssh.args(["-o", &control, "-O", "exit", "root@127.0.0.1"])).status.success());
    let said = text(&wait(master).stderr);
    assert_eq!(said, "");
}

#[test]
fn ports_are_forwarded_in_both_directions() {
    let Some(server) = Server::start() else { return };
    let echo = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = echo.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in echo.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (local, remote) = (free(), free());
    let mut child = server
        .client("ssh")
        .args(["-N", "-o", "ExitOnForwardFailure=yes"])
        .arg(format!("-L127.0.0.1:{local}:localhost:{target}"))
        .arg(format!("-R127.0.0.1:{remote}:127.0.0.1:{target}"))
        .arg("root@127.0.0.1")
        .spawn()
        .unwrap();
    let content = noise(2 << 20);
    for port in [local, remote] {
        let begun = Instant::now();
        let mut stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) if begun.elapsed() < Duration::from_secs(20) => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) => panic!("{error}"),
            }
        };
        let (mut writer, copy) = (stream.try_clone().unwrap(), content.clone());
        let writing = std::thread::spawn(move || {
            writer.write_all(&copy).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        writing.join().unwrap();
        assert!(back == content, "port {port}: {} bytes", back.len());
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn rsync_works_where_both_ends_have_it() {
    let Some(server) = Server::start() else { return };
    let Some(rsync) = kiln_fixtures::require("rsync") else { return };
    let from = server.path("from");
    fs::create_dir_all(from.join("a/b")).unwrap();
    let content = noise(1 << 20);
    fs::write(from.join("a/b/file"), &content).unwrap();
    let shell = server.client("ssh");
    let words: Vec<String> = std::iter::once("ssh".to_owned())
        .chain(shell.get_args().map(|word| word.to_string_lossy().into_owned()))
        .collect();
    let to = server.path("to");
    let ended = output(
        Command::new(rsync)
            .arg("-a")
            .arg("-e")
            .arg(words.join(" "))
            .arg(format!("{}/", from.display()))
            .arg(format!("root@127.0.0.1:{}/", to.display())),
    );
    assert!(ended.status.success(), "{ended:?}");
    assert!(fs::read(to.join("a/b/file")).unwrap() == content);
}

#[test]
fn what_is_no_client_is_hung_up_on() {
    let Some(server) = Server::start() else { return };
    let mut long = b"SSH-2.0-x".to_vec();
    long.resize(70_000, b'x');
    let huge = [&b"SSH-2.0-x\r\n"[..], &[0xff; 64]].concat();
    let tiny = [&b"SSH-2.0-x\r\n"[..], &[0; 64]].concat();
    // Packets in the clear: a service before there are keys, and new keys before there are any.
    let packet = |kind: u8| [&[0, 0, 0, 12, 10, kind][..], &[0; 10]].concat();
    let early = [&b"SSH-2.0-x\r\n"[..], &packet(5)].concat();
    let keys = [&b"SSH-2.0-x\r\n"[..], &packet(21)].concat();
    for (what, bytes) in [
        ("long", long),
        ("huge", huge),
        ("tiny", tiny),
        ("early", early),
        ("keys", keys),
        ("http", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ] {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The other side may hang up before it has heard all.
        let _ = stream.write_all(&bytes);
        let mut said = Vec::new();
        if let Err(error) = stream.read_to_end(&mut said) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{what}");
        }
        assert!(said.starts_with(b"SSH-2.0-Kiln_") || said.is_empty(), "{what}: {said:?}");
    }
    assert_eq!(text(&server.run("root", &["echo still there"]).stdout), "still there\n");
}
