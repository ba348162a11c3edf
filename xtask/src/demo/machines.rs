//! The second act: a Debian system under systemd in a machine, forked, broken and put back, committed, logged in to, and a
//! machine that reaches one name and nothing else.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiln_fixtures::RegistryServer;

use super::expect;
use super::story::Story;
use crate::kiln::Kiln;
use crate::shell::{Outcome, capture};

/// How long a system may take until everything in it is started; emulated on a busy host it takes its time.
const TO_BOOT: Duration = Duration::from_secs(300);

pub(super) fn run(story: &mut Story, program: &Path, registry: &RegistryServer) -> Outcome {
    let missing = |what: &str| format!("cannot make {what}: see the skips above");
    let kiln = Kiln::new(program, None)?;
    let system = format!("{}/debian-system:latest", registry.address());
    let busybox = format!("{}/busybox:latest", registry.address());
    story.step("build a Debian system with systemd (debootstrap), make it an image, push it", || {
        let root = kiln_fixtures::debian_system_rootfs().ok_or_else(|| missing("the Debian system"))?;
        let layout = kiln_fixtures::oci_layout(&root, "latest").ok_or_else(|| missing("an image"))?;
        let options = ["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"];
        let (source, target) = (format!("oci:{}:latest", layout.display()), format!("docker://{system}"));
        capture(Command::new("skopeo").args(options).args([source, target]))?;
        Ok(((), String::new()))
    })?;
    story.step("kiln kernel install: Debian's kernel, for machines", || {
        let package = kiln_fixtures::debian_kernel().ok_or_else(|| missing("a kernel"))?;
        let package = package.to_str().ok_or("the kernel's package has a name that is not UTF-8")?.to_owned();
        Ok(((), kiln.output(["kernel", "install", "--quiet", "--from", &package])?))
    })?;
    one_name(story, &kiln, &busybox)?;
    story.step("kiln run --vm --init: the image boots as a system of its own", || {
        kiln.output(["image", "pull", "--quiet", &system])?;
        kiln.output(["run", "-d", "--vm", "--init", "--memory", "512m", "--name", "dev", &system])?;
        Ok(((), until_it_runs(&kiln, "dev")?))
    })?;
    story.step("kiln exec: systemd is in charge, and its journal is kept", || {
        let services =
            "systemctl list-units --type service --state running --no-legend --plain | cut -d' ' -f1";
        let services = kiln.output(["exec", "dev", "sh", "-c", services])?;
        let journal =
            kiln.output(["exec", "dev", "journalctl", "--no-pager", "-b", "-n", "2", "-o", "cat"])?;
        expect(&services, "systemd-journald.service")?;
        Ok(((), format!("{}\n{journal}", services.replace('\n', " "))))
    })?;
    log_in(story, &kiln)?;
    story.step("kiln fork, twice: what runs is copied as it runs, and each copy is somebody else", || {
        for name in ["broken", "kept"] {
            kiln.output(["fork", "dev", name])?;
        }
        let script = "echo $(hostname) $(head -c 8 /etc/machine-id) $(systemctl is-system-running)";
        let mut said = Vec::new();
        for name in ["dev", "broken", "kept"] {
            said.push(kiln.output(["exec", name, "sh", "-c", script])?);
        }
        said.iter().try_for_each(|line| expect(line, "running"))?;
        said.sort();
        said.dedup();
        if said.len() == 3 { Ok(((), said.join("\n"))) } else { Err(format!("two are the same: {said:?}")) }
    })?;
    break_and_put_back(story, &kiln)?;
    let result = format!("{}/machines/kept:1", registry.address());
    story.step("commit the other copy to an image, push it, and run that as a container", || {
        kiln.output(["exec", "kept", "sh", "-c", "echo made in a machine > /etc/made"])?;
        kiln.output(["commit", "kept", &result])?;
        kiln.output(["image", "push", "--quiet", &result])?;
        let elsewhere = Kiln::new(program, None)?;
        elsewhere.output(["image", "pull", "--quiet", &result])?;
        let made = elsewhere.output(["run", "--rm", "--network", "none", &result, "cat", "/etc/made"])?;
        expect(&made, "made in a machine")?;
        Ok(((), made))
    })?;
    story.step("clean up: nothing stays behind", || {
        kiln.output(["rm", "--force", "dev", "broken", "kept"])?;
        let freed = kiln.output(["system", "prune", "--all", "--force"])?;
        let left = kiln.output(["ps", "--all", "--quiet"])? + &kiln.output(["template", "ls", "--quiet"])?;
        if left.is_empty() { Ok(((), freed)) } else { Err(format!("left behind: {left}")) }
    })
}

/// A network with two servers, and a machine whose policy names one of them.
fn one_name(story: &mut Story, kiln: &Kiln, busybox: &str) -> Outcome {
    story.step("kiln run --vm: the same image that containers run, and the next start is warm", || {
        kiln.output(["image", "pull", "--quiet", busybox])?;
        kiln.output(["run", "--vm", "--rm", busybox, "true"])?;
        let begun = Instant::now();
        let said = kiln.output(["run", "--vm", "--rm", busybox, "uname", "-sr"])?;
        Ok(((), format!("{said}, in {} ms", begun.elapsed().as_millis())))
    })?;
    story.step("kiln run --allow: one name can be reached, and no other, no address, and nothing by UDP", || {
        kiln.output(["network", "create", "lab"])?;
        for name in ["allowed", "other"] {
            let server = ["httpd", "-f", "-p", "80", "-h", "/var/www"];
            let options = ["run", "-d", "--network", "lab", "--name", name, busybox];
            capture(&mut kiln.command(options.into_iter().chain(server)))?;
        }
        let address = field(&kiln.output(["inspect", "other"])?, "/0/addresses/0")?;
        let datagrams = DatagramServer::begin(&field(&kiln.output(["network", "inspect", "lab"])?, "/0/gateway")?)?;
        let (host, port) = (datagrams.address.ip(), datagrams.address.port());
        let by_udp = format!("timeout 10 tftp -g -r said -l /tmp/said {host} {port} && cat /tmp/said");
        // A container of the network, which has no policy of its own, reaches all of it.
        let all = format!("wget -q -O - http://other/ && wget -q -O - http://{address}/ && {by_udp}");
        let all = kiln.output(["run", "--rm", "--network", "lab", busybox, "sh", "-c", &all])?;
        expect(&all, DATAGRAMS)?;
        let script = format!(
            "exec 2>&1; wget -q -O - http://allowed/; for to in other {address}; do timeout 10 wget -q -O - http://$to/; done; \
             {by_udp} || echo by UDP: no answer"
        );
        let said = kiln.output([
            "run",
            "--vm",
            "--rm",
            "--network",
            "lab",
            "--allow",
            "allowed:80",
            busybox,
            "sh",
            "-c",
            &script,
        ])?;
        let refused = said.matches("Connection refused").count();
        let served = said.matches("hello from kiln").count();
        if (refused, served, datagrams.asked()) != (2, 1, 1) {
            return Err(format!("{served} served, {refused} refused, {} by UDP: {said}", datagrams.asked()));
        }
        expect(&said, "by UDP: no answer")?;
        kiln.output(["rm", "--force", "allowed", "other"])?;
        kiln.output(["network", "rm", "lab"])?;
        Ok(((), said))
    })
}

/// The text at a place of a JSON document.
fn field(json: &str, pointer: &str) -> Outcome<String> {
    let value: serde_json::Value = serde_json::from_str(json).map_err(|error| format!("{error}: {json}"))?;
    let text = value.pointer(pointer).and_then(serde_json::Value::as_str);
    text.map(str::to_owned).ok_or_else(|| format!("no {pointer} in {json}"))
}

/// What is said to who asks by UDP.
const DATAGRAMS: &str = "hello by UDP";

/// A server of TFTP (RFC 1350) with one short file, on this host.
struct DatagramServer {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl DatagramServer {
    fn begin(ip: &str) -> Outcome<Self> {
        let problem = |error: std::io::Error| format!("cannot serve UDP at {ip}: {error}");
        let socket = UdpSocket::bind((ip, 0)).map_err(problem)?;
        let address = socket.local_addr().map_err(problem)?;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        // It ends with the demo.
        std::thread::spawn(move || {
            let mut packet = [0; 600];
            while let Ok((length, from)) = socket.recv_from(&mut packet) {
                // A request to read is answered with the first and last block; its acknowledgement with nothing.
                if packet[..length].starts_with(&[0, 1]) {
                    count.fetch_add(1, Ordering::Relaxed);
                    let _ = socket.send_to(&[&[0, 3, 0, 1], DATAGRAMS.as_bytes(), b"\n"].concat(), from);
                }
            }
        });
        Ok(Self { address, asked })
    }

    /// How often somebody asked.
    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

/// `ssh` and `scp` as they are on any host.
fn log_in(story: &mut Story, kiln: &Kiln) -> Outcome {
    story.step("kiln ssh: a login, without a server, a port or a password in the image", || {
        let said =
            kiln.output(["ssh", "dev", "--", "echo $USER on $(hostname); loginctl --version | head -1"])?;
        expect(&said, "root on ")?;
        Ok(((), said))
    })?;
    story.step("scp, with what kiln ssh-config prints", || {
        let directory = tempfile::tempdir().map_err(|error| format!("cannot make a directory: {error}"))?;
        let (config, file) = (directory.path().join("config"), directory.path().join("note"));
        std::fs::write(&config, kiln.output(["ssh-config", "dev"])?)
            .and_then(|()| std::fs::write(&file, "carried by scp\n"))
            .map_err(|error| format!("cannot write: {error}"))?;
        let mut scp = Command::new("scp");
        scp.env("KILN_HOME", kiln.home()).arg("-q").arg("-F").arg(&config).arg(&file).arg("dev:/tmp/note");
        capture(&mut scp)?;
        let there = kiln.output(["exec", "dev", "cat", "/tmp/note"])?;
        expect(&there, "carried by scp")?;
        Ok(((), there))
    })
}

fn break_and_put_back(story: &mut Story, kiln: &Kiln) -> Outcome {
    story.step("kiln snapshot create --memory: one copy is saved, as it runs", || {
        Ok(((), kiln.output(["snapshot", "create", "--memory", "broken", "before"])?))
    })?;
    story.step("break it on purpose", || {
        kiln.output(["exec", "broken", "sh", "-c", "rm -rf /usr/bin /usr/sbin /etc/systemd; sync || true"])?;
        let status = kiln.command(["exec", "broken", "systemctl", "is-system-running"]).status();
        match status.ok().and_then(|status| status.code()) {
            Some(127) => Ok(((), "systemctl: no such command".to_owned())),
            other => Err(format!("it should not find its programs any more, and says {other:?}")),
        }
    })?;
    story.step("kiln snapshot restore: it goes on from where it was saved", || {
        kiln.output(["snapshot", "restore", "--force", "broken", "before"])?;
        kiln.output(["start", "broken"])?;
        Ok(((), until_it_runs(kiln, "broken")?))
    })
}

/// Waits until systemd says that all is started and well.
fn until_it_runs(kiln: &Kiln, name: &str) -> Outcome<String> {
    let begun = Instant::now();
    loop {
        let output = kiln.command(["exec", name, "systemctl", "is-system-running"]).output();
        let output = output.map_err(|error| format!("cannot run kiln exec: {error}"))?;
        let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match state.as_str() {
            "running" => return Ok(format!("systemd: {state}")),
            "degraded" | "maintenance" | "stopping" => {
                return Err(format!("{state}: {}", kiln.output(["exec", name, "systemctl", "--failed"])?));
            }
            _ if begun.elapsed() > TO_BOOT => {
                return Err(format!("after {} s it is {state:?}", TO_BOOT.as_secs()));
            }
            _ => std::thread::sleep(Duration::from_millis(500)),
        }
    }
}
