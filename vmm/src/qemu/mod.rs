//! QEMU: the `microvm` machine on x86-64, `virt` on aarch64.
//!
//! One process a machine, which ends with the thread that started it. Its link and its monitor are socket pairs made before
//! it starts, so that nobody waits for a path to appear. How a machine is saved and restored:
//!
//! 1. A template boots with its memory file mapped shared (`share=on`), so that the file *is* the memory.
//! 2. *Save*: stop; `xen-save-devices-state` writes the devices' state without memory (some 26 KB, a millisecond). That the
//!    command is named for Xen is history: it needs nothing of it. Of a machine whose memory is mapped privately, the
//!    changed pages follow as a [delta](super::memory).
//! 3. *Restore*: the same devices over the same memory file, mapped privately (`share=off`): nothing is copied. No kernel is
//!    given: it is in memory. The state is an incoming migration, which QEMU waits for, loads, and goes on from; nothing is
//!    said over the monitor, where each byte of a command waits for a turn of QEMU's loop. A delta is put into the fresh
//!    process's memory before the state is let in, since devices look into memory while they are loaded.
//!
//! The state has neither a configuration section nor a description, as a migration would, so both sides leave them out.

mod arguments;
mod process;

use std::fs::{self, File};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_contract::{
    BackendError, Capabilities, ErrorKind, Hypervisor, MemoryKind, Vm, VmConfig, VmHandle, VmState,
};
use rustix::io::FdFlags;
use rustix::process::Signal;

use crate::memory::Mapping;
use crate::qmp::{self, Qmp};
use crate::{Accelerator, VmmError};
use arguments::{Inherited, arguments};
use process::Process;

/// Where the devices' state is in what was saved.
const STATE: &str = "state";
/// Where the changed memory is, if the machine had any of its own.
const DELTA: &str = "delta";
/// What QEMU writes to standard error.
const WORDS: &str = "qemu.log";
/// How long QEMU may take to map its memory.
const TO_MAP: Duration = Duration::from_secs(30);

#[cfg(target_arch = "x86_64")]
const PROGRAM: (&str, &str) = ("qemu-system-x86_64", "qemu-system-x86");
#[cfg(not(target_arch = "x86_64"))]
const PROGRAM: (&str, &str) = ("qemu-system-aarch64", "qemu-system-arm");

/// The driver.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    accelerator: Accelerator,
}

impl Qemu {
    /// The QEMU of this host.
    ///
    /// # Errors
    /// [`VmmError::Missing`] names the package that has it.
    pub fn find() -> Result<Self, VmmError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path)
            .map(|directory| directory.join(PROGRAM.0))
            .find(|candidate| rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok())
            .ok_or_else(|| VmmError::Missing {
                program: PROGRAM.0.to_owned(),
                get: format!("on Debian and Ubuntu: apt-get install --no-install-recommends {}", PROGRAM.1),
            })?;
        Ok(Self { program, accelerator: Accelerator::choose() })
    }

    /// What executes its machines' instructions, and why.
    pub fn accelerator(&self) -> &Accelerator {
        &self.accelerator
    }

    /// Its path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts a process; `state` is what it is going to load, if anything.
    fn launch(&self, config: &VmConfig, state: Option<OwnedFd>) -> Result<Machine, VmmError> {
        let pair = || UnixStream::pair().map_err(VmmError::io("make a socket for the hypervisor"));
        let ((link, their_link), (monitor, their_monitor)) = (pair()?, pair()?);
        let network = config.network.as_ref().map(|network| network.try_clone()).transpose();
        let network = network.map_err(VmmError::io("use the machine's network device"))?;
        let inherited = Inherited {
            link: their_link.as_raw_fd(),
            monitor: their_monitor.as_raw_fd(),
            state: state.as_ref().map(AsRawFd::as_raw_fd),
            network: network.as_ref().map(AsRawFd::as_raw_fd),
        };
        let words = config.directory.join(WORDS);
        let log = File::create(&words).map_err(VmmError::io(format!("make {}", words.display())))?;
        let mut command = Command::new(&self.program);
        command
            .args(arguments(config, &self.accelerator, inherited))
            .current_dir(&config.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut theirs = vec![OwnedFd::from(their_link), OwnedFd::from(their_monitor)];
        let began = state.is_some();
        theirs.extend(state);
        theirs.extend(network);
        let parent = rustix::process::getpid();
        // SAFETY: system calls only, between fork and exec, on descriptors that outlive them.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // It may have ended before that was said.
                if rustix::process::getppid() != Some(parent) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                without_huge_pages()?;
                for descriptor in &theirs {
                    rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
                }
                Ok(())
            });
        }
        let process = command.spawn().map_err(VmmError::io(format!("run {}", self.program.display())))?;
        // The command keeps their ends open, and with them nobody would see that QEMU ended.
        drop(command);
        Ok(Machine {
            program: self.program.clone(),
            process: Process::Own(process),
            monitor: Monitor::New(monitor),
            link: Some(link.into()),
            words,
            memory: (config.memory_file.clone(), config.memory, config.memory_kind),
            began,
        })
    }
}

impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn fingerprint(&self) -> String {
        // The program as a file: cheaper than to ask it, and as telling.
        let file = fs::metadata(&self.program).map_or_else(
            |_| String::new(),
            |file| {
                use std::os::unix::fs::MetadataExt as _;
                format!("{}:{}:{}.{}", file.ino(), file.len(), file.mtime(), file.mtime_nsec())
            },
        );
        let accelerator = self.accelerator.name();
        let processor = match self.accelerator {
            Accelerator::Kvm => processor(),
            Accelerator::Tcg { .. } => {
                format!("{} {}", arguments::TRANSLATED_PROCESSOR, arguments::TRANSLATED)
            }
        };
        format!("qemu {} {file} {accelerator} {processor}", self.program.display())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::all()
    }

    fn create(&self, config: &VmConfig) -> Result<Box<dyn Vm>, BackendError> {
        Ok(Box::new(self.launch(config, None)?))
    }

    fn restore(&self, config: &VmConfig, saved: &Path) -> Result<Box<dyn Vm>, BackendError> {
        let open = |name: &str| {
            let path = saved.join(name);
            File::open(&path).map_err(VmmError::io(format!("open {}", path.display())))
        };
        let state = open(STATE)?;
        if !saved.join(DELTA).exists() {
            return Ok(Box::new(self.launch(config, Some(state.into()))?));
        }
        let delta = open(DELTA)?;
        let (theirs, ours) = io::pipe().map_err(VmmError::io("make a pipe for the hypervisor"))?;
        let mut machine = self.launch(config, Some(theirs.into()))?;
        machine.put(delta, saved)?;
        machine.feed(state, ours, saved)?;
        Ok(Box::new(machine))
    }

    fn translates(&self) -> bool {
        matches!(self.accelerator, Accelerator::Tcg { .. })
    }

    fn adopt(
        &self,
        config: &VmConfig,
        handle: VmHandle,
        owner: OwnedFd,
    ) -> Result<Box<dyn Vm>, BackendError> {
        let descriptors = <[OwnedFd; VmHandle::DESCRIPTORS]>::try_from(handle.descriptors);
        let [link, monitor, process, memory, pages] = descriptors.map_err(|descriptors| {
            let why = format!("{} descriptors came with it", descriptors.len());
            BackendError::new(ErrorKind::Invalid, format!("cannot take a machine over: {why}"))
        })?;
        let mapping = process::mapping(handle.memory_address, config.memory, [memory, pages]);
        Ok(Box::new(Machine {
            program: self.program.clone(),
            process: Process::Adopted { pid: handle.pid, handle: process, mapping, _owner: owner },
            monitor: Monitor::New(monitor.into()),
            link: Some(link),
            words: config.directory.join(WORDS),
            memory: (config.memory_file.clone(), config.memory, config.memory_kind),
            began: true,
        }))
    }
}

/// Keeps the kernel from giving a process, and what it will execute, memory in huge pages that it did not ask for: of each
/// machine's own memory (above all its translated code) only what is touched is to be there, and filled with zeros.
fn without_huge_pages() -> io::Result<()> {
    #[cfg(target_os = "linux")]
    // SAFETY: takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A state of the processor's own is only restored on the same model.
fn processor() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line =
        |name: &str| cpuinfo.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    format!("{} {} {}", line("model name"), line("flags"), line("microcode"))
}

/// One QEMU.
#[derive(Debug)]
struct Machine {
    program: PathBuf,
    process: Process,
    monitor: Monitor,
    link: Option<OwnedFd>,
    words: PathBuf,
    memory: (PathBuf, u64, MemoryKind),
    began: bool,
}

/// A machine's monitor. A machine that is restored goes on without it, so it is opened when it is needed.
#[derive(Debug)]
enum Monitor {
    New(UnixStream),
    Open(Qmp),
    /// Opening it failed.
    Lost,
}

impl Machine {
    fn execute<C: qmp::Command>(&mut self, command: &C) -> Result<C::Answer, VmmError> {
        let answer = self.opened(C::NAME).and_then(|monitor| monitor.execute(command));
        self.explain(answer)
    }

    fn opened(&mut self, command: &'static str) -> Result<&mut Qmp, VmmError> {
        if let Monitor::New(_) = self.monitor
            && let Monitor::New(socket) = std::mem::replace(&mut self.monitor, Monitor::Lost)
        {
            self.monitor = Monitor::Open(Qmp::open(socket)?);
        }
        match &mut self.monitor {
            Monitor::Open(monitor) => Ok(monitor),
            Monitor::New(_) | Monitor::Lost => {
                Err(VmmError::Nonsense { command, words: "there is no monitor".to_owned() })
            }
        }
    }

    /// A failure to talk to QEMU is explained by what it said before it ended, if it did.
    fn explain<T>(&mut self, outcome: Result<T, VmmError>) -> Result<T, VmmError> {
        let Err(error @ VmmError::Io { .. }) = outcome else { return outcome };
        // It closes its sockets a little before it ends.
        for _ in 0..50 {
            if self.process.has_ended() {
                let said = self.words();
                let words = if said.is_empty() { error.to_string() } else { said };
                return Err(VmmError::Ended { program: self.program.clone(), words });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err(error)
    }

    fn mapping(&self) -> Result<Mapping, VmmError> {
        self.process.mapping(&self.memory.0, self.memory.1)
    }

    /// Puts what a saved machine had changed into this one's memory, once QEMU has mapped it.
    fn put(&mut self, mut delta: File, saved: &Path) -> Result<(), VmmError> {
        let begun = Instant::now();
        let mapping = loop {
            match self.mapping() {
                Ok(mapping) => break mapping,
                Err(error) => {
                    if begun.elapsed() > TO_MAP || self.process.has_ended() {
                        return self.explain(Err(error));
                    }
                    std::thread::sleep(Duration::from_micros(500));
                }
            }
        };
        let path = || saved.join(DELTA);
        mapping
            .read_delta(&mut delta)
            .map_err(|error| VmmError::NotASave { path: path(), why: error.to_string() })
    }

    /// Gives QEMU the state that it waits for.
    fn feed(&mut self, mut state: File, mut to: io::PipeWriter, saved: &Path) -> Result<(), VmmError> {
        let path = || saved.join(STATE);
        let fed = io::copy(&mut state, &mut to).map(drop);
        fed.map_err(|error| VmmError::NotASave { path: path(), why: error.to_string() })
    }

    fn words(&self) -> String {
        let said = fs::read(&self.words).unwrap_or_default();
        String::from_utf8_lossy(&said[said.len().saturating_sub(2000)..]).trim().to_owned()
    }
}

impl Vm for Machine {
    fn pid(&self) -> Option<u32> {
        Some(self.process.id())
    }

    fn resume(&mut self) -> Result<(), BackendError> {
        self.execute(&qmp::Continue { lifetime: PhantomData })?;
        self.began = true;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), BackendError> {
        self.execute(&qmp::Stop { lifetime: PhantomData })?;
        Ok(())
    }

    fn kill(&mut self) -> Result<(), BackendError> {
        Ok(self.process.kill()?)
    }

    fn save(&mut self, saved: &Path) -> Result<(), BackendError> {
        let state = saved.join(STATE);
        let name = state.to_str().ok_or_else(|| VmmError::NotASave {
            path: state.clone(),
            why: "the hypervisor takes only paths in UTF-8".to_owned(),
        })?;
        self.execute(&qmp::SaveDevices { filename: name, live: false, lifetime: PhantomData })?;
        if self.memory.2 == MemoryKind::CopyOnWrite {
            let path = saved.join(DELTA);
            let fail = || VmmError::io(format!("write {}", path.display()));
            let mut file = File::create(&path).map_err(fail())?;
            self.mapping()?.write_delta(&mut file).map_err(fail())?;
        }
        Ok(())
    }

    fn last_words(&mut self) -> Option<BackendError> {
        // It closes its sockets a little before it ends.
        for _ in 0..50 {
            if self.process.has_ended() {
                let said = self.words();
                let words = if said.is_empty() { "it gave no reason".to_owned() } else { said };
                return Some(VmmError::Ended { program: self.program.clone(), words }.into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    fn state(&mut self) -> Result<VmState, BackendError> {
        if self.process.has_ended() {
            return Ok(VmState::Stopped);
        }
        let status = self.execute(&qmp::QueryStatus { lifetime: PhantomData })?.status;
        Ok(match status.as_str() {
            "running" => VmState::Running,
            "shutdown" | "guest-panicked" | "internal-error" => VmState::Stopped,
            _ if self.began => VmState::Paused,
            _ => VmState::Created,
        })
    }

    fn link(&mut self) -> Result<OwnedFd, BackendError> {
        self.link
            .take()
            .ok_or_else(|| BackendError::new(ErrorKind::State, "the machine's link was given already"))
    }

    fn disk_resized(&mut self, bytes: u64) -> Result<(), BackendError> {
        self.execute(&qmp::ResizeBlock { device: arguments::DISK, size: bytes, lifetime: PhantomData })?;
        Ok(())
    }

    fn hand_over(&mut self, link: OwnedFd) -> Result<VmHandle, BackendError> {
        let fail = || VmmError::io("hand the machine over");
        // Who has spoken over it has heard what another would wait for.
        let monitor = match &self.monitor {
            Monitor::New(monitor) => OwnedFd::from(monitor.try_clone().map_err(fail())?),
            Monitor::Open(_) | Monitor::Lost => {
                return Err(BackendError::new(
                    ErrorKind::State,
                    "cannot hand the machine over: its monitor is in use",
                ));
            }
        };
        let process = self.process.handle().map_err(fail())?;
        let (memory_address, [memory, pages]) = process::descriptors(self.mapping()?);
        Ok(VmHandle {
            pid: self.process.id(),
            memory_address,
            descriptors: vec![link, monitor, process, memory, pages],
        })
    }

    fn balloon(&mut self, bytes: u64) -> Result<(), BackendError> {
        self.execute(&qmp::Balloon { value: bytes, lifetime: PhantomData })?;
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!("{error}");
        }
    }
}
