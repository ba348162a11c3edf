//! A laboratory: a network namespace of the test's own in which it is the host, so that nothing of the real host
//! changes, and containers that are a sleeping process in a further namespace.

#![allow(dead_code, unreachable_pub, reason = "each test program takes what it needs")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_contract::{Attachment, Home, InstanceId, NetworkBackend, NetworkRequest, NetworkSpec, PublishSpec};
use kiln_net::ContainerNetwork;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// The test's own host.
pub struct Lab {
    pub home: Home,
    _directory: tempfile::TempDir,
}

impl Lab {
    /// Moves the calling thread into a new network namespace, for ever. `None` after a skip.
    pub fn enter() -> Option<Self> {
        if !kiln_fixtures::require_root() {
            return None;
        }
        for program in ["nft", "ip", "nsenter", "unshare", "busybox"] {
            kiln_fixtures::require(program)?;
        }
        // SAFETY: only this thread moves, and only its network namespace: no memory or descriptor is shared less.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET).unwrap() };
        ip("link set lo up");
        let directory = tempfile::Builder::new().prefix("kiln-net-").tempdir().unwrap();
        Some(Self { home: Home::at(directory.path()), _directory: directory })
    }

    pub fn network(&self) -> ContainerNetwork {
        ContainerNetwork::new(&self.home)
    }
}

/// Everything that Kiln could have changed.
pub fn state_of_host() -> String {
    ["ip -o -d link", "ip -o -4 addr", "ip -4 route show table all", "nft list ruleset"]
        .map(|command| {
            let text = run(command);
            // Hash tables are listed in an order that changes; so do the timers of bridges.
            let mut lines: Vec<_> =
                text.lines().map(|line| line.split("bridge forward_delay").next().unwrap_or(line)).collect();
            lines.sort_unstable();
            lines.join("\n")
        })
        .join("\n--\n")
}

/// Runs a command line without quoting; panics with its words if it fails.
pub fn run(line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    run_words(&words)
}

pub fn run_words(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn ip(arguments: &str) -> String {
    run(&format!("ip {arguments}"))
}

/// A process that sleeps in a network namespace of its own.
pub struct Container {
    child: Child,
    pub id: InstanceId,
}

impl Container {
    pub fn start() -> Self {
        let child = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
        let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
        let pid = child.id().to_string();
        wait_for("a namespace", || {
            namespace(&pid).is_some_and(|other| Some(other) != namespace("thread-self"))
        });
        Self { child, id: InstanceId::random() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn namespace(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid()).into()
    }

    pub fn request(&self, name: &str, mode: &str) -> NetworkRequest {
        NetworkRequest {
            id: self.id.clone(),
            name: name.into(),
            hostname: format!("{name}-host"),
            network: NetworkSpec { mode: mode.into(), ..NetworkSpec::default() },
            ports: Vec::new(),
            namespace: Some(self.namespace()),
        }
    }

    pub fn connect(
        &self,
        network: &mut ContainerNetwork,
        name: &str,
        mode: &str,
        ports: &[PublishSpec],
    ) -> Attachment {
        let request = NetworkRequest { ports: ports.to_vec(), ..self.request(name, mode) };
        network.setup(&request).unwrap_or_else(|error| panic!("{name} on {mode}: {error}"))
    }

    /// Makes something, such as a socket, inside.
    pub fn inside<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(self.namespace()).unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(
                        std::os::fd::AsFd::as_fd(&namespace),
                        Some(LinkNameSpaceType::Network),
                    )
                    .unwrap();
                    make()
                })
                .join()
                .unwrap()
        })
    }

    /// Runs a command line inside; its output, or `None` if it failed.
    pub fn run(&self, line: &str) -> Option<String> {
        let output = Command::new("nsenter")
            .args(["-t", &self.pid().to_string(), "-n"])
            .args(line.split_whitespace())
            .output()
            .unwrap();
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.end();
    }
}

pub fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(10);
    while !happened() {
        assert!(Instant::now() < patience, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The address that was given.
pub fn address(attachment: &Attachment) -> IpAddr {
    attachment.addresses[0]
}

/// A process that connects a container as a supervisor does.
pub struct Supervisor {
    pub child: Child,
    pub told: serde_json::Value,
    input: Option<ChildStdin>,
}

impl Supervisor {
    pub fn program() -> &'static Path {
        Path::new(env!("CARGO_BIN_EXE_kiln-net-supervisor"))
    }

    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told = serde_json::from_str(&line).unwrap_or_else(|_| {
            let _ = child.kill();
            panic!("the supervisor failed ({:?})", child.wait())
        });
        let input = child.stdin.take();
        Self { child, told, input }
    }

    /// Lets it end as it should.
    pub fn end(mut self) {
        drop(self.input.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn display(path: &Path) -> String {
    path.display().to_string()
}
