//! The two disks, found by the serial numbers that the host gave them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::{Duration, Instant};

use crate::failure::{Doing as _, Failure, failed};

/// The read-only disk with the image: EROFS.
pub(crate) const IMAGE: &str = "kiln-image";
/// The writable disk: ext4.
pub(crate) const DISK: &str = "kiln-disk";

/// `BLKFLSBUF`: forget what was read from the device.
const FLUSH_BUFFERS: libc::c_ulong = 0x1261;
/// `EXT4_IOC_RESIZE_FS`: `_IOW('f', 16, __u64)`.
const RESIZE: libc::c_ulong = 0x4008_6610;
/// Bytes of a block of the writable disk's filesystem.
const BLOCK: u64 = 4096;
/// How long the kernel may take to notice that a device has another size.
const PATIENCE: Duration = Duration::from_secs(2);

/// The path of the device with a serial number. What was cached of it is forgotten: it may be another disk than when the
/// machine was saved.
pub(crate) fn find(serial: &str) -> Result<String, Failure> {
    let entries = fs::read_dir("/sys/block").doing("list the disks")?;
    for entry in entries.flatten() {
        let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end_matches(['\n', '\0']) == serial {
            let path = format!("/dev/{}", entry.file_name().to_string_lossy());
            let device = File::open(&path).doing(format_args!("open {path}"))?;
            // SAFETY: takes no argument.
            if unsafe { libc::ioctl(device.as_raw_fd(), FLUSH_BUFFERS, 0) } != 0 {
                return Err(failed(format_args!("flush {path}"), io::Error::last_os_error()));
            }
            return Ok(path);
        }
    }
    Err(failed("find a disk", format_args!("none has the serial number {serial}")))
}

/// Waits until the device at `path` has `bytes`, as the host says it has.
pub(crate) fn wait_for_size(path: &str, bytes: u64) -> Result<(), Failure> {
    let name = path.rsplit('/').next().unwrap_or_default();
    let begun = Instant::now();
    loop {
        let sectors = fs::read_to_string(format!("/sys/block/{name}/size")).unwrap_or_default();
        let size = sectors.trim().parse::<u64>().unwrap_or(0).saturating_mul(512);
        if size == bytes {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            return Err(failed(
                format_args!("use {path}"),
                format_args!("it has {size} bytes and should have {bytes}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets the mounted ext4 filesystem that `directory` is in grow to `bytes`; the kernel refuses to let it shrink.
pub(crate) fn grow(directory: impl AsFd, bytes: u64) -> Result<(), Failure> {
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
