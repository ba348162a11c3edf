//! A hypervisor and nothing else: QEMU with the same kernel, a busybox shell that answers on a port, saved and restored by
//! hand. What machines cost beyond this is Kiln's own.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::slirp::{accelerator_options, early_rate, found, pack, unpacked_kernel};
use crate::shell::{Outcome, capture};

/// The modules that a port takes, in the order in which they are loaded: in newer kernels `virtio` needs `virtio_ring`, and in none
/// the other way round.
const MODULES: [&str; 4] = ["virtio_ring.ko", "virtio.ko", "virtio_mmio.ko", "virtio_console.ko"];
const MEBIBYTES: u32 = 256;
const PATIENCE: Duration = Duration::from_secs(120);

/// A kernel and a root to boot, and what was saved of a guest that booted.
pub(super) struct Bare {
    directory: tempfile::TempDir,
    kernel: String,
}

/// A guest that runs; it ends when this is dropped.
pub(super) struct Guest {
    qemu: Child,
    link: UnixStream,
}

/// What a guest's shell does before it answers.
#[derive(Debug, Clone, Copy)]
pub(super) enum Asked {
    /// Nothing.
    Answer,
    /// It runs a command.
    Command,
}

impl Bare {
    pub(super) fn new() -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("kiln-bare-").tempdir();
        let directory = directory.map_err(|error| format!("cannot make a directory: {error}"))?;
        let package = unpacked_kernel(directory.path())?;
        let root = directory.path().join("root");
        make_root(&package, &root)?;
        pack(&root, &directory.path().join("initramfs"))?;
        let kernel = found(&package.join("boot"), "vmlinuz-")?;
        Ok(Self { directory, kernel })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self, name: &str, share: &str, state: Option<&Path>) -> Outcome<Guest> {
        let (link, monitor) = (self.at(&format!("{name}.link")), self.at(&format!("{name}.qmp")));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-machine", "microvm,acpi=on,memory-backend=memory,suppress-vmdesc=on"]);
        command.args(["-global", "migration.send-configuration=off"]);
        command.args(accelerator_options()).args(["-smp", "1", "-m", &format!("{MEBIBYTES}M")]);
        let memory = self.at("memory").display().to_string();
        command.args([
            "-object",
            &format!("memory-backend-file,id=memory,size={MEBIBYTES}M,share={share},mem-path={memory}"),
        ]);
        match state {
            None => {
                command.args(["-kernel", &self.kernel, "-initrd"]).arg(self.at("initramfs"));
                command.args([
                    "-append",
                    &format!("quiet panic=-1 mitigations=off tsc=reliable{}", early_rate()),
                ]);
            }
            Some(state) => {
                command.args(["-incoming", &format!("exec:cat {}", state.display())]);
            }
        }
        command.args(["-chardev", &format!("socket,id=link,path={},server=on,wait=off", link.display())]);
        command.args(["-device", "virtio-serial-device", "-device", "virtserialport,chardev=link,name=link"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let qemu = command.spawn().map_err(|error| format!("cannot start QEMU: {error}"))?;
        let link = connect(&link)?;
        link.set_read_timeout(Some(PATIENCE)).map_err(|error| format!("cannot set a timeout: {error}"))?;
        Ok(Guest { qemu, link })
    }

    /// Boots it; how long it took until its shell said so, in seconds. It is saved then.
    pub(super) fn boot(&self) -> Outcome<f64> {
        let memory = self.at("memory");
        let made = std::fs::File::create(&memory);
        made.and_then(|file| file.set_len(u64::from(MEBIBYTES) << 20))
            .map_err(|error| format!("cannot make {}: {error}", memory.display()))?;
        let begun = Instant::now();
        let mut guest = self.start("booted", "on", None)?;
        guest.hear()?;
        let took = begun.elapsed().as_secs_f64();
        let mut monitor = Monitor::open(&self.at("booted.qmp"))?;
        monitor.execute("{\"execute\":\"stop\"}")?;
        monitor.execute(&format!(
            "{{\"execute\":\"xen-save-devices-state\",\"arguments\":{{\"filename\":\"{}\",\"live\":false}}}}",
            self.at("state").display()
        ))?;
        Ok(took)
    }

    /// Restores it, and has its shell do something; it and how long that took, in seconds.
    pub(super) fn clone(&self, name: &str, what: Asked) -> Outcome<(Guest, f64)> {
        let begun = Instant::now();
        let mut guest = self.start(name, "off", Some(&self.at("state")))?;
        guest.ask(what)?;
        Ok((guest, begun.elapsed().as_secs_f64()))
    }
}

impl Guest {
    fn hear(&mut self) -> Outcome {
        let mut byte = [0];
        self.link.read_exact(&mut byte).map_err(|error| format!("the guest says nothing: {error}"))
    }

    fn ask(&mut self, what: Asked) -> Outcome {
        let line: &[u8] = match what {
            Asked::Answer => b":\n",
            Asked::Command => b"/bin/busybox true\n",
        };
        self.link.write_all(line).map_err(|error| format!("cannot ask the guest: {error}"))?;
        self.hear()
    }

    pub(super) fn pid(&self) -> u32 {
        self.qemu.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// QEMU's monitor, for two commands.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn open(path: &Path) -> Outcome<Self> {
        let mut monitor = Self(BufReader::new(connect(path)?));
        monitor.line()?;
        monitor.execute("{\"execute\":\"qmp_capabilities\"}")?;
        Ok(monitor)
    }

    fn line(&mut self) -> Outcome<String> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Err("QEMU ended".to_owned()),
            Ok(_) => Ok(line),
            Err(error) => Err(format!("cannot hear QEMU: {error}")),
        }
    }

    fn execute(&mut self, command: &str) -> Outcome {
        self.0
            .get_mut()
            .write_all(command.as_bytes())
            .map_err(|error| format!("cannot tell QEMU: {error}"))?;
        loop {
            let line = self.line()?;
            if line.contains("\"return\"") {
                return Ok(());
            }
            if line.contains("\"error\"") {
                return Err(format!("QEMU refused {command}: {line}"));
            }
        }
    }
}

fn connect(path: &Path) -> Outcome<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if begun.elapsed() > PATIENCE => {
                return Err(format!("cannot connect to {}: {error}", path.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
        }
    }
}

fn make_root(package: &Path, root: &Path) -> Outcome {
    let fail = |error: std::io::Error| format!("cannot make the guest's root: {error}");
    let busybox = kiln_fixtures::require("busybox").ok_or("busybox is missing: see the skips above")?;
    for directory in ["bin", "dev", "modules"] {
        std::fs::create_dir_all(root.join(directory)).map_err(fail)?;
    }
    std::fs::copy(busybox, root.join("bin/busybox")).map_err(fail)?;
    let mut init = String::from("#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs none /dev\n");
    let files = capture(Command::new("find").arg(package).args(["-name", "*.ko"]))?;
    for module in MODULES {
        let Some(file) = files.lines().find(|file| file.rsplit('/').next() == Some(module)) else { continue };
        std::fs::copy(file, root.join("modules").join(module)).map_err(fail)?;
        init += &format!("/bin/busybox insmod /modules/{module}\n");
    }
    // Before the port is there, a shell would make a plain file by its name. A redirection that fails ends a shell, so another
    // tries the port until the host has answered.
    init += "until [ -c /dev/vport0p1 ] && (exec 3<>/dev/vport0p1) 2> /dev/null; do :; done\nexec 3<>/dev/vport0p1\n";
    init += "echo >&3\nwhile read line <&3; do $line; echo >&3; done\n";
    let path = root.join("init");
    std::fs::write(&path, init).map_err(fail)?;
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).map_err(fail)
}
