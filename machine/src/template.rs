//! Templates: machines saved at the moment at which their guest is ready and is nobody yet.
//!
//! ```text
//! templates/<key>/
//!   template.json        what it was made from, when, and how long the boot took
//!   memory, state        see [`saved`](crate::saved)
//! templates/<key>.lock   held by who is making it
//! disks/template-<key>   the writable disk that is mounted in it, if one is
//! ```
//!
//! There are three kinds. The guest of the first has mounted an empty disk of the usual size. Such a one is restored once for
//! each image to make the image's root on that disk, and is saved again: the second kind, as small as what that changed.
//! Machines of the image begin with it and with a copy of its disk, which is theirs from then on. The guest of the third kind
//! has mounted no disk, for machines that have one of their own already or want a smaller one; all of that is part of their
//! start.
//!
//! The key is the digest of everything that a saved state depends on: the hypervisor with its version and accelerator, kernel,
//! guest, link, number of processors, memory, whether there is a network device, and the sizes that the devices had. If any of
//! it changes, there is just no template of that key, and one is made: nothing can be stale. What is no longer used is bounded in
//! number; a template that is removed while machines run from it goes when the last of them does.

mod making;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_boot::Kernel;
use kiln_contract::{
    BackendError, Digest, DiskBackend, DiskId, ErrorKind, Home, Hypervisor, MachineSpec, Progress, Step,
};
use kiln_instance::Instances;
use kiln_link::VERSION;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::beginning::disks;
use crate::boot::COMMAND_LINE;
use crate::saved::{self, DELTA, FORMAT, MEMORY, RECORD, STATE, Saved, TemplateRecord};
use crate::{guest, spare};
use making::Place;

/// Templates that are kept besides the newest; each has a size, a kernel or an image of its own.
const KEPT: usize = 32;
/// Bytes that all of them may take together.
const KEPT_BYTES: u64 = 8 << 30;
/// What the name of a template's lock ends in.
const LOCK: &str = "lock";
/// What the name of one that is being made begins with; its key follows.
const UNFINISHED: &str = ".new-";
/// The size of a template's writable disk. A machine's that is of another size says so.
pub(crate) const DISK_SIZE: u64 = MachineSpec::DISK.bytes();

/// A machine's processors and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual processors, at least 1.
    pub cpus: u32,
    /// Memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// It has a network device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub network: bool,
}

impl Shape {
    /// A network device that leads nowhere, for who only makes a template.
    pub(crate) fn unconnected(self) -> Result<Option<Arc<OwnedFd>>, BackendError> {
        self.network.then(kiln_net::unconnected_tap).transpose()
    }
}

/// What the guest has for a writable disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disk {
    /// An empty one of the usual size, mounted: a machine begins with a copy of it.
    Empty,
    /// None yet: a machine mounts its own.
    Own,
    /// One on which the root of an image was made, and mounted: a machine of that image begins with a copy of it.
    Root,
}

/// The disk that a machine begins with a copy of.
pub(crate) fn disk_of(template: &Saved) -> Option<DiskId> {
    match template.record().disk {
        Disk::Empty | Disk::Root => disk_id(template.record().key),
        Disk::Own => None,
    }
}

/// Whose name begins so is the disk of a template.
const DISK_PREFIX: &str = "template-";

/// The disk of the template `key`, among those of machines.
fn disk_id(key: Digest) -> Option<DiskId> {
    format!("{DISK_PREFIX}{}", key.hex()).parse().ok()
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
    pub fn list(&self) -> Result<Vec<Saved>, BackendError> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list", &self.root)(error)),
        };
        let mut found: Vec<_> = entries.flatten().filter_map(|entry| Saved::load(&entry.path())).collect();
        found.sort_by_key(|template| std::cmp::Reverse(used(template)));
        Ok(found)
    }

    /// Removes a template. What was forked or saved over it stays whole.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if a machine runs from it: it could not be forked any more. Its files cannot be removed.
    pub fn remove(&self, template: &Saved) -> Result<(), BackendError> {
        let key = template.record().key;
        if template.is_held() {
            return Err(BackendError::new(
                ErrorKind::State,
                format!("cannot remove template {}: a running machine began with it", key.short()),
            )
            .hint("stop the machine first"));
        }
        spare::end(template, self.disks)?;
        // Out of sight first, so that no half of it is ever found.
        let aside = self.root.join(format!(".gone-{}", key.hex()));
        match fs::rename(template.directory(), &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("remove", template.directory())(error)),
            Ok(()) => fs::remove_dir_all(&aside).map_err(failed("remove", &aside)),
        }?;
        match disk_id(key) {
            Some(disk) if self.disks.path(&disk).is_ok() => self.disks.remove(&disk),
            _ => Ok(()),
        }
    }

    /// Removes a template whose memory is damaged, and those that have the same.
    ///
    /// # Errors
    /// As [`remove`](Self::remove).
    pub(crate) fn discard(&self, damaged: &Saved) -> Result<(), BackendError> {
        let sharing = self.list()?.into_iter().filter(|template| template.shares_memory(damaged));
        sharing.collect::<Vec<_>>().iter().try_for_each(|template| self.remove(template))
    }

    /// Removes directories that are no template: those of older versions, and what was killed while it made one.
    fn sweep(&self) -> Result<(), BackendError> {
        let entries = || fs::read_dir(&self.root).map_err(failed("list", &self.root)).map(Iterator::flatten);
        let is_locked = |path: &Path| {
            File::open(path).is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
        };
        // One that is being made has no name of its own yet.
        if entries()?
            .any(|entry| entry.path().extension().is_some_and(|end| end == LOCK) && is_locked(&entry.path()))
        {
            return Ok(());
        }
        for entry in entries()? {
            let path = entry.path();
            if path.is_dir() && Saved::load(&path).is_none() {
                fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Disks of templates that are gone.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub(crate) fn orphans(&self, disks: &[DiskId]) -> Result<Vec<DiskId>, BackendError> {
        let known: Vec<_> = self.list()?.iter().filter_map(disk_of).collect();
        let is_ours = |disk: &&DiskId| disk.as_str().starts_with(DISK_PREFIX);
        Ok(disks.iter().filter(is_ours).filter(|disk| !known.contains(disk)).cloned().collect())
    }

    /// A template that is whole, its disk too.
    fn load(&self, directory: &Path) -> Option<Saved> {
        let found = Saved::load(directory)?;
        if !found.is_as_made() {
            tracing::warn!("the template at {} is damaged and will be made again", directory.display());
            return None;
        }
        let has_disk = disk_of(&found).is_none_or(|disk| self.disks.path(&disk).is_ok());
        has_disk.then_some(found)
    }

    /// The template for machines of `shape` with `kernel`, with an empty disk or none; made if it is not there, by one process
    /// while others wait. Not to be called in a runtime, and from a thread that outlives the call.
    ///
    /// # Errors
    /// A guest that does not get ready: with the last lines of its console. The disk is full. Nothing is left then.
    pub fn get(
        &self,
        hypervisor: &dyn Hypervisor,
        kernel: &Kernel,
        shape: Shape,
        has_disk: bool,
        progress: &dyn Progress,
    ) -> Result<Saved, BackendError> {
        let disk = if has_disk { Disk::Empty } else { Disk::Own };
        let key = key(hypervisor, kernel, shape, disk);
        let name = format!("{} ({} CPU, {} MiB)", kernel.name(), shape.cpus, shape.memory >> 20);
        self.once(key, disk, (name, progress), |place| self.boot(hypervisor, kernel, shape, place))
    }

    /// The template for machines that begin with the image disk at `image`: the one with an empty disk, in which the root of
    /// that image was made. `name` is the image's, for who watches. Otherwise as [`get`](Self::get).
    ///
    /// # Errors
    /// As [`get`](Self::get); and if the guest cannot make the root.
    pub fn with_root(
        &self,
        hypervisor: &dyn Hypervisor,
        kernel: &Kernel,
        shape: Shape,
        (image, name): (&Path, &str),
        progress: &dyn Progress,
    ) -> Result<Saved, BackendError> {
        let base = key(hypervisor, kernel, shape, Disk::Empty);
        let key = root_key(base, image);
        if let Some(template) = self.load(&self.root.join(key.hex())) {
            touch(&template);
            return Ok(template);
        }
        let make = |base: &Saved| {
            let _held = base.hold()?;
            self.once(key, Disk::Root, (name.to_owned(), progress), |place| {
                self.make_root(hypervisor, base, image, place)
            })
        };
        let base = self.get(hypervisor, kernel, shape, true, progress)?;
        match make(&base) {
            Err(error) if base.is_damaged() => {
                tracing::warn!(
                    "template {} is damaged and is made again: {}",
                    base.record().key.short(),
                    error.with_causes()
                );
                self.discard(&base)?;
                make(&self.get(hypervisor, kernel, shape, true, progress)?)
            }
            made => made,
        }
    }

    /// The template of that key, made by one process if it is not there.
    fn once(
        &self,
        key: Digest,
        disk: Disk,
        (name, progress): (String, &dyn Progress),
        make: impl FnOnce(&Place<'_>) -> Result<TemplateRecord, BackendError>,
    ) -> Result<Saved, BackendError> {
        let directory = self.root.join(key.hex());
        if let Some(template) = self.load(&directory) {
            touch(&template);
            return Ok(template);
        }
        fs::create_dir_all(&self.root).map_err(failed("make", &self.root))?;
        let path = directory.with_extension(LOCK);
        let lock = File::create(&path).map_err(failed("make", &path))?;
        rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))
            .map_err(|error| failed("lock", &path)(error.into()))?;
        // Somebody else may have made it meanwhile.
        if let Some(template) = self.load(&directory) {
            return Ok(template);
        }
        // What is there and is not whole: a disk was full, a file was cut.
        saved::remove(&directory)?;
        self.clear_unfinished(key)?;
        let begun_with = if disk == Disk::Own { None } else { disk_id(key) };
        if let Some(disk) = begun_with.as_ref().filter(|disk| self.disks.path(disk).is_ok()) {
            self.disks.remove(disk)?;
        }
        let step = progress.begin(Step { name, verb: "template", total: None });
        let made = self.put(key, disk, begun_with.as_ref(), &directory, make);
        progress.end(step, if made.is_ok() { "done" } else { "failed" });
        if let (Err(_), Some(disk)) = (&made, &begun_with)
            && let Err(error) = self.disks.remove(disk)
        {
            tracing::debug!("{error}");
        }
        made?;
        self.keep_few(key, KEPT, KEPT_BYTES)?;
        self.load(&directory).ok_or_else(|| {
            BackendError::new(ErrorKind::Failed, format!("the template at {} vanished", directory.display()))
        })
    }

    /// Has one made aside, and puts it in its place.
    fn put(
        &self,
        key: Digest,
        disk: Disk,
        begun_with: Option<&DiskId>,
        directory: &Path,
        make: impl FnOnce(&Place<'_>) -> Result<TemplateRecord, BackendError>,
    ) -> Result<(), BackendError> {
        // Gone with all that is in it, whatever happens.
        let staging = tempfile::Builder::new()
            .prefix(&format!("{UNFINISHED}{}-", key.hex()))
            .tempdir_in(&self.root)
            .map_err(failed("make a directory in", &self.root))?;
        let record = make(&Place { directory: staging.path(), disk: begun_with })?;
        let content = |name: &str| {
            let path = staging.path().join(name);
            saved::content(&path).map_err(failed("read", &path))
        };
        let record = TemplateRecord {
            key,
            disk,
            sum: saved::sum(staging.path()),
            // What is made over another template has its memory.
            memory_sum: Some(record.memory_sum.map_or_else(|| content(MEMORY), Ok)?),
            delta_sum: if staging.path().join(DELTA).exists() { Some(content(DELTA)?) } else { None },
            ..record
        };
        // All else was for the boot.
        for entry in fs::read_dir(staging.path()).map_err(failed("list", staging.path()))?.flatten() {
            if ![MEMORY, STATE, DELTA].iter().any(|kept| entry.file_name() == *kept) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let json =
            serde_json::to_vec_pretty(&record).map_err(|error| failed("write", directory)(error.into()))?;
        fs::write(staging.path().join(RECORD), json).map_err(failed("write", directory))?;
        // One that is seen is whole, even if the host loses its power.
        for name in ["", MEMORY, STATE, DELTA, RECORD] {
            let path = staging.path().join(name);
            match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                open => open.and_then(|open| open.sync_all()).map_err(failed("write", &path))?,
            }
        }
        if let Some(disk) = begun_with {
            self.disks.flush(disk)?;
        }
        let staging = staging.keep();
        fs::rename(&staging, directory).map_err(failed("make", directory))
    }

    /// Removes what makers that were killed have left: whoever makes one holds its lock. The caller has that of `own`, and has
    /// made nothing yet.
    fn clear_unfinished(&self, own: Digest) -> Result<(), BackendError> {
        let entries = fs::read_dir(&self.root).map_err(failed("list", &self.root))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Some((key, _)) = name.strip_prefix(UNFINISHED).and_then(|rest| rest.split_once('-')) else {
                continue;
            };
            let directory = self.root.join(key);
            // Held until what it is for is gone.
            let lock = File::open(directory.with_extension(LOCK));
            let take = |lock: &File| flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok();
            if key != own.hex() && !lock.as_ref().is_ok_and(take) {
                continue;
            }
            saved::remove(&path)?;
            if let Ok(disk) = format!("{DISK_PREFIX}{key}").parse::<DiskId>()
                && !directory.exists()
                && self.disks.path(&disk).is_ok()
            {
                self.disks.remove(&disk)?;
            }
        }
        Ok(())
    }

    /// Removes what was not used for longest, beyond so many besides the newest, and so many bytes.
    fn keep_few(&self, newest: Digest, kept: usize, most: u64) -> Result<(), BackendError> {
        let mut bytes = 0;
        for (older, template) in self.list()?.into_iter().enumerate() {
            bytes += template.size();
            let is_kept = older <= kept && bytes <= most;
            if !is_kept && template.record().key != newest && !template.is_held() {
                self.remove(&template)?;
            }
        }
        Ok(())
    }
}

/// The templates of a home, the one used last first.
///
/// # Errors
/// If they cannot be listed.
pub fn templates(home: &Home) -> Result<Vec<Saved>, BackendError> {
    if !home.templates().exists() {
        return Ok(Vec::new());
    }
    Templates::open(home, &*disks(home)?).list()
}

/// Removes the template whose id begins so.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::Conflict`] if it is not the only one; as [`Templates::remove`].
pub fn remove_template(home: &Home, id: &str) -> Result<(), BackendError> {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    let found: Vec<_> = templates(home)?
        .into_iter()
        .filter(|template| !digits.is_empty() && template.record().key.hex().starts_with(digits))
        .collect();
    match found.as_slice() {
        [template] => Templates::open(home, &*disks(home)?).remove(template),
        [] => Err(BackendError::new(ErrorKind::NotFound, format!("no such template: {id}"))
            .hint("`kiln template ls` lists those that there are")),
        several => Err(BackendError::new(
            ErrorKind::Conflict,
            format!("{} templates begin with {id}", several.len()),
        )
        .hint("give more of its id")),
    }
}

/// Removes the templates that no running machine began with, and disks of those that are gone. Those that were, or with
/// `dry_run` would be.
///
/// # Errors
/// If one cannot be removed.
pub fn prune_templates(home: &Home, dry_run: bool) -> Result<Vec<Saved>, BackendError> {
    let unused: Vec<_> = templates(home)?.into_iter().filter(|template| !template.is_held()).collect();
    if dry_run || !home.templates().exists() {
        return Ok(unused);
    }
    let disks = disks(home)?;
    let templates = Templates::open(home, &*disks);
    for template in &unused {
        templates.remove(template)?;
    }
    for disk in templates.orphans(&disks.list()?)? {
        disks.remove(&disk)?;
    }
    templates.sweep()?;
    Ok(unused)
}

/// Ends the spare machines, and removes the disks that are neither a machine's nor a template's: a spare one's, and what was
/// killed while it made them left. Those that were, or with `dry_run` would be.
///
/// # Errors
/// If one cannot be removed.
pub fn prune_disks(home: &Home, dry_run: bool) -> Result<Vec<DiskId>, BackendError> {
    if !home.disks().exists() {
        return Ok(Vec::new());
    }
    let disks = disks(home)?;
    let all = disks.list()?;
    if !dry_run {
        templates(home)?.iter().try_for_each(|template| spare::end(template, &*disks))?;
    }
    let mut unowned = Templates::open(home, &*disks).orphans(&all)?;
    let instances: Vec<_> = Instances::of(home).ids()?.iter().map(DiskId::from).collect();
    let is_template = |disk: &DiskId| disk.as_str().starts_with(DISK_PREFIX);
    let is_owned = |disk: &DiskId| is_template(disk) || instances.contains(disk);
    unowned.extend(all.into_iter().filter(|disk| !is_owned(disk)));
    for disk in unowned.iter().filter(|_| !dry_run) {
        disks.remove(disk)?;
    }
    Ok(unowned)
}

/// A file of `size` bytes that takes no room.
pub(crate) fn sparse(path: &Path, size: u64) -> Result<PathBuf, BackendError> {
    let made = File::create(path).and_then(|file| file.set_len(size));
    made.map_err(failed("make", path)).map(|()| path.to_owned())
}

fn key(hypervisor: &dyn Hypervisor, kernel: &Kernel, shape: Shape, disk: Disk) -> Digest {
    let hypervisor = &hypervisor.fingerprint();
    Parts { hypervisor, kernel: kernel.digest(), guest: guest::DIGEST, shape, disk }.key()
}

/// Everything that a saved state depends on, besides what this program decides.
#[derive(Debug, Clone, Copy)]
struct Parts<'a> {
    hypervisor: &'a str,
    kernel: Digest,
    guest: &'a str,
    shape: Shape,
    disk: Disk,
}

impl Parts<'_> {
    fn key(self) -> Digest {
        let Self { hypervisor, kernel, guest, shape: Shape { cpus, memory, network }, disk } = self;
        let parts = format!(
            "{FORMAT} {VERSION} {hypervisor} {kernel} {guest} {cpus} {memory} {network} {disk:?} {DISK_SIZE} {COMMAND_LINE}"
        );
        Digest::of(parts.as_bytes())
    }
}

/// The key of the template with the root of an image, whose disk's name is the digest of the layers that it was made from.
fn root_key(base: Digest, image: &Path) -> Digest {
    let image_name = image.file_name().unwrap_or_default().to_string_lossy();
    Digest::of(format!("{base} {image_name}").as_bytes())
}

fn used(template: &Saved) -> std::time::SystemTime {
    let file = fs::metadata(template.directory().join(RECORD));
    file.and_then(|file| file.modified()).unwrap_or(std::time::UNIX_EPOCH)
}

/// Remembers that it was used: only for which are kept.
fn touch(template: &Saved) {
    let path = template.directory().join(RECORD);
    if let Ok(file) = File::options().append(true).open(path) {
        let _ = file.set_modified(std::time::SystemTime::now());
    }
}

/// A path as hypervisors take it.
pub(crate) fn in_utf8(path: &Path) -> Result<String, BackendError> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        BackendError::new(ErrorKind::Invalid, "the hypervisor takes only paths in UTF-8")
            .hint("set KILN_HOME to another directory")
    })
}

pub(crate) fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackendError {
    let what = format!("cannot {doing} {}", path.display());
    move |error| BackendError::caused(what, error)
}
