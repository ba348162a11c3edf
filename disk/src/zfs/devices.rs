//! Finds the block device of a volume: its kernel calls it `zd` and a number, and tells which volume it is.

use std::ffi::CStr;
use std::fmt::Debug;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_contract::ErrorKind as Kind;
use rustix::ioctl::{Getter, Opcode, ioctl, opcode};

use super::ZfsDisks;
use crate::{DiskError, Result};

/// How long the kernel may take to make or rename a device.
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// Devices by their volumes' names. A trait, so that what is asked of `zfs` can be seen where there is none.
pub(super) trait Devices: Debug + Send + Sync {
    /// The device that is this volume now, if there is one.
    fn find(&self, volume: &str) -> Option<PathBuf>;
}

/// Those of this host.
///
/// A node appears in `/dev` with its volume, whether udev runs or not. Below `/dev/zvol` udev makes links to them: some time
/// after a volume was made or renamed, so that a link may be missing, or lead to the volume that had its name before. The
/// device itself says what it is called.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostDevices;

impl Devices for HostDevices {
    fn find(&self, volume: &str) -> Option<PathBuf> {
        let linked = fs::canonicalize(Path::new("/dev/zvol").join(volume)).ok();
        if let Some(device) = linked.filter(|device| is_called(device, volume)) {
            return Some(device);
        }
        let nodes = fs::read_dir("/dev").ok()?.flatten().filter(|entry| {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("zd"));
            // Not the partitions in one.
            number
                .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        });
        nodes.map(|entry| entry.path()).find(|device| is_called(device, volume))
    }
}

/// Whether a device says that it is this volume. One that goes at this moment is none.
fn is_called(device: &Path, volume: &str) -> bool {
    // BLKZNAME, include/sys/fs/zfs.h: a string that ends with a zero.
    type Name = [u8; 256];
    const NAME: Opcode = opcode::read::<Name>(0x12, 125);
    let Ok(opened) = File::open(device) else { return false };
    // SAFETY: the ioctl writes 256 bytes; other devices refuse it.
    let name = unsafe { ioctl(&opened, Getter::<NAME, Name>::new()) };
    name.is_ok_and(|name| {
        CStr::from_bytes_until_nul(&name).is_ok_and(|name| name.to_bytes() == volume.as_bytes())
    })
}

impl ZfsDisks {
    /// Renames a volume, and waits until its device has that name.
    pub(super) fn rename(&self, purpose: &str, from: &str, to: &str) -> Result<PathBuf> {
        self.zfs(purpose, &["rename", from, to])?;
        self.wait_for_device(to)
    }

    /// The device of a volume that was just made or renamed, or at any time later.
    pub(super) fn wait_for_device(&self, volume: &str) -> Result<PathBuf> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(device) = self.devices.find(volume) {
                return Ok(device);
            }
            if begun.elapsed() > DEVICE_WAIT {
                let what = format!("the ZFS volume `{volume}` has no block device in /dev");
                return Err(DiskError::place(
                    Kind::Failed,
                    what,
                    "Kiln needs the /dev of the host's kernel (devtmpfs)",
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}
