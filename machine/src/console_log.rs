//! The log of a machine's console, which the hypervisor appends to and the guest fills: kept from filling the disk.
//!
//! The hypervisor has the file open for as long as the machine runs, so it cannot be replaced. Its beginning is given back to the
//! filesystem instead, and reads as zeros from then on: whoever reads at its end goes on undisturbed.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

#[cfg(target_os = "linux")]
use rustix::fs::{FallocateFlags, fallocate};

/// So much of its end stays, in bytes, and up to twice as much until somebody looks again.
const KEPT: u64 = 4 << 20;
/// Between two looks. The serial ports of machines carry a few megabytes a second at most.
const LOOK: Duration = Duration::from_secs(2);

/// Bounds the log at `path`, for ever.
pub(crate) async fn bound(path: &Path) -> std::convert::Infallible {
    let mut freed = 0;
    loop {
        if let Err(error) = cut(path, &mut freed, KEPT) {
            tracing::debug!("cannot bound {}: {error}", path.display());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Gives back what is before the last `kept` bytes, if that is as much again. `freed` bytes were given back before.
fn cut(path: &Path, freed: &mut u64, kept: u64) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    let length = file.metadata()?.len();
    let end = length.saturating_sub(kept);
    if end.saturating_sub(*freed) < kept {
        return Ok(());
    }
    match forget(&file, end) {
        // A filesystem without holes: all of it goes, and whoever reads sees that.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            *freed = 0;
            file.set_len(0)
        }
        Err(error) => Err(error),
        Ok(()) => {
            *freed = end;
            Ok(())
        }
    }
}

#[cfg(target_os = "linux")]
fn forget(file: &File, end: u64) -> io::Result<()> {
    Ok(fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, end)?)
}

#[cfg(not(target_os = "linux"))]
fn forget(_: &File, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_log_that_a_guest_floods_takes_bounded_room_and_keeps_its_end() {
        let mut log = tempfile::NamedTempFile::new().unwrap();
        let (mut freed, kept) = (0, 256 << 10);
        for round in 0..40_u32 {
            // The hypervisor appends, whatever is done to what it wrote before.
            let line = format!("{round:0>1023}\n");
            for _ in 0..100 {
                log.write_all(line.as_bytes()).unwrap();
            }
            log.flush().unwrap();
            cut(log.path(), &mut freed, kept).unwrap();
            let room = log.as_file().metadata().unwrap().blocks() * 512;
            assert!(room <= 2 * kept + (128 << 10), "{room} bytes in round {round}");
        }
        let length = log.as_file().metadata().unwrap().len();
        assert_eq!(length, 40 * 100 * 1024, "nobody who reads at its end is disturbed");
        let mut end = String::new();
        log.seek(SeekFrom::Start(length - kept)).unwrap();
        log.read_to_string(&mut end).unwrap();
        assert!(end.lines().all(|line| line.len() == 1023) && end.ends_with("39\n"), "{}", end.len());
    }
}
