//! Templates: machines saved at the moment at which their guest is ready and is nobody yet.
//!
//! ```text
//! templates/<key>/
//!   template.json        what it was made from, when, and how long the boot took
//!   memory               the memory file: sparse, mapped by every machine that started from it
//!   state                the state of the devices
//! templates/<key>.lock   held by who is making it
//! disks/template-<key>   the writable disk that is mounted in it, if one is
//! ```
//!
//! There are two kinds. The guest of one has mounted an empty disk of the usual size, and machines begin with a copy of that
//! disk: it is theirs from then on. The guest of the other has mounted none, for machines that have a disk of their own
//! already or want a smaller one; mounting it is part of their start.
//!
//! The key is the digest of everything that a saved state depends on: the hypervisor with its version and accelerator, kernel,
//! guest, link, number of processors, memory, and the sizes that the devices had. If any of it changes, there is just no
//! template of that key, and one is made: nothing can be stale. What is no longer used is bounded in number; a template that
//! is removed while machines run from it goes when the last of them does.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_boot::Kernel;
use kiln_contract::{
    BackendError, BootConfig, Digest, DiskBackend, DiskId, ErrorKind, Home, Hypervisor, MachineSpec,
    MemoryKind, Progress, Step, VmConfig,
};
use kiln_link::{HostLink, LinkError, VERSION};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::guest;
use crate::stream;

/// The version of `template.json`.
const FORMAT: u32 = 2;
/// Templates that are kept besides the newest; each has a size and kernel of its own.
const KEPT: usize = 8;
/// How long a guest may take to say hello. Software emulation on a busy host is slow; a guest that panics ends at once.
const TO_BOOT: Duration = Duration::from_secs(180);
/// The size of a template's image disk: larger than any image. What is behind the device at a restore may be shorter.
const IMAGE_SIZE: u64 = 16 << 40;
/// The size of a template's writable disk. A machine's that is of another size says so.
pub(crate) const DISK_SIZE: u64 = MachineSpec::DISK.bytes();

/// A machine's processors and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual processors, at least 1.
    pub cpus: u32,
    /// Memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
}

/// What the guest has for a writable disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disk {
    /// An empty one of the usual size, mounted: a machine begins with a copy of it.
    Empty,
    /// None yet: a machine mounts its own.
    Own,
}

/// What `template.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    format: u32,
    /// When it was made.
    pub made: Timestamp,
    /// The kernel's name.
    pub kernel: String,
    /// The hypervisor, its version and accelerator.
    pub hypervisor: String,
    /// The machines that start from it.
    pub shape: Shape,
    /// What they have for a writable disk.
    pub disk: Disk,
    /// How long the guest took from the start of the hypervisor until it was ready, in milliseconds.
    pub boot_millis: u64,
}

/// A template that is whole.
#[derive(Debug, Clone)]
pub struct Template {
    key: Digest,
    directory: PathBuf,
    record: TemplateRecord,
}

impl Template {
    /// Its name: the digest of what it was made from.
    pub fn key(&self) -> Digest {
        self.key
    }

    /// What is known of it.
    pub fn record(&self) -> &TemplateRecord {
        &self.record
    }

    /// The memory file.
    pub fn memory(&self) -> PathBuf {
        self.directory.join("memory")
    }

    /// The disk that a machine begins with a copy of.
    pub fn disk(&self) -> Option<DiskId> {
        matches!(self.record.disk, Disk::Empty).then(|| disk_id(self.key)).flatten()
    }

    /// What a hypervisor restores.
    pub fn saved(&self) -> &Path {
        &self.directory
    }

    fn load(directory: &Path) -> Option<Self> {
        let key = Digest::from_hex(directory.file_name()?.to_str()?).ok()?;
        let bytes = fs::read(directory.join("template.json")).ok()?;
        let record: TemplateRecord = serde_json::from_slice(&bytes).ok()?;
        let whole = record.format == FORMAT
            && fs::metadata(directory.join("memory")).is_ok_and(|file| file.len() >= record.shape.memory)
            && fs::metadata(directory.join("state")).is_ok_and(|file| file.len() > 0);
        whole.then(|| Self { key, directory: directory.to_owned(), record })
    }
}

/// The disk of the template `key`, among those of machines.
fn disk_id(key: Digest) -> Option<DiskId> {
    format!("template-{}", key.hex()).parse().ok()
}

/// The templates of a home.
pub struct Templates<'a> {
    root: PathBuf,
    disks: &'a dyn DiskBackend,
}

impl std::fmt::Debug for Templates<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Templates").field("root", &self.root).finish_non_exhaustive()
    }
}

impl<'a> Templates<'a> {
    /// The templates of a home, whose machines have their disks in `disks`. Nothing is read or made by this.
    pub fn open(home: &Home, disks: &'a dyn DiskBackend) -> Self {
        Self { root: home.templates(), disks }
    }

    /// All templates, the one used last first.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Template>, BackendError> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list", &self.root)(error)),
        };
        let mut found: Vec<_> = entries.flatten().filter_map(|entry| Template::load(&entry.path())).collect();
        found.sort_by_key(|template| std::cmp::Reverse(used(template)));
        Ok(found)
    }

    /// Removes a template. Machines that run from it go on.
    ///
    /// # Errors
    /// If its files cannot be removed.
    pub fn remove(&self, template: &Template) -> Result<(), BackendError> {
        // Out of sight first, so that no half of it is ever found.
        let aside = self.root.join(format!(".gone-{}", template.key.hex()));
        match fs::rename(&template.directory, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("remove", &template.directory)(error)),
            Ok(()) => fs::remove_dir_all(&aside).map_err(failed("remove", &aside)),
        }?;
        match disk_id(template.key) {
            Some(disk) if self.disks.path(&disk).is_ok() => self.disks.remove(&disk),
            _ => Ok(()),
        }
    }

    /// A template that is whole, its disk too.
    fn load(&self, directory: &Path) -> Option<Template> {
        Template::load(directory)
            .filter(|template| template.disk().is_none_or(|disk| self.disks.path(&disk).is_ok()))
    }

    /// The template for machines of `shape` with `kernel`; made if it is not there, by one process while others wait.
    ///
    /// # Errors
    /// A guest that does not get ready: with the last lines of its console. The disk is full. Nothing is left then.
    pub fn get(
        &self,
        hypervisor: &dyn Hypervisor,
        kernel: &Kernel,
        shape: Shape,
        disk: Disk,
        progress: &dyn Progress,
    ) -> Result<Template, BackendError> {
        let key = key(hypervisor, kernel, shape, disk);
        let directory = self.root.join(key.hex());
        if let Some(template) = self.load(&directory) {
            touch(&template);
            return Ok(template);
        }
        fs::create_dir_all(&self.root).map_err(failed("make", &self.root))?;
        let path = self.root.join(format!("{}.lock", key.hex()));
        let lock = File::create(&path).map_err(failed("make", &path))?;
        rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))
            .map_err(|error| failed("lock", &path)(error.into()))?;
        // Somebody else may have made it meanwhile.
        if let Some(template) = self.load(&directory) {
            return Ok(template);
        }
        // What is there and is not whole: a disk was full, a file was cut.
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &directory)(error));
            }
            _ => {}
        }
        let begun_with = match disk {
            Disk::Empty => disk_id(key),
            Disk::Own => None,
        };
        if let Some(disk) = begun_with.as_ref().filter(|disk| self.disks.path(disk).is_ok()) {
            self.disks.remove(disk)?;
        }
        let step = progress.begin(Step {
            name: format!("{} ({} CPU, {} MiB)", kernel.name(), shape.cpus, shape.memory >> 20),
            verb: "template",
            total: None,
        });
        let made = self.make(hypervisor, kernel, (shape, disk), begun_with.as_ref(), &directory);
        progress.end(step, if made.is_ok() { "done" } else { "failed" });
        if let (Err(_), Some(disk)) = (&made, &begun_with)
            && let Err(error) = self.disks.remove(disk)
        {
            tracing::debug!("{error}");
        }
        made?;
        self.keep_few(key)?;
        self.load(&directory).ok_or_else(|| {
            BackendError::new(ErrorKind::Failed, format!("the template at {} vanished", directory.display()))
        })
    }

    fn make(
        &self,
        hypervisor: &dyn Hypervisor,
        kernel: &Kernel,
        (shape, disk): (Shape, Disk),
        begun_with: Option<&DiskId>,
        directory: &Path,
    ) -> Result<(), BackendError> {
        if guest::PROGRAM.is_empty() {
            return Err(BackendError::unsupported(
                "this program was built without a guest and cannot make machines",
            ));
        }
        // Gone with all that is in it, whatever happens.
        let staging = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.root)
            .map_err(failed("make a directory in", &self.root))?;
        let at = |name: &str| staging.path().join(name);
        let sparse = |name: &str, size: u64| {
            let path = at(name);
            let made = File::create(&path).and_then(|file| file.set_len(size));
            made.map_err(failed("make", &path)).map(|()| path)
        };
        let initramfs = at("initramfs");
        let bytes = kiln_boot::initramfs(kernel, guest::PROGRAM)?;
        fs::write(&initramfs, bytes).map_err(failed("write", &initramfs))?;
        let config = VmConfig {
            directory: staging.path().to_owned(),
            cpus: shape.cpus,
            memory: shape.memory,
            memory_file: sparse("memory", shape.memory)?,
            memory_kind: MemoryKind::Written,
            boot: Some(BootConfig {
                kernel: kernel.image(),
                initramfs,
                command_line: COMMAND_LINE.to_owned(),
            }),
            image: sparse("image", image_size(&self.root))?,
            disk: match begun_with {
                Some(disk) => self.disks.create(disk, DISK_SIZE)?,
                None => sparse("disk", DISK_SIZE)?,
            },
        };
        let begun = Instant::now();
        let mut vm = hypervisor.create(&config)?;
        let link = vm.link()?;
        vm.resume()?;
        greet(link).map_err(|error| with_console(error, &at("console.log")))?;
        let boot_millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        vm.pause()?;
        vm.save(staging.path())?;
        drop(vm);
        let record = TemplateRecord {
            format: FORMAT,
            made: Timestamp::now(),
            kernel: kernel.name().to_owned(),
            hypervisor: hypervisor.fingerprint(),
            shape,
            disk,
            boot_millis,
        };
        for used_up in ["image", "disk", "initramfs", "console.log", "console.sock", "qemu.log"] {
            let _ = fs::remove_file(at(used_up));
        }
        let json =
            serde_json::to_vec_pretty(&record).map_err(|error| failed("write", directory)(error.into()))?;
        fs::write(at("template.json"), json).map_err(failed("write", directory))?;
        // One that is seen is whole, even if the host loses its power.
        File::open(staging.path())
            .and_then(|open| Ok(rustix::fs::syncfs(open)?))
            .map_err(failed("write", directory))?;
        if let Some(disk) = begun_with {
            self.disks.flush(disk)?;
        }
        let staging = staging.keep();
        fs::rename(&staging, directory).map_err(failed("make", directory))
    }

    /// Removes what was not used for longest, beyond a few.
    fn keep_few(&self, newest: Digest) -> Result<(), BackendError> {
        let others = self.list()?.into_iter().filter(|template| template.key != newest);
        for template in others.skip(KEPT) {
            self.remove(&template)?;
        }
        Ok(())
    }
}

/// Words for the kernel besides those that the machine's kind needs. Nobody but the workload is in a machine: of the security
/// modules it has those that a program applies to itself. And it is alone, so that what waits for all processors to have seen
/// a change (a mount, a device) may hurry them.
const COMMAND_LINE: &str = "quiet loglevel=3 random.trust_cpu=on cgroup_no_v1=all \
                            systemd.unified_cgroup_hierarchy=1 lsm=landlock,yama rcupdate.rcu_expedited=1";

fn key(hypervisor: &dyn Hypervisor, kernel: &Kernel, shape: Shape, disk: Disk) -> Digest {
    let parts = format!(
        "{FORMAT} {VERSION} {} {} {} {} {} {disk:?} {DISK_SIZE} {COMMAND_LINE}",
        hypervisor.fingerprint(),
        kernel.digest(),
        *guest::DIGEST,
        shape.cpus,
        shape.memory,
    );
    Digest::of(parts.as_bytes())
}

/// As large as files may be where the templates are.
fn image_size(root: &Path) -> u64 {
    let largest = |size: u64| {
        let probe = tempfile::tempfile_in(root);
        probe.and_then(|file| file.set_len(size)).is_ok()
    };
    let mut size = IMAGE_SIZE;
    while size > DISK_SIZE && !largest(size) {
        size /= 2;
    }
    size
}

/// Waits until the guest says that it is ready.
fn greet(link: std::os::fd::OwnedFd) -> Result<(), BackendError> {
    let runtime = stream::runtime()?;
    runtime.block_on(async {
        let stream = stream::adopt(link)?;
        let greeted = tokio::time::timeout(TO_BOOT, HostLink::greet(stream)).await;
        match greeted {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(LinkError::Closed)) => {
                Err(BackendError::new(ErrorKind::Failed, "the guest ended before it was ready"))
            }
            Ok(Err(error)) => Err(BackendError::caused("the guest did not get ready", error)),
            Err(_) => Err(BackendError::caused(
                "the guest did not get ready",
                LinkError::TimedOut { what: "say hello", after: TO_BOOT },
            )),
        }
    })
}

/// An error with the last lines that the guest wrote to its console.
pub(crate) fn with_console(error: BackendError, log: &Path) -> BackendError {
    let said = fs::read(log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(4000)..]).into_owned();
    let lines: Vec<&str> = said.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return error.hint("the guest wrote nothing to its console");
    }
    error.hint(format!("its console's last lines:\n{}", lines[lines.len().saturating_sub(12)..].join("\n")))
}

fn used(template: &Template) -> std::time::SystemTime {
    let file = fs::metadata(template.directory.join("template.json"));
    file.and_then(|file| file.modified()).unwrap_or(std::time::UNIX_EPOCH)
}

/// Remembers that it was used: only for which are kept.
fn touch(template: &Template) {
    let path = template.directory.join("template.json");
    if let Ok(file) = File::options().append(true).open(path) {
        let _ = file.set_modified(std::time::SystemTime::now());
    }
}

pub(crate) fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackendError {
    let what = format!("cannot {doing} {}", path.display());
    move |error| BackendError::caused(what, error)
}
