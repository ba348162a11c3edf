//! What a machine begins with: its kernel, its disks, and the template that it is restored from or what it boots.

use std::fs::File;
use std::path::{Path, PathBuf};

use kiln_boot::{Kernel, Kernels};
use kiln_contract::{
    BackendError, BootConfig, DiskBackend, DiskId, ErrorKind, Home, Hypervisor, InstanceDir, InstanceId,
    InstanceRecord, Silent,
};
use kiln_instance::Instances;
use kiln_store::Store;

use crate::boot::booting;
use crate::last_words::LastWords;
use crate::life::{Life, Paths};
use crate::saved::Saved;
use crate::spare::{self, Next, Taken};
use crate::template::{DISK_SIZE, Shape, Templates, disk_of};
use crate::{console, plan};

/// What is needed to run an instance's machine.
pub(crate) struct Ground {
    pub(crate) record: InstanceRecord,
    pub(crate) dir: InstanceDir,
    pub(crate) disks: Box<dyn DiskBackend>,
    pub(crate) disk: DiskId,
    /// Where the memory is that it shares with others.
    pub(crate) base: Saved,
    /// Whether it was saved itself, and does not begin from a template.
    pub(crate) is_own: bool,
    /// Bytes of its writable disk.
    pub(crate) disk_size: u64,
    /// The spare machine that is to be made for the next start from the same template.
    pub(crate) next: Option<Next>,
}

/// The kernel of a machine.
pub(crate) fn kernel(home: &Home, record: &InstanceRecord) -> Result<Kernel, BackendError> {
    let kernels = Kernels::open(home);
    Ok(match &record.spec.machine.kernel {
        Some(name) => kernels.find(name)?,
        None => kernels.default()?,
    })
}

/// Whether the next start of a machine boots its kernel.
pub(crate) fn is_cold(dir: &InstanceDir, record: &InstanceRecord) -> bool {
    record.spec.machine.cold || plan::cold(dir).exists()
}

/// The template for a machine whose image disk is at `image`, made if it is not there.
pub(crate) fn template(
    home: &Home,
    record: &InstanceRecord,
    hypervisor: &dyn Hypervisor,
    (disks, image): (&dyn DiskBackend, &Path),
    progress: &dyn kiln_contract::Progress,
) -> Result<Saved, BackendError> {
    let kernel = kernel(home, record)?;
    let has_disk = disks.path(&DiskId::from(&record.id)).is_ok();
    let shape = plan::shape(&record.spec)?;
    let templates = Templates::open(home, disks);
    if has_disk || plan::disk_size(&record.spec) < DISK_SIZE {
        templates.get(hypervisor, &kernel, shape, false, progress)
    } else {
        templates.with_root(hypervisor, &kernel, shape, (image, &record.spec.image), progress)
    }
}

/// The image disk of a machine, made if it is not there.
pub(crate) fn image(
    home: &Home,
    record: &InstanceRecord,
    progress: &dyn kiln_contract::Progress,
) -> Result<PathBuf, BackendError> {
    let fail =
        |error| BackendError::caused(format!("cannot make the image disk of {}", record.spec.name), error);
    let store = Store::open(home).map_err(fail)?;
    let layers = store.with_mount_points(&record.spec.layers).map_err(fail)?;
    store.image_disk(&layers, progress).map_err(fail)
}

/// The disks of a home.
pub(crate) fn disks(home: &Home) -> Result<Box<dyn DiskBackend>, BackendError> {
    Ok(kiln_disk::open(home, &kiln_disk::Choice::Auto)?.backend)
}

/// The path of a machine's writable disk, made if there is none.
fn own_disk(
    disks: &dyn DiskBackend,
    disk: &DiskId,
    template: &Saved,
    is_own: bool,
    size: u64,
) -> Result<PathBuf, BackendError> {
    if let Ok(path) = disks.path(disk) {
        return Ok(path);
    }
    if is_own {
        return Err(BackendError::new(
            ErrorKind::NotFound,
            "the machine has no disk: it was not forked to the end",
        )
        .hint("remove it, and fork again"));
    }
    let Some(empty) = disk_of(template) else { return disks.create(disk, size) };
    let path = disks.clone_disk(&empty, None, disk)?;
    if size > DISK_SIZE {
        disks.resize(disk, size)?;
    }
    Ok(path)
}

/// How a machine begins.
enum Beginning {
    /// It is restored.
    Saved(Saved),
    /// It was restored before, and has waited; of the same template.
    Spare(Saved, Taken),
    /// Its kernel boots.
    Boot(Shape, BootConfig),
}

/// How a machine begins, on which disks, and what it is given.
pub(crate) struct Found {
    pub(crate) home: Home,
    hypervisor: Box<dyn Hypervisor>,
    beginning: Option<Beginning>,
    pub(crate) paths: Paths,
    pub(crate) ground: Ground,
    /// Its disk was made for this start.
    has_new_disk: bool,
    /// Keeps the template from being removed.
    held: File,
}

/// Finds all that is needed, and makes what is not there.
pub(crate) fn find(home: &Home, id: &InstanceId) -> Result<Found, BackendError> {
    let instances = Instances::of(home);
    let record = instances.read(id)?;
    let dir = instances.dir(id);
    let hypervisor = kiln_vmm::open(record.spec.machine.hypervisor)?;
    let disks = disks(home)?;
    let image = image(home, &record, &Silent)?;
    let disk = DiskId::from(id);
    let size = plan::disk_size(&record.spec);
    let own = Saved::load(&plan::saved(&dir));
    let is_own = own.is_some();
    let mut next = None;
    let has_new_disk = !is_own && disks.path(&disk).is_err();
    let (beginning, base, disk_path) = if is_cold(&dir, &record) && !is_own {
        let (kernel, shape) = (kernel(home, &record)?, plan::shape(&record.spec)?);
        let base = Saved::nothing(&plan::base(&dir), kernel.name(), &*hypervisor, shape)?;
        let path = disks.path(&disk).or_else(|_| disks.create(&disk, size))?;
        (Beginning::Boot(shape, booting(&kernel, dir.path())?), base, path)
    } else {
        let saved = match own {
            Some(own) => {
                own.check(&*hypervisor)?;
                own
            }
            None => template(home, &record, &*hypervisor, (&*disks, &image), &Silent)?,
        };
        let base = if is_own { saved.with_base(&plan::base(&dir))? } else { saved.clone() };
        let mut taken = None;
        if has_new_disk && spare::is_for(&saved, &*hypervisor, &*disks) {
            next = Some(Next::new(home, &saved, &image));
            if size == DISK_SIZE {
                taken = spare::take(&saved, &*disks, &disk, &dir);
            }
        }
        match taken {
            Some(taken) => {
                let path = taken.disk.clone();
                (Beginning::Spare(saved, taken), base, path)
            }
            None => {
                let path = own_disk(&*disks, &disk, &saved, is_own, size)?;
                (Beginning::Saved(saved), base, path)
            }
        }
    };
    let held = base.hold()?;
    let disk_size = disks.size(&disk)?;
    let memory = base.memory();
    let paths =
        Paths { directory: dir.path().to_owned(), memory, image, disk: disk_path, disk_size, network: None };
    let ground = Ground { record, dir, disks, disk, base, is_own, disk_size, next };
    let beginning = Some(beginning);
    Ok(Found { home: home.clone(), hypervisor, beginning, paths, ground, has_new_disk, held })
}

impl Found {
    /// Restores or boots it. The guest waits to be configured. It begins once.
    pub(crate) async fn begin(&mut self) -> Result<Life, BackendError> {
        let Some(beginning) = self.beginning.take() else {
            return Err(BackendError::new(ErrorKind::State, "the machine has begun already"));
        };
        match beginning {
            Beginning::Saved(saved) => self.restore(saved).await,
            Beginning::Spare(saved, Taken { handle, owner, .. }) => {
                let given = (handle, owner.into());
                match Life::adopt(&*self.hypervisor, &saved, &self.paths, given).await {
                    Ok(life) => Ok(life),
                    Err(error) => {
                        tracing::warn!(
                            "the spare machine is lost, and one is restored: {}",
                            error.with_causes()
                        );
                        let Ground { disks, disk, .. } = &self.ground;
                        disks.remove(disk)?;
                        self.paths.disk = own_disk(&**disks, disk, &saved, false, DISK_SIZE)?;
                        self.restore(saved).await
                    }
                }
            }
            Beginning::Boot(shape, boot) => self.boot(shape, boot).await,
        }
    }

    async fn boot(&self, shape: Shape, boot: BootConfig) -> Result<Life, BackendError> {
        let console = self.ground.dir.path().join(console::LOG);
        let life = Life::boot(&*self.hypervisor, shape, boot, &self.paths).await;
        life.map_err(|error| LastWords::whole(&console).explain(error))
    }

    /// Restores it. If that fails because its template is not what it was, the template goes, and the kernel boots. A failure
    /// that has another reason (no room, a hypervisor that was killed) leaves the template as it is.
    async fn restore(&mut self, saved: Saved) -> Result<Life, BackendError> {
        let error = match Life::restore(&*self.hypervisor, &saved, &self.paths).await {
            Err(error) if !self.ground.is_own && saved.is_damaged() => error,
            outcome => return outcome,
        };
        let key = saved.record().key;
        tracing::warn!(
            "template {} is damaged: this start boots the kernel, and the next makes another template ({})",
            key.short(),
            error.with_causes()
        );
        let (shape, boot) = self.begin_anew()?;
        if let Err(error) = Templates::open(&self.home, &*self.ground.disks).discard(&saved) {
            tracing::warn!("the damaged template {} stays: {}", key.short(), error.with_causes());
        }
        self.boot(shape, boot).await
    }

    /// Makes it one that boots: with memory in which nothing is, and a disk of its own in which nothing of the template's is.
    fn begin_anew(&mut self) -> Result<(Shape, BootConfig), BackendError> {
        let ground = &mut self.ground;
        let (kernel, shape) = (kernel(&self.home, &ground.record)?, plan::shape(&ground.record.spec)?);
        if self.has_new_disk {
            ground.disks.remove(&ground.disk)?;
            self.paths.disk = ground.disks.create(&ground.disk, ground.disk_size)?;
        }
        ground.base = Saved::nothing(&plan::base(&ground.dir), kernel.name(), &*self.hypervisor, shape)?;
        ground.next = None;
        self.paths.memory = ground.base.memory();
        // What holds the template is let go of.
        self.held = ground.base.hold()?;
        Ok((shape, booting(&kernel, ground.dir.path())?))
    }
}
