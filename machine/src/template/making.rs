//! How a template is made: a machine boots, or is restored to make the root of an image, and is saved.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_boot::Kernel;
use kiln_contract::{BackendError, Digest, DiskId, ErrorKind, Hypervisor, MemoryKind, VmConfig};

use super::{DISK_SIZE, Disk, Shape, Templates, disk_of, failed, sparse};
use crate::boot::booting;
use crate::last_words::LastWords;
use crate::life::{Life, Paths};
use crate::saved::{FORMAT, MEMORY, Saved, TemplateRecord};
use crate::{console, stream};

/// How long a guest that has nothing to do may take to hold still. Where dozens of machines are emulated at once, it waits for
/// its turn.
const TO_PARK: Duration = Duration::from_secs(120);
/// The size of a template's image disk: larger than any image. What is behind the device at a restore may be shorter.
const IMAGE_SIZE: u64 = 16 << 40;

/// Where a template is being made.
pub(super) struct Place<'a> {
    pub(super) directory: &'a Path,
    /// The writable disk that it is to have.
    pub(super) disk: Option<&'a DiskId>,
}

impl Templates<'_> {
    /// Boots a machine until its guest is ready, and saves it.
    pub(super) fn boot(
        &self,
        hypervisor: &dyn Hypervisor,
        kernel: &Kernel,
        shape: Shape,
        place: &Place<'_>,
    ) -> Result<TemplateRecord, BackendError> {
        let at = |name: &str| place.directory.join(name);
        let config = VmConfig {
            directory: place.directory.to_owned(),
            cpus: shape.cpus,
            memory: shape.memory,
            memory_file: sparse(&at(MEMORY), shape.memory)?,
            memory_kind: MemoryKind::Written,
            boot: Some(booting(kernel, place.directory)?),
            image: sparse(&at("image"), image_size(&self.root))?,
            disk: match place.disk {
                Some(disk) => self.disks.create(disk, DISK_SIZE)?,
                None => sparse(&at("disk"), DISK_SIZE)?,
            },
            network: shape.unconnected()?,
        };
        let begun = Instant::now();
        let mut vm = hypervisor.create(&config)?;
        let link = vm.link()?;
        vm.resume()?;
        greet(link).map_err(|error| LastWords::whole(&at(console::LOG)).explain(error))?;
        let boot_millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        vm.pause()?;
        vm.save(place.directory)?;
        Ok(TemplateRecord {
            format: FORMAT,
            key: Digest::of(&[]),
            made: Timestamp::now(),
            kernel: kernel.name().to_owned(),
            hypervisor: hypervisor.fingerprint(),
            shape,
            disk: Disk::Own,
            boot_millis,
            sum: None,
            memory_sum: None,
            delta_sum: None,
        })
    }

    /// Has the guest of `base` make the root of an image, and saves it again.
    pub(super) fn make_root(
        &self,
        hypervisor: &dyn Hypervisor,
        base: &Saved,
        image: &Path,
        place: &Place<'_>,
    ) -> Result<TemplateRecord, BackendError> {
        let (Some(empty), Some(disk)) = (disk_of(base), place.disk) else {
            return Err(BackendError::new(ErrorKind::Failed, "the template has no disk to begin with"));
        };
        let paths = Paths {
            directory: place.directory.to_owned(),
            memory: base.memory(),
            image: image.to_owned(),
            disk: self.disks.clone_disk(&empty, None, disk)?,
            disk_size: DISK_SIZE,
            network: base.record().shape.unconnected()?,
        };
        stream::runtime()?.block_on(async {
            let mut life = Life::restore(hypervisor, base, &paths).await?;
            life.prepare().await?;
            let parked = life.parker().park(TO_PARK).await;
            let parked = parked.map_err(|error| BackendError::caused("cannot save the machine", error))?;
            life.vm().pause()?;
            life.vm().save(place.directory)?;
            drop(parked);
            Ok::<_, BackendError>(())
        })?;
        fs::hard_link(base.memory(), place.directory.join(MEMORY))
            .map_err(failed("make a template in", &self.root))?;
        Ok(TemplateRecord { made: Timestamp::now(), ..base.record().clone() })
    }
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
    stream::runtime()?.block_on(async { crate::life::greet(stream::adopt(link)?).await.map(drop) })
}
