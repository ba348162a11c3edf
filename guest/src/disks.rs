//! The two disks, found by the names that the host gave them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MountFlags, mount};

use crate::failure::{Doing as _, Failure, failed, invalid};
use crate::told::told;

/// The read-only disk with the image: EROFS.
pub(crate) const IMAGE: &str = "image";
/// The writable disk: ext4.
const DISK: &str = "disk";

/// `BLKFLSBUF`: forget what was read from the device.
const FLUSH_BUFFERS: libc::c_ulong = 0x1261;
/// `EXT4_IOC_RESIZE_FS`: `_IOW('f', 16, __u64)`.
const RESIZE: libc::c_ulong = 0x4008_6610;
/// Bytes of a block of the writable disk's filesystem.
const BLOCK: u64 = 4096;
/// Where ext4 says that it is ext4 (`s_magic`), and how.
const MAGIC: (u64, [u8; 2]) = (1024 + 0x38, 0xef53_u16.to_le_bytes());
/// How long the kernel may take to notice that a device has another size.
const PATIENCE: Duration = Duration::from_secs(2);

/// The path of a disk: where the host says that it is, or the device with the serial number `kiln-<name>`.
pub(crate) fn find(name: &str) -> Result<String, Failure> {
    if let Some(path) = told(name) {
        return Ok(path);
    }
    let serial = format!("kiln-{name}");
    let entries = fs::read_dir("/sys/block").doing("list the disks")?;
    for entry in entries.flatten() {
        let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end_matches(['\n', '\0']) == serial {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(failed("find a disk", format_args!("none has the serial number {serial}")))
}

/// Forgets what was cached of a device: it may be another disk than when the machine was saved.
pub(crate) fn forget(device: &str) -> Result<(), Failure> {
    let open = File::open(device).doing(format_args!("open {device}"))?;
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(open.as_raw_fd(), FLUSH_BUFFERS, 0) } != 0 {
        return Err(failed(format_args!("flush {device}"), io::Error::last_os_error()));
    }
    Ok(())
}

/// The writable disk.
#[derive(Debug)]
pub(crate) struct Disk {
    device: String,
    /// The root of its filesystem, once that is mounted, and the bytes that it then had.
    mounted: Option<(OwnedFd, u64)>,
}

impl Disk {
    pub(crate) fn find() -> Result<Self, Failure> {
        Ok(Self { device: find(DISK)?, mounted: None })
    }

    /// Whether there is one to mount. A template that is for machines with disks of their own has none.
    pub(crate) fn has_filesystem(&self) -> Result<bool, Failure> {
        let mut magic = [0; 2];
        File::open(&self.device)
            .and_then(|device| device.read_exact_at(&mut magic, MAGIC.0))
            .doing(format_args!("read {}", self.device))?;
        Ok(magic == MAGIC.1)
    }

    /// Mounts it at `place`, as large as its device.
    pub(crate) fn mount(&mut self, place: &str) -> Result<(), Failure> {
        // No access times: reading must not write. No barriers are given up: what was synced stays. Tables of inodes that
        // are not in use need no zeros: the filesystem's checksums say which part is.
        mount(self.device.as_str(), place, "ext4", MountFlags::NOATIME, Some(c"noinit_itable"))
            .doing("mount the disk")?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, place, flags, Mode::empty()).doing(format_args!("open {place}"))?;
        let size = self.size();
        grow(&root, size)?;
        self.mounted = Some((root, size));
        Ok(())
    }

    /// Puts everything on the device, so that a copy of it now is whole.
    pub(crate) fn settle(&self) -> Result<(), Failure> {
        match &self.mounted {
            Some((root, _)) => rustix::fs::syncfs(root).doing("write to the disk"),
            None => Ok(()),
        }
    }

    /// The root of its filesystem, and its size. If it is not mounted yet, it is at `place`, and has `bytes`.
    pub(crate) fn mounted(mut self, place: &str, bytes: Option<u64>) -> Result<(OwnedFd, u64), Failure> {
        if let (None, Some(bytes)) = (&self.mounted, bytes) {
            forget(&self.device)?;
            wait_for_size(&self.device, bytes)?;
            self.mount(place)?;
        }
        self.mounted.ok_or_else(|| invalid("the disk has no filesystem yet"))
    }

    fn size(&self) -> u64 {
        size(&self.device)
    }
}

/// Lets the writable disk's filesystem that `directory` is in grow to `bytes`, which the host says the device has.
pub(crate) fn grow_to(directory: impl AsFd, bytes: u64) -> Result<(), Failure> {
    wait_for_size(&find(DISK)?, bytes)?;
    grow(directory, bytes)
}

fn size(device: &str) -> u64 {
    let name = device.rsplit('/').next().unwrap_or_default();
    let sectors = fs::read_to_string(format!("/sys/block/{name}/size")).unwrap_or_default();
    sectors.trim().parse::<u64>().unwrap_or(0).saturating_mul(512)
}

/// Waits until the device has `bytes`, as the host says it has.
fn wait_for_size(device: &str, bytes: u64) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        let size = size(device);
        if size == bytes {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            return Err(failed(
                format_args!("use {device}"),
                format_args!("it has {size} bytes and should have {bytes}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The kernel refuses to let it shrink.
fn grow(directory: impl AsFd, bytes: u64) -> Result<(), Failure> {
    let blocks = bytes / BLOCK;
    // SAFETY: reads the 64-bit number of blocks that the pointer leads to.
    if unsafe { libc::ioctl(directory.as_fd().as_raw_fd(), RESIZE, &raw const blocks) } != 0 {
        return Err(failed(
            format_args!("grow the disk's filesystem to {bytes} bytes"),
            io::Error::last_os_error(),
        ));
    }
    Ok(())
}
