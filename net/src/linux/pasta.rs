//! The network of unprivileged containers: `pasta` (package passt).
//!
//! pasta makes a tap interface inside the container's network namespace, gives it the host's own address, and turns
//! what comes out of it into ordinary connections of an ordinary process; published ports are sockets of its own.
//! It is started so that it
//! - stays in our user namespace, and is given the network namespace as its standard input (`--netns
//!   /proc/self/fd/0`): once it has dropped its capabilities it may not look into another process any more;
//! - stays in the foreground and dies with us (`PR_SET_PDEATHSIG`), and is found by its pid and start time in
//!   `instances/<id>/pasta.json` if it did not;
//! - tells that it is ready by writing its pid into a pipe (`--pid /dev/fd/1`);
//! - maps the gateway's address to the host's loopback only if the container asked for `host-gateway`.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_contract::{Attachment, Home, InstanceId, NetworkRequest, ProcessId, PublishSpec};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use super::namespace::Namespace;
use super::netlink::Netlink;
use super::{bridge, name_files, program};
use crate::{NetError, ports};

/// Queries to this link-local address are forwarded to the host's first name server.
const FORWARDER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const TUN: &str = "/dev/net/tun";

/// A running pasta.
#[derive(Debug)]
pub(super) struct Pasta {
    child: Child,
    state: PathBuf,
    addresses: Vec<IpAddr>,
    /// A forked child has a copy of this value, but it is not its pasta.
    owner: u32,
}

/// `instances/<id>/pasta.json`.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    process: ProcessId,
    addresses: Vec<IpAddr>,
}

pub(super) fn attach(home: &Home, request: &NetworkRequest) -> Result<(Attachment, Pasta), NetError> {
    if let Some(address) = request.network.address {
        let what = format!("the fixed address {address}");
        return Err(NetError::NotInMode { what, mode: "pasta".into() });
    }
    let path = request.namespace.as_deref().ok_or_else(|| {
        NetError::Invalid(
            "the network `pasta` needs a network namespace to connect, and none was given".into(),
        )
    })?;
    let namespace = Namespace::open(path)?;
    bridge::loopback(&namespace)?;
    let published = choose_ports(&request.ports)?;
    let map_gateway = name_files::wants_gateway(&request.network);
    let child = start(
        request,
        &published,
        File::open(path).map_err(NetError::doing("opening a namespace"))?,
        map_gateway,
    )?;

    let state = state_file(home, &request.id);
    let mut pasta = Pasta { child, state, addresses: Vec::new(), owner: std::process::id() };
    let (hosts, resolv_conf) = finish(&mut pasta, request, &namespace, map_gateway)?;
    let addresses = pasta.addresses.clone();
    let attachment =
        Attachment { addresses, hosts: Some(hosts), resolv_conf: Some(resolv_conf), ports: published };
    Ok((attachment, pasta))
}

/// What is known only once pasta has configured the interface.
fn finish(
    pasta: &mut Pasta,
    request: &NetworkRequest,
    namespace: &Namespace,
    map_gateway: bool,
) -> Result<(String, String), NetError> {
    let (addresses, gateway) = namespace.enter(|| {
        let look = || -> io::Result<_> {
            let mut netlink = Netlink::open()?;
            let addresses = netlink.addresses()?;
            Ok((addresses, netlink.default_route()?.and_then(|(gateway, _)| gateway)))
        };
        look().map_err(NetError::doing("reading the addresses that `pasta` gave"))
    })?;
    pasta.addresses = addresses
        .into_iter()
        .map(|(_, net)| IpAddr::V4(net.addr()))
        .filter(|address| !address.is_loopback())
        .collect();
    let start = start_time(pasta.child.id())
        .ok_or_else(|| NetError::Invalid("`pasta` ended as soon as it had started".into()))?;
    let process = ProcessId { pid: pasta.child.id(), start };
    let state = State { process, addresses: pasta.addresses.clone() };
    let bytes = serde_json::to_vec(&state).map_err(|error| NetError::Invalid(error.to_string()))?;
    if let Some(directory) = pasta.state.parent() {
        fs::create_dir_all(directory).map_err(NetError::doing(format!("making {}", directory.display())))?;
    }
    fs::write(&pasta.state, bytes).map_err(NetError::doing(format!("writing {}", pasta.state.display())))?;

    let gateway = gateway.filter(|_| map_gateway).map(IpAddr::V4);
    let hosts = name_files::hosts(request, pasta.addresses.first().copied(), gateway)?;
    let servers = match request.network.dns.as_slice() {
        [] => vec![FORWARDER.into()],
        asked => asked.to_vec(),
    };
    Ok((hosts, name_files::resolv_conf(&request.network, &servers)))
}

/// Finds out by binding whether the ports are free, and which are to be chosen. pasta binds them a moment later.
fn choose_ports(asked: &[PublishSpec]) -> Result<Vec<PublishSpec>, NetError> {
    Ok(ports::bind(asked)?.into_iter().map(|bound| bound.spec).collect())
}

fn start(
    request: &NetworkRequest,
    published: &[PublishSpec],
    namespace: File,
    map_gateway: bool,
) -> Result<Child, NetError> {
    let missing = NetError::ProgramMissing {
        program: "pasta",
        package: "passt",
        purpose: "the network of unprivileged containers",
    };
    let program = program::find("pasta").ok_or(missing)?;
    let messages: File =
        memfd_create("pasta", MemfdFlags::CLOEXEC).map_err(NetError::doing("making a memory file"))?.into();
    let mut said = messages.try_clone().map_err(NetError::doing("copying a descriptor"))?;
    let mut command = Command::new(program);
    command
        .args(["--config-net", "--foreground", "--quiet", "--stderr", "--pid", "/dev/fd/1"])
        .args(["--netns", "/proc/self/fd/0", "--dns-forward", &FORWARDER.to_string()])
        .args(["--ns-ifname", "eth0", "--tcp-ns", "none", "--udp-ns", "none"])
        .args(arguments(published))
        .stdin(namespace)
        .stdout(Stdio::piped())
        .stderr(messages);
    if !map_gateway {
        command.arg("--no-map-gw");
    }
    if super::can_bridge() {
        // Started by the real root it would become `nobody`, who may not enter the namespace.
        command.args(["--runas", "0"]);
    }
    // SAFETY: between fork and exec only this one system call is made.
    unsafe {
        command.pre_exec(|| set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into));
    }
    let mut child = command.spawn().map_err(NetError::doing("starting `pasta`"))?;
    let mut ready = [0; 1];
    let told = child.stdout.take().map_or(Ok(0), |mut stdout| stdout.read(&mut ready));
    if matches!(told, Ok(1)) {
        return Ok(child);
    }
    let _ = child.kill();
    let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
    let mut text = String::new();
    let _ = said.seek(SeekFrom::Start(0)).and_then(|_| said.read_to_string(&mut text));
    // It also says that it cannot reach the system logger, which is of no interest here.
    let lines: Vec<_> =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.ends_with("to syslog")).collect();
    let mut said = if lines.is_empty() { status } else { lines.join("; ") };
    if let Err(error) = rustix::fs::access(TUN, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK) {
        said = format!("{said} ({TUN}: {error}; every user must be able to open it)");
    }
    let doing = format!("connecting the container {}", request.name);
    Err(NetError::ProgramFailed { program: "pasta", doing, said })
}

/// `--tcp-ports` and `--udp-ports`: without them pasta would publish whatever the container listens on.
fn arguments(published: &[PublishSpec]) -> Vec<String> {
    let mut arguments = Vec::new();
    for (option, protocol) in
        [("--tcp-ports", kiln_contract::Protocol::Tcp), ("--udp-ports", kiln_contract::Protocol::Udp)]
    {
        let mut any = false;
        for port in published.iter().filter(|port| port.protocol == protocol) {
            any = true;
            let ports = format!("{}:{}", port.host_port, port.container_port);
            let specification = match port.host_address {
                Some(address) if !address.is_unspecified() => format!("{address}/{ports}"),
                _ => ports,
            };
            arguments.extend([option.to_owned(), specification]);
        }
        if !any {
            arguments.extend([option.to_owned(), "none".to_owned()]);
        }
    }
    arguments
}

impl Pasta {
    pub(super) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }
}

impl Drop for Pasta {
    /// Ends it, and waits for that.
    fn drop(&mut self) {
        if self.owner == std::process::id() {
            // Whoever reaps all children of this process may have been faster, and the number another's by now.
            let started = read_state(&self.state).map(|state| state.process.start);
            if started.is_some() && start_time(self.child.id()) == started {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
            let _ = fs::remove_file(&self.state);
        }
    }
}

/// Ends the pasta of an instance that another process started.
pub(super) fn end_of(home: &Home, id: &InstanceId) {
    let path = state_file(home, id);
    let Some(state) = read_state(&path) else { return };
    let pid = state.process.pid;
    if start_time(pid) == Some(state.process.start)
        && let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
    {
        let _ = kill_process(pid, Signal::KILL);
        let patience = Instant::now() + Duration::from_secs(2);
        while start_time(state.process.pid) == Some(state.process.start) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let _ = fs::remove_file(path);
}

/// The addresses of an instance that another process connected.
pub(super) fn addresses_of(home: &Home, id: &InstanceId) -> Vec<IpAddr> {
    read_state(&state_file(home, id))
        .filter(|state| start_time(state.process.pid) == Some(state.process.start))
        .map(|state| state.addresses)
        .unwrap_or_default()
}

fn read_state(path: &PathBuf) -> Option<State> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn state_file(home: &Home, id: &InstanceId) -> PathBuf {
    home.instance(id).path().join("pasta.json")
}

/// Field 22 of `/proc/<pid>/stat`, of a process that has not ended.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_contract::Protocol;

    #[test]
    fn nothing_is_published_that_was_not_asked_for() {
        assert_eq!(arguments(&[]), ["--tcp-ports", "none", "--udp-ports", "none"]);
        let port = |address: Option<&str>, protocol| PublishSpec {
            host_address: address.map(|address| address.parse().unwrap()),
            host_port: 8080,
            host_port_last: None,
            container_port: 80,
            protocol,
        };
        let arguments = arguments(&[port(Some("127.0.0.1"), Protocol::Tcp), port(None, Protocol::Tcp)]);
        let expected = ["--tcp-ports", "127.0.0.1/8080:80", "--tcp-ports", "8080:80", "--udp-ports", "none"];
        assert_eq!(arguments, expected);
    }

    #[test]
    fn a_process_is_told_by_its_start() {
        assert!(start_time(std::process::id()).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }
}
