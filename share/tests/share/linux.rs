//! Linux's own client, in a guest under QEMU.
//!
//! The guest has one serial port of virtio for each mount and [`GUEST`] as its only process, which mounts the shares with three
//! kinds of caches and uses them as programs do. What it finds comes over its console.
//!
//! Needs a kernel with modules for 9P and virtio: `KILN_TEST_KERNEL` names a Debian package `linux-image-*`, or a directory that
//! has `boot/vmlinuz-*` and `lib/modules/*`, as an unpacked one has.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kiln_fixtures::{find_program, require, require_root, skip};
use kiln_share::{Options, Share};

const GUEST: &str = include_str!("guest.c");
/// In the order in which they are loaded; those that are not there are built in.
const MODULES: [&str; 9] =
    ["virtio_ring", "virtio", "virtio_mmio", "virtio_console", "netfs", "fscache", "9pnet", "9pnet_fd", "9p"];
const PORTS: [&str; 5] = ["raw", "none", "mmap", "loose", "single"];
/// What goes over the bare port each way.
const RAW: usize = 16 << 20;
/// Without KVM, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(480);

struct Kernel {
    image: PathBuf,
    modules: Vec<PathBuf>,
}

fn kernel(work: &Path) -> Option<Kernel> {
    let named = std::env::var_os("KILN_TEST_KERNEL").map(PathBuf::from);
    let mut directory = named.or_else(kiln_fixtures::debian_kernel)?;
    if directory.is_file() {
        let package = std::mem::replace(&mut directory, work.join("kernel"));
        let unpacked = Command::new("dpkg-deb").arg("-x").args([&package, &directory]).status().unwrap();
        assert!(unpacked.success(), "{} cannot be unpacked", package.display());
    }
    let mut images = fs::read_dir(directory.join("boot")).unwrap().map(|entry| entry.unwrap().path());
    let image = images.find(|path| path.to_string_lossy().contains("vmlinuz-")).expect("a kernel");
    let mut all = HashMap::new();
    modules_below(&directory.join("lib/modules"), &mut all);
    let modules: Vec<PathBuf> = MODULES.iter().filter_map(|name| all.get(*name).cloned()).collect();
    Some(Kernel { image, modules })
}

fn modules_below(directory: &Path, found: &mut HashMap<String, PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            modules_below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "ko") {
            found.insert(path.file_stem().unwrap().to_string_lossy().into_owned(), path);
        }
    }
}

/// An archive in cpio's `newc` format, which kernels unpack as their first root.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        let inode = self.0.len() + 1;
        let (size, name_size) = (data.len(), name.len() + 1);
        write!(
            self.0,
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}{name}\0",
            0, 0, 1, 0, 0, 0, 0, 0, 0
        )
        .unwrap();
        self.pad();
        self.0.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.0
    }
}

fn initramfs(kernel: &Kernel, compiler: &Path, busybox: &Path, work: &Path) -> PathBuf {
    let source = work.join("guest.c");
    fs::write(&source, GUEST).unwrap();
    let program = work.join("guest");
    let compiled = Command::new(compiler)
        .args(["-static", "-O2", "-pthread", "-Wall", "-o"])
        .args([&program, &source])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "modules.d"] {
        archive.add(directory, 0o40_755, &[]);
    }
    // `system` wants a shell by this name.
    for name in ["bin/busybox", "bin/sh"] {
        archive.add(name, 0o100_755, &fs::read(busybox).unwrap());
    }
    archive.add("init", 0o100_755, &fs::read(program).unwrap());
    let mut list = String::new();
    for module in &kernel.modules {
        let name = format!("modules.d/{}", module.file_name().unwrap().to_string_lossy());
        archive.add(&name, 0o100_644, &fs::read(module).unwrap());
        list += &format!("/{name}\n");
    }
    archive.add("modules", 0o100_644, list.as_bytes());
    let path = work.join("initramfs");
    fs::write(&path, archive.finish()).unwrap();
    path
}

/// On a busy machine the guest cannot measure its clock against a timer, and waits for ever: it is told.
fn frequency() -> String {
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = processors.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1));
    let khz = line.and_then(|mhz| mhz.trim().replace('.', "").parse::<u64>().ok());
    khz.map_or_else(String::new, |khz| format!(" tsc_early_khz={khz}"))
}

struct Guest {
    process: Child,
    lines: Receiver<String>,
    work: PathBuf,
}

impl Guest {
    fn start(qemu: &Path, kernel: &Kernel, initramfs: &Path, work: &Path) -> Self {
        let mut command = Command::new(qemu);
        command
            .args(["-M", "microvm,acpi=on", "-accel", "tcg", "-cpu", "max", "-m", "256"])
            .args(["-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"])
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 reboot=t{}", frequency())])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-device", "virtio-serial-device,max_ports=8"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        for name in PORTS {
            let socket = work.join(name).display().to_string();
            command
                .args(["-chardev", &format!("socket,id={name},path={socket},server=on,wait=off")])
                .args(["-device", &format!("virtserialport,chardev={name},name=kiln.{name}")]);
        }
        let mut process = command.spawn().unwrap();
        let console = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in console.split(b'\n').map_while(Result::ok) {
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        });
        Self { process, lines, work: work.to_owned() }
    }

    fn port(&self, name: &str) -> UnixStream {
        let until = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(self.work.join(name)) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < until, "no port: {error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the guest says, and the last lines in any case.
fn listen(guest: &Guest) -> (Vec<String>, HashMap<String, f64>) {
    let (mut lines, mut rates) = (Vec::new(), HashMap::new());
    let until = Instant::now() + PATIENCE;
    loop {
        match guest.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) if line == "done" => return (lines, rates),
            Ok(line) => {
                if let ["rate", name, amount, time] = line.split(' ').collect::<Vec<_>>()[..] {
                    let rate = amount.parse::<f64>().unwrap() / time.parse::<f64>().unwrap();
                    rates.insert(name.to_owned(), rate);
                }
                lines.push(line);
            }
            Err(RecvTimeoutError::Timeout) => panic!("the guest hangs after {lines:#?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("the guest is gone after {lines:#?}"),
        }
    }
}

#[test]
fn linux_mounts_a_share_and_uses_it_as_a_filesystem() {
    let qemu = match find_program("qemu-system-x86_64") {
        Some(qemu) if cfg!(target_arch = "x86_64") => qemu,
        _ => return skip("no qemu-system-x86_64 for this machine"),
    };
    let work = tempfile::tempdir().unwrap();
    let (Some(compiler), Some(busybox), true) = (require("cc"), require("busybox"), require_root()) else {
        return;
    };
    let Some(kernel) = kernel(work.path()) else { return };
    let host = tempfile::tempdir().unwrap();
    for mode in ["none", "mmap", "loose"] {
        fs::create_dir(host.path().join(mode)).unwrap();
        fs::write(host.path().join(mode).join("locked"), vec![0; 300]).unwrap();
    }
    fs::write(host.path().join("only"), "read me").unwrap();
    // Somebody else on the host holds a part of each.
    let held: Vec<fs::File> = ["none", "mmap", "loose"]
        .map(|mode| {
            let path = host.path().join(mode).join("locked");
            let file = fs::File::options().write(true).open(path).unwrap();
            let lock = nix::libc::flock {
                l_type: nix::libc::F_WRLCK as i16,
                l_whence: 0,
                l_start: 100,
                l_len: 100,
                l_pid: 0,
            };
            nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
            file
        })
        .into();

    let initramfs = initramfs(&kernel, &compiler, &busybox, work.path());
    let guest = Guest::start(&qemu, &kernel, &initramfs, work.path());
    let mut raw = guest.port("raw");
    let read_only = Options { read_only: true, ..Options::default() };
    let single = (guest.port("single"), Share::file(host.path().join("only"), read_only).unwrap());
    let [none, mmap, loose] = ["none", "mmap", "loose"].map(|mode| {
        let share = Share::directory(host.path().join(mode), Options::default()).unwrap();
        (guest.port(mode), share)
    });
    let (lines, rates) = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut data = vec![0; 1 << 16];
            (0..RAW / data.len()).for_each(|_| raw.write_all(&data).unwrap());
            (0..RAW / data.len()).for_each(|_| raw.read_exact(&mut data).unwrap());
        });
        for (stream, share) in [&single, &none, &loose] {
            scope.spawn(move || share.serve(stream, stream));
        }
        scope.spawn(move || serve_async(mmap.0, &mmap.1));
        let heard = listen(&guest);
        // The guest reboots, which ends it; its ports close.
        drop(guest);
        heard
    });
    drop(held);

    let report = lines.join("\n");
    let checks = 3 * 15 + 1;
    assert!(!report.contains("failed"), "{report}");
    assert_eq!(lines.iter().filter(|line| line.starts_with("ok ")).count(), checks, "{report}");
    for mode in ["none", "mmap", "loose"] {
        let at = |name: &str| host.path().join(mode).join(name);
        assert_eq!(fs::read_to_string(at("log")).unwrap(), "one two three", "{mode}");
        let expected = if mode == "none" { "mapped for reading" } else { "MAPPED for reading" };
        assert_eq!(fs::read_to_string(at("map")).unwrap(), expected, "{mode}");
        assert_eq!(at("attr").metadata().unwrap().uid(), 1000, "{mode}");
        let mut left: Vec<_> = fs::read_dir(at(""))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["attr", "locked", "log", "map", "new", "to", "x"], "{mode}");
    }
    assert_eq!(fs::read_to_string(host.path().join("only")).unwrap(), "read me");
    let mut rates: Vec<_> = rates.into_iter().collect();
    rates.sort_by(|a, b| a.0.cmp(&b.0));
    show(&rates);
}

/// As a machine's supervisor serves it.
fn serve_async(stream: UnixStream, share: &Share) {
    stream.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _ = runtime.block_on(async {
        let (reader, writer) = tokio::net::UnixStream::from_std(stream).unwrap().into_split();
        share.serve_async(reader, writer).await
    });
}

/// Rates depend on the machine: whoever wants to know them reads them with `--nocapture`, and nothing is asserted.
#[allow(clippy::print_stdout)]
fn show(rates: &[(String, f64)]) {
    for (name, rate) in rates {
        if name.starts_with("lookups") {
            println!("{name:16} {:8.0} us for a name that is not there and one that is", 1.0 / rate);
        } else {
            println!("{name:16} {rate:8.1} MB/s");
        }
    }
}
