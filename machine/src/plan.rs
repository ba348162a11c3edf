//! From an instance's specification to what hypervisor and guest are told.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_contract::{
    BackendError, Digest, ErrorKind, InstanceRecord, InstanceSpec, MachineSpec, MountKind, MountSpec,
};
use kiln_link::message::{Configure, Device, HostFile, Mount, MountSource, Process, Root, TerminalSize};

use crate::{Shape, rights, system};

/// `/dev/shm` if nothing is said, in bytes: Docker's figure.
const SHM: u64 = 64 << 20;
/// The guest's gateway, as `kiln-usernet` has it unless told otherwise.
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 0, 1));
/// Bytes of randomness for a guest's generator.
const ENTROPY: usize = 64;

/// Processors, memory and devices, as templates are made for them: whole processors, and memory in steps, so that there are few.
///
/// # Errors
/// Less memory than a kernel and its guest need.
pub(crate) fn shape(spec: &InstanceSpec) -> Result<Shape, BackendError> {
    const LEAST: u64 = 128 << 20;
    const STEP: u64 = 64 << 20;
    let memory = spec.resources.memory.unwrap_or(MachineSpec::MEMORY).bytes();
    if memory < LEAST {
        return Err(BackendError::new(
            ErrorKind::Invalid,
            format!("a machine needs at least {} MiB of memory", LEAST >> 20),
        )
        .hint("give it more with --memory"));
    }
    let cpus = spec.resources.cpus.map_or(1, |limit| limit.millis.div_ceil(1000).max(1));
    let network = kiln_net::tap_network(&spec.network.mode).is_some();
    Ok(Shape { cpus, memory: memory.div_ceil(STEP) * STEP, network })
}

/// The writable disk, in bytes: whole blocks.
pub(crate) fn disk_size(spec: &InstanceSpec) -> u64 {
    spec.machine.disk.unwrap_or(MachineSpec::DISK).bytes().next_multiple_of(4096)
}

/// The host name.
pub(crate) fn hostname(record: &InstanceRecord) -> String {
    record.spec.hostname.clone().unwrap_or_else(|| record.id.short().to_owned())
}

/// Files that the host decides.
pub(crate) const HOST_FILES: [&str; 5] = [
    "/etc/hostname",
    "/etc/machine-id",
    // Where D-Bus was installed before systemd it is a file of its own.
    "/var/lib/dbus/machine-id",
    "/etc/hosts",
    "/etc/resolv.conf",
];

/// The network that it shares with others, if it is on one.
pub(crate) fn network_of(spec: &InstanceSpec) -> Option<&str> {
    let mode = spec.network.mode.as_str();
    kiln_net::tap_network(mode).or(Some(mode)).filter(|name| !matches!(*name, "default" | "usernet" | "none"))
}

/// Random bytes for a guest's generator.
fn entropy() -> Result<Vec<u8>, BackendError> {
    let mut entropy = vec![0; ENTROPY];
    getrandom::fill(&mut entropy).map_err(|error| {
        BackendError::new(ErrorKind::Failed, format!("cannot draw random bytes: {error}"))
    })?;
    Ok(entropy)
}

/// What the guest is told of who it is. `disk` is the size of its writable disk in bytes, and `None` for a machine that has a
/// root already; `device` is its place on the network that it has a device for.
///
/// # Errors
/// If the operating system gives no random bytes.
pub(crate) fn configure(
    record: &InstanceRecord,
    disk: Option<u64>,
    device: Option<Device>,
) -> Result<Configure, BackendError> {
    let spec = &record.spec;
    let hostname = hostname(record);
    let machine_id = Digest::of(format!("machine-id {}", record.id).as_bytes()).hex()[..32].to_owned();
    let file =
        |path: &str, content: String| HostFile { path: path.to_owned(), content: content.into_bytes() };
    let [hostname_file, machine_id_file, bus_file, hosts_file, resolver_file] = HOST_FILES;
    let mut files = vec![
        file(hostname_file, format!("{hostname}\n")),
        file(machine_id_file, format!("{machine_id}\n")),
        file(bus_file, format!("{machine_id}\n")),
        file(hosts_file, hosts(spec, &hostname)),
        file(resolver_file, resolv_conf(spec)),
    ];
    if spec.machine.system {
        files.extend(system::files(name_server(spec)));
    }
    let root = |disk_size| Root {
        read_only: spec.security.read_only,
        system: spec.machine.system,
        shm_size: spec.resources.shm_size.map_or(SHM, kiln_contract::ByteSize::bytes),
        disk_size,
    };
    Ok(Configure {
        device,
        hostname,
        machine_id,
        clock: now(),
        entropy: entropy()?,
        root: disk.map(root),
        mounts: mounts(spec),
        files,
        network: spec.network.mode != "none",
        sysctls: spec.security.sysctls.clone().into_iter().collect(),
    })
}

/// Nanoseconds since 1970.
pub(crate) fn now() -> u64 {
    u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0)
}

fn hosts(spec: &InstanceSpec, hostname: &str) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let _ = writeln!(text, "127.0.1.1\t{hostname}");
    for line in &spec.network.add_hosts {
        if let Some((name, address)) = line.split_once(':') {
            let _ = writeln!(text, "{address}\t{name}");
        }
    }
    text
}

/// The gateway answers names: those of neighbours, and all others as the host finds them, or who was named (`--dns`).
fn name_server(spec: &InstanceSpec) -> Option<IpAddr> {
    (spec.network.mode != "none").then_some(GATEWAY)
}

fn resolv_conf(spec: &InstanceSpec) -> String {
    let mut text = String::new();
    if let Some(server) = name_server(spec) {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (word, values) in [("search", &spec.network.dns_search), ("options", &spec.network.dns_options)] {
        if !values.is_empty() {
            let _ = writeln!(text, "{word} {}", values.join(" "));
        }
    }
    text
}

/// What a guest is told that rehearses being told who it is: as long as what will be, and true of nobody.
///
/// # Errors
/// If the operating system gives no random bytes.
pub(crate) fn rehearsal() -> Result<Configure, BackendError> {
    let file = |path: &str| HostFile { path: path.to_owned(), content: vec![b'\n'; 64] };
    Ok(Configure {
        machine_id: "0".repeat(32),
        clock: now(),
        entropy: entropy()?,
        files: HOST_FILES.map(file).to_vec(),
        ..Configure::default()
    })
}

/// What it then executes, the first that there is: what a start may be asked for, or the guest's own program.
pub(crate) const REHEARSED: [&str; 2] = ["true", "/proc/self/exe"];

/// A program that does nothing, as a process.
pub(crate) fn rehearsed(program: &str) -> Process {
    Process { args: vec![program.to_owned()], env: with_defaults(&[], false), ..Process::default() }
}

/// Mounts in the order in which they are made: parents before what is mounted in them.
pub(crate) fn in_order(spec: &InstanceSpec) -> Vec<&MountSpec> {
    let mut mounts: Vec<&MountSpec> = spec.mounts.iter().collect();
    mounts.sort_by_key(|mount| Path::new(&mount.target).components().count());
    mounts
}

fn mounts(spec: &InstanceSpec) -> Vec<Mount> {
    let mut shares = 0;
    let mount = |mount: &MountSpec| {
        let source = match &mount.kind {
            MountKind::Tmpfs(wanted) => {
                let mut options = vec![format!("mode={:o}", wanted.mode.unwrap_or(0o1777))];
                options.extend(wanted.size.map(|size| format!("size={}", size.bytes())));
                // Flags of the mount are not options of the filesystem.
                let of_filesystem = |option: &&String| option.contains('=');
                options.extend(wanted.options.iter().filter(of_filesystem).cloned());
                MountSource::Tmpfs { options: options.join(",") }
            }
            // Shares are numbered in the order in which they stand.
            MountKind::Bind { source, .. } => {
                let number = shares;
                shares += 1;
                MountSource::Share { number, file: !source.is_dir() }
            }
            MountKind::Volume { .. } => {
                let number = shares;
                shares += 1;
                MountSource::Share { number, file: false }
            }
        };
        Mount { target: mount.target.clone(), source, read_only: mount.read_only }
    };
    in_order(spec).into_iter().map(mount).collect()
}

/// The workload's first process.
///
/// # Errors
/// As [`confined`].
pub(crate) fn process(spec: &InstanceSpec, size: Option<(u16, u16)>) -> Result<Process, BackendError> {
    let process = &spec.process;
    let (rows, columns) = size.unwrap_or((24, 80));
    Ok(Process {
        args: process.args.clone(),
        env: with_defaults(&process.env, process.tty),
        cwd: process.cwd.clone(),
        user: process.user.clone(),
        groups: process.groups.clone(),
        terminal: process.tty.then_some(TerminalSize { rows, columns }),
        stdin: process.stdin,
        ..confined(spec)?
    })
}

/// A process that may do what the workload may, and has nothing else yet.
///
/// # Errors
/// [`ErrorKind::Invalid`]: a capability or limit that there is not, which an older version let pass.
pub(crate) fn confined(spec: &InstanceSpec) -> Result<Process, BackendError> {
    Ok(Process {
        capabilities: rights::capabilities(spec)?,
        limits: rights::limits(spec)?,
        no_new_privileges: rights::no_new_privileges(spec),
        ..Process::default()
    })
}

/// What every process expects to find in its environment.
pub(crate) fn with_defaults(env: &[String], tty: bool) -> Vec<String> {
    let has = |name: &str| env.iter().any(|variable| variable.split('=').next() == Some(name));
    let mut env = env.to_vec();
    if !has("PATH") {
        env.push("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    }
    if tty && !has("TERM") {
        env.push("TERM=xterm".to_owned());
    }
    env
}

/// A file that is there if the next start is to boot the kernel.
pub(crate) fn cold(dir: &kiln_contract::InstanceDir) -> PathBuf {
    dir.path().join("cold")
}

/// Where a machine keeps what its own forks need of what it was forked from itself.
pub(crate) fn base(dir: &kiln_contract::InstanceDir) -> PathBuf {
    dir.path().join("base")
}

/// Where a machine keeps what it was forked with, or put back to, until its next start.
pub(crate) fn saved(dir: &kiln_contract::InstanceDir) -> PathBuf {
    dir.path().join("saved")
}
