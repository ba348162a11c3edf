//! A guest with QEMU's own user network, to measure beside: the kernel, the processor and the memory that machines have, a virtio
//! network card, and nothing but busybox in it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::machine_network::{PORT, script};
use crate::shell::{Outcome, capture};

/// Modules in the order in which they are loaded; what the kernel has built in is not among its files.
const MODULES: [&str; 6] =
    ["virtio_ring.ko", "virtio.ko", "virtio_mmio.ko", "failover.ko", "net_failover.ko", "virtio_net.ko"];

/// The running guest; it ends when this is dropped.
pub(super) struct Slirp {
    qemu: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Slirp {
    /// Boots it. It takes what the host's loopback gives at `port`.
    pub(super) fn boot(port: u16) -> Outcome<Self> {
        let missing = |what: &str| format!("{what} is missing: see the skips above");
        let qemu = kiln_fixtures::require("qemu-system-x86_64").ok_or_else(|| missing("QEMU"))?;
        let busybox = kiln_fixtures::require("busybox").ok_or_else(|| missing("busybox"))?;
        let directory = tempfile::tempdir().map_err(|error| format!("cannot make a directory: {error}"))?;
        let (unpacked, root) = (unpacked_kernel(directory.path())?, directory.path().join("root"));
        make_root(&busybox, &unpacked, &root, port)?;
        let initramfs = directory.path().join("initramfs");
        pack(&root, &initramfs)?;
        let kernel = found(&unpacked.join("boot"), "vmlinuz-")?;
        let host = free_port()?;
        let mut command = Command::new(qemu);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-machine", "microvm,acpi=on"]).args(accelerator_options());
        command.args(["-smp", "1", "-m", "512M", "-kernel", &kernel]);
        command.arg("-initrd").arg(&initramfs);
        command.args(["-append", &format!("panic=-1 mitigations=off tsc=reliable{}", early_rate())]);
        command.args(["-netdev", &format!("user,id=net,hostfwd=tcp:127.0.0.1:{host}-:{PORT}")]);
        command.args(["-device", "virtio-net-device,netdev=net"]);
        let qemu = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let qemu = qemu.map_err(|error| format!("cannot start QEMU: {error}"))?;
        Ok(Self { qemu, port: host, _directory: directory })
    }

    /// Where what it gives is published.
    pub(super) fn published(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }
}

impl Drop for Slirp {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Debian's kernel and its modules, unpacked below `directory`.
pub(super) fn unpacked_kernel(directory: &Path) -> Outcome<PathBuf> {
    let package = kiln_fixtures::debian_kernel().ok_or("a kernel is missing: see the skips above")?;
    let unpacked = directory.join("package");
    capture(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
    Ok(unpacked)
}

/// Makes an initramfs of a root.
pub(super) fn pack(root: &Path, initramfs: &Path) -> Outcome {
    let archive = std::fs::File::create(initramfs).map_err(|error| format!("cannot write: {error}"))?;
    let mut pack = Command::new("sh");
    pack.args(["-c", "find . | busybox cpio -o -H newc"]).current_dir(root).stdout(archive);
    let packed = pack.stderr(Stdio::null()).status().map_err(|error| format!("cannot run cpio: {error}"))?;
    if packed.success() { Ok(()) } else { Err("cpio failed".to_owned()) }
}

/// What executes guests here, and what processor they see: the one that Kiln's see.
pub(super) fn accelerator_options() -> [&'static str; 4] {
    if usable_kvm() {
        ["-accel", "kvm", "-cpu", "host"]
    } else {
        ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"]
    }
}

fn make_root(busybox: &Path, package: &Path, root: &Path, port: u16) -> Outcome {
    let fail = |error: std::io::Error| format!("cannot make the guest's root: {error}");
    for directory in ["bin", "dev", "modules", "proc"] {
        std::fs::create_dir_all(root.join(directory)).map_err(fail)?;
    }
    std::fs::copy(busybox, root.join("bin/busybox")).map_err(fail)?;
    let mut init = String::from(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nmount -t devtmpfs none /dev\nmount -t proc none /proc\n",
    );
    let files = capture(Command::new("find").arg(package).args(["-name", "*.ko"]))?;
    for module in MODULES {
        let Some(file) = files.lines().find(|file| file.rsplit('/').next() == Some(module)) else { continue };
        std::fs::copy(file, root.join("modules").join(module)).map_err(fail)?;
        init += &format!("insmod /modules/{module}\n");
    }
    init += "ip link set lo up\nip link set eth0 up\nip addr add 10.0.2.15/24 dev eth0\nip route add default via 10.0.2.2\n";
    init += &script("10.0.2.2", port);
    let path = root.join("init");
    std::fs::write(&path, init).map_err(fail)?;
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).map_err(fail)
}

pub(super) fn found(directory: &Path, prefix: &str) -> Outcome<String> {
    let names = capture(Command::new("ls").arg(directory))?;
    let name = names.lines().find(|name| name.starts_with(prefix));
    let name = name.ok_or_else(|| format!("there is no {prefix}… in {}", directory.display()))?;
    Ok(directory.join(name).display().to_string())
}

/// A port of loopback's that is free now.
fn free_port() -> Outcome<u16> {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| format!("cannot find a free port: {error}"))
}

fn processor(field: &str) -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// What runs guests here.
pub(super) fn accelerator() -> &'static str {
    if usable_kvm() { "KVM" } else { "TCG: machines are emulated" }
}

/// As Kiln decides.
fn usable_kvm() -> bool {
    let flags = processor("flags").unwrap_or_default();
    Path::new("/dev/kvm").exists() && flags.split(' ').any(|flag| flag == "vmx" || flag == "svm")
}

/// A translated guest that measures its clock on a busy host may wait for ever: it is told, as machines are.
pub(super) fn early_rate() -> String {
    match processor("cpu MHz").and_then(|rate| rate.parse::<f64>().ok()) {
        Some(rate) if !usable_kvm() => format!(" tsc_early_khz={:.0}", rate * 1000.0),
        _ => String::new(),
    }
}
