//! What each request does, and when it may be said.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::guest::Guest;

const AFTER: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";

/// What is answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// 204.
    Nothing,
    /// 200.
    Data(String),
    /// 400.
    Fault(String),
    /// 400, and the process ends.
    Fatal(String),
}

impl Answer {
    pub(super) fn status(&self) -> u16 {
        match self {
            Self::Nothing => 204,
            Self::Data(_) => 200,
            Self::Fault(_) | Self::Fatal(_) => 400,
        }
    }
}

fn message(words: impl Into<String>) -> String {
    serde_json::json!({ "fault_message": words.into() }).to_string()
}

type Outcome = Result<(), String>;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineConfig {
    vcpu_count: u8,
    mem_size_mib: usize,
    #[serde(default)]
    smt: bool,
    #[serde(default)]
    track_dirty_pages: bool,
    #[serde(default)]
    huge_pages: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BootSource {
    kernel_image_path: String,
    initrd_path: Option<String>,
    boot_args: Option<String>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum CacheType {
    Unsafe,
    Writeback,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Drive {
    drive_id: String,
    path_on_host: String,
    is_root_device: bool,
    is_read_only: bool,
    cache_type: Option<CacheType>,
    io_engine: Option<String>,
    partuuid: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartialDrive {
    drive_id: String,
    path_on_host: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vsock {
    guest_cid: u32,
    uds_path: String,
    vsock_id: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Balloon {
    amount_mib: u32,
    deflate_on_oom: bool,
    #[serde(default)]
    stats_polling_interval_s: u16,
    #[serde(default)]
    free_page_hinting: bool,
    #[serde(default)]
    free_page_reporting: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonUpdate {
    amount_mib: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entropy {}

#[derive(Debug, Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

#[derive(Debug, Deserialize)]
enum VmState {
    Paused,
    Resumed,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    state: VmState,
}

#[derive(Debug, Default, Deserialize)]
enum SnapshotType {
    Diff,
    #[default]
    Full,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateSnapshot {
    #[serde(default)]
    snapshot_type: SnapshotType,
    snapshot_path: String,
    mem_file_path: String,
}

#[derive(Debug, Deserialize)]
enum BackendType {
    File,
    Uffd,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemBackend {
    backend_type: BackendType,
    backend_path: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoadSnapshot {
    snapshot_path: String,
    mem_backend: MemBackend,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default, rename = "track_dirty_pages")]
    _track_dirty_pages: bool,
}

/// What a snapshot's state is here.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    machine: MachineConfig,
    drives: Vec<Drive>,
    vsock: Option<Vsock>,
    balloon: Option<Balloon>,
    /// So that half of it is not all of it.
    end: String,
}

/// A process: not started, running or paused.
#[derive(Debug)]
pub(super) struct Machine {
    /// Something was said that a snapshot would bring.
    boot_path: bool,
    boot: Option<BootSource>,
    entropy: bool,
    state: State,
    running: Option<Running>,
}

impl Default for Machine {
    fn default() -> Self {
        let machine = MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: None,
        };
        let state = State { machine, drives: Vec::new(), vsock: None, balloon: None, end: "end".to_owned() };
        Self { boot_path: false, boot: None, entropy: false, state, running: None }
    }
}

#[derive(Debug)]
struct Running {
    guest: Guest,
    paused: bool,
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body)
        .map_err(|error| format!("An error occurred when deserializing the json body of a request: {error}."))
}

impl Machine {
    pub(super) fn answer(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> Answer {
        let tokens: Vec<&str> = path.trim_start_matches('/').split_terminator('/').collect();
        let outcome = match (method, tokens.as_slice(), body) {
            ("GET", _, Some(_)) => Err("GET request cannot have a body.".to_owned()),
            ("GET", [], None) => return Answer::Data(self.info()),
            ("GET", ["version"], None) => {
                return Answer::Data(
                    serde_json::json!({ "firecracker_version": super::VERSION }).to_string(),
                );
            }
            ("PUT", _, None) => Err("Empty PUT request.".to_owned()),
            ("PATCH", _, None) => Err("Empty PATCH request.".to_owned()),
            ("PUT", ["snapshot", "load"], Some(body)) => return self.load(body),
            ("PUT", tokens, Some(body)) => self.put(tokens, body),
            ("PATCH", tokens, Some(body)) => self.patch(tokens, body),
            _ => Err(unknown(method, path)),
        };
        match outcome {
            Ok(()) => Answer::Nothing,
            Err(words) => Answer::Fault(message(words)),
        }
    }

    fn info(&self) -> String {
        let state = match &self.running {
            None => "Not started",
            Some(Running { paused: false, .. }) => "Running",
            Some(Running { paused: true, .. }) => "Paused",
        };
        serde_json::json!({
            "id": "anonymous-instance",
            "state": state,
            "vmm_version": super::VERSION,
            "app_name": "Firecracker",
        })
        .to_string()
    }

    fn put(&mut self, tokens: &[&str], body: &[u8]) -> Outcome {
        match tokens {
            ["machine-config"] => {
                let config: MachineConfig = parse(body)?;
                if config.vcpu_count == 0 || config.vcpu_count > 32 {
                    return Err("Machine config error: The vCPU number is invalid!".to_owned());
                }
                if config.mem_size_mib == 0 {
                    return Err("Machine config error: The memory size (MiB) is invalid.".to_owned());
                }
                self.before_start()?.state.machine = config;
                Ok(())
            }
            ["boot-source"] => {
                let source: BootSource = parse(body)?;
                for path in
                    [Some(&source.kernel_image_path), source.initrd_path.as_ref()].into_iter().flatten()
                {
                    File::open(path).map_err(|error| {
                        format!("Boot source error: The kernel file cannot be opened: {error} ({path})")
                    })?;
                }
                self.before_start()?.boot = Some(source);
                Ok(())
            }
            ["drives", id] => {
                let drive: Drive = parse(body)?;
                if drive.drive_id != *id {
                    return Err("The id from the path does not match the id from the body!".to_owned());
                }
                fs::metadata(&drive.path_on_host).map_err(|error| {
                    format!(
                        "Drive config error: Unable to open block device: {error} ({})",
                        drive.path_on_host
                    )
                })?;
                let drives = &mut self.before_start()?.state.drives;
                drives.retain(|known| known.drive_id != drive.drive_id);
                // The root device comes first, whenever it was said.
                let at = if drive.is_root_device { 0 } else { drives.len() };
                drives.insert(at, drive);
                Ok(())
            }
            ["vsock"] => {
                let vsock: Vsock = parse(body)?;
                if vsock.guest_cid < 3 {
                    return Err("Vsock config error: the CID is reserved".to_owned());
                }
                self.before_start()?.state.vsock = Some(vsock);
                Ok(())
            }
            ["entropy"] => {
                parse::<Entropy>(body)?;
                self.before_start()?.entropy = true;
                Ok(())
            }
            ["balloon"] => {
                let balloon: Balloon = parse(body)?;
                if balloon.amount_mib as usize > self.state.machine.mem_size_mib {
                    return Err("Balloon config error: Amount of pages requested is too large.".to_owned());
                }
                self.before_start()?.state.balloon = Some(balloon);
                Ok(())
            }
            ["actions"] => match parse::<Action>(body)?.action_type {
                ActionType::InstanceStart => self.start(),
                ActionType::SendCtrlAltDel | ActionType::FlushMetrics => {
                    self.running.as_ref().map(drop).ok_or_else(|| BEFORE.to_owned())
                }
            },
            ["snapshot", "create"] => {
                let create: CreateSnapshot = parse(body)?;
                self.save(&create)
            }
            _ => Err(unknown("PUT", tokens.first().unwrap_or(&""))),
        }
    }

    /// Something of what a snapshot would bring is about to be said.
    fn before_start(&mut self) -> Result<&mut Self, String> {
        if self.running.is_some() {
            return Err(AFTER.to_owned());
        }
        self.boot_path = true;
        Ok(self)
    }

    fn patch(&mut self, tokens: &[&str], body: &[u8]) -> Outcome {
        match tokens {
            ["vm"] => {
                let vm: Vm = parse(body)?;
                let running = self.running.as_mut().ok_or(BEFORE)?;
                running.paused = matches!(vm.state, VmState::Paused);
                running.guest.pause(running.paused);
                Ok(())
            }
            ["drives", id] => {
                let partial: PartialDrive = parse(body)?;
                if partial.drive_id != *id {
                    return Err("The id from the path does not match the id from the body!".to_owned());
                }
                self.running.as_ref().ok_or(BEFORE)?;
                let mut drives = self.state.drives.iter_mut();
                let drive = drives
                    .find(|drive| drive.drive_id == partial.drive_id)
                    .ok_or("Drive config error: Unable to patch the block device: no such device")?;
                if let Some(path) = partial.path_on_host {
                    open(&path, drive.is_read_only).map_err(|error| {
                        format!("Drive config error: Unable to patch the block device: {error}")
                    })?;
                    drive.path_on_host = path;
                }
                Ok(())
            }
            ["balloon"] => {
                let update: BalloonUpdate = parse(body)?;
                self.running.as_ref().ok_or(BEFORE)?;
                let balloon = self.state.balloon.as_mut().ok_or("Balloon update error: Device not found")?;
                if update.amount_mib as usize > self.state.machine.mem_size_mib {
                    return Err("Balloon update error: Amount of pages requested is too large.".to_owned());
                }
                balloon.amount_mib = update.amount_mib;
                Ok(())
            }
            _ => Err(unknown("PATCH", tokens.first().unwrap_or(&""))),
        }
    }

    fn start(&mut self) -> Outcome {
        if self.running.is_some() {
            return Err(AFTER.to_owned());
        }
        let start = |why: &str| format!("Start microvm error: {why}");
        let boot =
            self.boot.as_ref().ok_or_else(|| start("Cannot start microvm without kernel configuration."))?;
        let kernel = fs::read(&boot.kernel_image_path).map_err(|error| start(&error.to_string()))?;
        if !kernel.starts_with(b"\x7fELF") && cfg!(target_arch = "x86_64") {
            return Err(start(
                "Cannot load kernel due to invalid memory configuration or invalid kernel image: \
                              failed to read ELF header",
            ));
        }
        // What the guest is told in place of what its devices cannot say.
        let words = boot.boot_args.clone().unwrap_or_default();
        for word in ["kiln.link=vsock:1024", "kiln.image=/dev/vda", "kiln.disk=/dev/vdb", "kiln.off=restart"]
        {
            if !words.split(' ').any(|known| known == word) {
                return Err(start(&format!("the guest would miss {word}")));
            }
        }
        if !self.entropy {
            return Err(start("the guest would miss its source of randomness"));
        }
        self.open_all().map_err(|error| start(&error))?;
        let vsock = self.state.vsock.as_ref().ok_or_else(|| start("the guest would miss its link"))?;
        let guest = Guest::boot(Path::new(&vsock.uds_path)).map_err(|error| start(&error.to_string()))?;
        self.running = Some(Running { guest, paused: false });
        Ok(())
    }

    fn open_all(&self) -> Outcome {
        let mut drives = self.state.drives.iter();
        drives.try_for_each(|drive| {
            open(&drive.path_on_host, drive.is_read_only)
                .map_err(|error| format!("cannot open {}: {error}", drive.path_on_host))
        })
    }

    fn save(&mut self, create: &CreateSnapshot) -> Outcome {
        let running = self.running.as_mut().ok_or(BEFORE)?;
        let why = |why: &str| format!("Create snapshot error: {why}");
        if !running.paused {
            return Err(why("Cannot save the microVM state: the microVM is not paused"));
        }
        if !matches!(create.snapshot_type, SnapshotType::Full) {
            return Err(why("only full snapshots are known here"));
        }
        let write = || -> std::io::Result<()> {
            // All memory, none of it a hole; the guest's own is a number at its beginning.
            let memory = File::create(&create.mem_file_path)?;
            let page = vec![0x11; 1 << 20];
            for mib in 0..self.state.machine.mem_size_mib {
                memory.write_all_at(&page, (mib as u64) << 20)?;
            }
            memory.write_all_at(&running.guest.life().to_le_bytes(), 0)?;
            fs::write(&create.snapshot_path, serde_json::to_vec_pretty(&self.state)?)
        };
        write().map_err(|error| why(&error.to_string()))?;
        // The guest drops its connections as soon as it goes on, without a word to the host's ends.
        running.guest.reset();
        Ok(())
    }

    fn load(&mut self, body: &[u8]) -> Answer {
        let load: LoadSnapshot = match parse(body) {
            Ok(load) => load,
            Err(words) => return Answer::Fault(message(words)),
        };
        if self.running.is_some() {
            return Answer::Fault(message(AFTER));
        }
        if self.boot_path {
            let words = "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
                         boot-specific resources.";
            return Answer::Fault(message(words));
        }
        match self.become_saved(&load) {
            Ok(()) => Answer::Nothing,
            Err(words) => {
                let words = format!("Load snapshot error: Failed to restore from snapshot: {words}");
                Answer::Fatal(message(words))
            }
        }
    }

    fn become_saved(&mut self, load: &LoadSnapshot) -> Outcome {
        let text = |error: std::io::Error| error.to_string();
        let state = fs::read(&load.snapshot_path).map_err(text)?;
        self.state = serde_json::from_slice(&state).map_err(|error| format!("bad state: {error}"))?;
        if !matches!(load.mem_backend.backend_type, BackendType::File) {
            return Err("only files are known here".to_owned());
        }
        let memory = File::open(&load.mem_backend.backend_path).map_err(text)?;
        if memory.metadata().map_err(text)?.len() != (self.state.machine.mem_size_mib as u64) << 20 {
            return Err("the memory file has another size than the memory".to_owned());
        }
        let mut life = [0; 4];
        memory.read_exact_at(&mut life, 0).map_err(text)?;
        self.open_all()?;
        let vsock = self.state.vsock.as_ref().ok_or("no link")?;
        let guest = Guest::restore(Path::new(&vsock.uds_path), u32::from_le_bytes(life)).map_err(text)?;
        guest.pause(!load.resume_vm);
        self.running = Some(Running { guest, paused: !load.resume_vm });
        Ok(())
    }
}

fn open(path: &str, read_only: bool) -> std::io::Result<()> {
    File::options().read(true).write(!read_only).open(path).map(drop)
}

fn unknown(method: &str, path: &str) -> String {
    format!("Invalid request method and/or path: {method} {path}.")
}
