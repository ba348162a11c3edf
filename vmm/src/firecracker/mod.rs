//! Firecracker: one process a machine, told what to be over its API (version 1.14).
//!
//! It needs KVM. What differs from QEMU, and how that is bridged:
//!
//! - It boots an uncompressed kernel.
//! - Memory is anonymous while a template boots: the memory file is written when it is saved. From then on it is mapped
//!   privately, as by QEMU. A machine that is saved later writes all of its memory, not what differs from the template's.
//! - Paths of disks and of the link's socket are part of a saved state, so they are names in the directory of the machine: links
//!   to what its configuration says. A process that restores a state in another directory finds that machine's own.
//! - Its disks have no names of ours: the kernel's command line tells the guest which is which, that the link is a socket, and
//!   that such a machine ends by a restart.
//! - The link breaks whenever a state is saved, and is made anew: see [`link`].

mod api;
mod http;
mod link;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_contract::{BackendError, Capabilities, ErrorKind, Hypervisor, MemoryKind, Vm, VmConfig, VmState};
use rustix::fs::{Mode, OFlags};

use crate::child::HypervisorProcess;
use crate::{Accelerator, VmmError, fingerprint};
use api::{Api, Json};
use link::Carrier;

/// The program.
const PROGRAM: &str = "firecracker";
/// The oldest version whose API has all that is used: free-page reporting came with it.
const OLDEST: (u32, u32) = (1, 14);

/// Names in a machine's directory. Those of disks and link are in every saved state.
const API: &str = "firecracker.sock";
const LINK: &str = "firecracker.vsock";
const IMAGE: &str = "firecracker.image";
const DISK: &str = "firecracker.disk";
/// What it says.
const WORDS: &str = "firecracker.log";
/// What the guest writes to its serial console.
const CONSOLE: &str = "console.log";

/// Where the state is in what was saved.
const STATE: &str = "state";
/// Where all memory is, of a machine that had some of its own: in place of what differs from the file that it began with.
const DELTA: &str = "delta";

/// How long it may take until it listens.
const TO_LISTEN: Duration = Duration::from_secs(10);
/// The guest's address; every machine has a host of its own to be addressed by.
const GUEST_CID: u32 = 3;

/// The driver.
#[derive(Debug, Clone)]
pub struct Firecracker {
    program: PathBuf,
    version: String,
}

impl Firecracker {
    /// The Firecracker of this host.
    ///
    /// # Errors
    /// [`VmmError::NoKvm`] where it could run nothing, [`VmmError::Missing`], [`VmmError::TooOld`].
    pub fn find() -> Result<Self, VmmError> {
        if let Accelerator::Tcg { because } = Accelerator::choose() {
            return Err(VmmError::NoKvm { hypervisor: "Firecracker", because });
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path)
            .map(|directory| directory.join(PROGRAM))
            .find(|candidate| rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok())
            .ok_or_else(|| VmmError::Missing {
                program: PROGRAM.to_owned(),
                get: "put the program of a release from github.com/firecracker-microvm/firecracker into a \
                      directory of $PATH"
                    .to_owned(),
            })?;
        Self::at(program)
    }

    /// The Firecracker at `program`, whatever this host has to run it with.
    ///
    /// # Errors
    /// [`VmmError::TooOld`], or it does not say its version.
    pub fn at(program: PathBuf) -> Result<Self, VmmError> {
        let output = Command::new(&program)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(VmmError::io(format!("run {}", program.display())))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let first = said.lines().next().unwrap_or_default().chars().take(100).collect::<String>();
        let version = first.strip_prefix("Firecracker v").and_then(|version| {
            let mut parts = version.split('.').map(str::parse::<u32>);
            Some((version.to_owned(), (parts.next()?.ok()?, parts.next()?.ok()?)))
        });
        match version {
            Some((version, known)) if known >= OLDEST => Ok(Self { program, version }),
            Some((version, _)) => {
                Err(VmmError::TooOld { program, version, oldest: format!("{}.{}", OLDEST.0, OLDEST.1) })
            }
            None => Err(VmmError::Nonsense { command: "--version", words: first }),
        }
    }

    /// Its path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Its version, as it says it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Starts a process that is no machine yet.
    fn launch(&self, config: &VmConfig) -> Result<Machine, VmmError> {
        if config.network.is_some() {
            // It opens a device by its name only, and for as long as it is open nobody else can.
            return Err(VmmError::NoDevice { hypervisor: "Firecracker" });
        }
        let at = |name: &str| config.directory.join(name);
        for name in [API, LINK, IMAGE, DISK] {
            match fs::remove_file(at(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(VmmError::io(format!("remove {}", at(name).display()))(error));
                }
                _ => {}
            }
        }
        for (name, target) in [(IMAGE, &config.image), (DISK, &config.disk)] {
            let fail = || VmmError::io(format!("make {}", at(name).display()));
            symlink(std::path::absolute(target).map_err(fail())?, at(name)).map_err(fail())?;
        }
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
                .map_err(|error| VmmError::io(format!("open {}", path.display()))(error.into()))
        };
        let console = File::options().create(true).append(true).open(at(CONSOLE));
        let console = console.map_err(VmmError::io(format!("make {}", at(CONSOLE).display())))?;
        let mut command = Command::new(&self.program);
        command
            .args(["--api-sock", API, "--log-path", WORDS, "--level", "Warning"])
            // The serial console is its standard output.
            .stdout(console);
        let mut process = HypervisorProcess::start(command, &config.directory, WORDS, Vec::new())?;
        let directory = open(&config.directory)?;
        let connected = connect(&directory, &mut process);
        let api = Api::new(process.explain(connected)?);
        let (carrier, link) = Carrier::start(directory, LINK)?;
        Ok(Machine { process, api, carrier, link: Some(link), config: config.clone(), began: false })
    }
}

/// Connects to the API as soon as it is there.
fn connect(directory: &OwnedFd, process: &mut HypervisorProcess) -> Result<UnixStream, VmmError> {
    let begun = Instant::now();
    loop {
        // The path may be longer than the address of a socket.
        match UnixStream::connect(format!("/proc/self/fd/{}/{API}", directory.as_raw_fd())) {
            Ok(stream) => return Ok(stream),
            Err(error) if begun.elapsed() > TO_LISTEN || process.has_ended() => {
                return Err(VmmError::io("reach the hypervisor")(error));
            }
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
        }
    }
}

/// A path as the API takes it.
fn text(path: &Path) -> Result<String, VmmError> {
    let absolute = std::path::absolute(path).map_err(VmmError::io(format!("find {}", path.display())))?;
    absolute.into_os_string().into_string().map_err(|path| VmmError::Path { path: path.into() })
}

/// What the kernel and the guest must know on this kind of machine.
fn own_words() -> String {
    // The keyboard controller is there for restarts only. A guest that panics ends its machine at once.
    let keyboard = if cfg!(target_arch = "x86_64") { " i8042.noaux i8042.nomux i8042.dumbkbd" } else { "" };
    let port = link::PORT;
    format!(
        "console=ttyS0 reboot=k panic=-1 pci=off{keyboard} kiln.link=vsock:{port} kiln.image=/dev/vda \
         kiln.disk=/dev/vdb kiln.off=restart"
    )
}

impl Hypervisor for Firecracker {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    fn fingerprint(&self) -> String {
        format!("firecracker {} {}", fingerprint::program(&self.program), fingerprint::processor())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::all()
    }

    fn create(&self, config: &VmConfig) -> Result<Box<dyn Vm>, BackendError> {
        let invalid = |what: &str| BackendError::new(ErrorKind::Invalid, what);
        let boot = config.boot.as_ref().ok_or_else(|| invalid("there is nothing to boot"))?;
        let kernel = match &boot.vmlinux {
            Some(vmlinux) => vmlinux,
            None if cfg!(target_arch = "x86_64") => {
                return Err(invalid(
                    "Firecracker boots only an uncompressed kernel, and this one cannot be unpacked",
                )
                .hint("install another kernel (kiln kernel install), or choose --hypervisor qemu"));
            }
            None => &boot.kernel,
        };
        let (kernel, initramfs) = (text(kernel)?, text(&boot.initramfs)?);
        let mut machine = self.launch(config)?;
        machine.ask(&api::PutMachineConfig { vcpu_count: config.cpus, mem_size_mib: config.memory >> 20 })?;
        machine.ask(&api::PutBootSource {
            kernel_image_path: &kernel,
            initrd_path: &initramfs,
            boot_args: format!("{} {}", own_words(), boot.command_line),
        })?;
        machine.ask(&api::PutImage(api::PutDrive {
            drive_id: api::IMAGE,
            path_on_host: IMAGE,
            is_root_device: false,
            is_read_only: true,
            cache_type: api::CacheType::Unsafe,
        }))?;
        machine.ask(&api::PutDisk(api::PutDrive {
            drive_id: api::DISK,
            path_on_host: DISK,
            is_root_device: false,
            is_read_only: false,
            cache_type: api::CacheType::Writeback,
        }))?;
        machine.ask(&api::PutVsock { guest_cid: GUEST_CID, uds_path: LINK })?;
        machine.ask(&api::PutEntropy {})?;
        machine.ask(&api::PutBalloon { amount_mib: 0, deflate_on_oom: true, free_page_reporting: true })?;
        Ok(Box::new(machine))
    }

    fn restore(&self, config: &VmConfig, saved: &Path) -> Result<Box<dyn Vm>, BackendError> {
        let state = saved.join(STATE);
        if !state.exists() {
            return Err(VmmError::NotASave { path: state, why: "it is not there".to_owned() }.into());
        }
        let own = saved.join(DELTA);
        let memory = text(if own.exists() { &own } else { &config.memory_file })?;
        let mut machine = self.launch(config)?;
        let load = api::LoadSnapshot {
            snapshot_path: &text(&state)?,
            mem_backend: api::MemoryBackend { backend_type: api::BackendType::File, backend_path: &memory },
            resume_vm: true,
        };
        machine.ask(&load).map_err(|error| match error {
            VmmError::Refused { words, .. } => VmmError::NotASave { path: state.clone(), why: words },
            error => error,
        })?;
        machine.began = true;
        machine.carrier.go()?;
        Ok(Box::new(machine))
    }
}

/// One Firecracker. It ends when this is dropped.
#[derive(Debug)]
struct Machine {
    process: HypervisorProcess,
    api: Api,
    carrier: Carrier,
    link: Option<OwnedFd>,
    config: VmConfig,
    began: bool,
}

impl Machine {
    fn ask<R: api::Request>(&mut self, request: &R) -> Result<R::Answer, VmmError> {
        let answer = self.api.ask(request);
        self.process.explain(answer)
    }
}

impl Vm for Machine {
    fn pid(&self) -> Option<u32> {
        Some(self.process.id())
    }

    fn resume(&mut self) -> Result<(), BackendError> {
        if self.began {
            self.ask(&api::PatchVm::Resumed)?;
        } else {
            self.ask(&api::PutAction::InstanceStart)?;
            self.began = true;
        }
        Ok(self.carrier.go()?)
    }

    fn kill(&mut self) -> Result<(), BackendError> {
        Ok(self.process.kill()?)
    }

    fn pause(&mut self) -> Result<(), BackendError> {
        Ok(self.ask(&api::PatchVm::Paused)?)
    }

    fn save(&mut self, saved: &Path) -> Result<(), BackendError> {
        let own = saved.join(DELTA);
        let memory = match self.config.memory_kind {
            MemoryKind::Written => text(&self.config.memory_file)?,
            MemoryKind::CopyOnWrite => text(&own)?,
        };
        // Before the guest's end is reset, not after.
        self.carrier.hold()?;
        let create = api::CreateSnapshot {
            snapshot_type: api::SnapshotType::Full,
            snapshot_path: &text(&saved.join(STATE))?,
            mem_file_path: &memory,
        };
        Ok(self.ask(&create)?)
    }

    fn last_words(&mut self) -> Option<BackendError> {
        self.process.has_ended().then(|| {
            let program = self.process.program().to_owned();
            VmmError::Ended { program, words: self.process.words() }.into()
        })
    }

    fn state(&mut self) -> Result<VmState, BackendError> {
        if self.process.has_ended() {
            return Ok(VmState::Stopped);
        }
        let Json(info) = self.ask(&api::GetInfo)?;
        match info.state.as_str() {
            "Not started" => Ok(VmState::Created),
            "Running" => Ok(VmState::Running),
            "Paused" => Ok(VmState::Paused),
            other => {
                Err(VmmError::Nonsense { command: "GET /", words: format!("the state `{other}`") }.into())
            }
        }
    }

    fn link(&mut self) -> Result<OwnedFd, BackendError> {
        self.link
            .take()
            .ok_or_else(|| BackendError::new(ErrorKind::State, "the machine's link was given already"))
    }

    fn disk_resized(&mut self, _: u64) -> Result<(), BackendError> {
        // It looks at the file itself.
        Ok(self.ask(&api::PatchDisk { drive_id: api::DISK, path_on_host: DISK })?)
    }

    fn balloon(&mut self, bytes: u64) -> Result<(), BackendError> {
        let taken = self.config.memory.saturating_sub(bytes);
        Ok(self.ask(&api::PatchBalloon { amount_mib: taken >> 20 })?)
    }
}
