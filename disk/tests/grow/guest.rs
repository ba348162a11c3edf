//! The first process of a machine that grows its disk: loads the modules in `/modules`, mounts the first virtio disk, lets
//! the kernel grow its file system to each of the sizes in its arguments (bytes), writes a file at each, and looks whether
//! all are whole at the end. What it finds goes to the console, line by line; the last is `whole` or `failed: …`.

#![allow(clippy::print_stdout, reason = "the console is where the test listens")]

#[cfg(target_os = "linux")]
fn main() {
    linux::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
mod linux {
    use std::error::Error;
    use std::fs::{self, File};
    use std::path::Path;
    use std::time::{Duration, Instant};

    use rustix::ioctl::{Setter, ioctl, opcode};
    use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
    use rustix::system::{RebootCommand, finit_module, reboot};

    const DISK: &str = "/dev/vda";
    const MOUNT: &str = "/mnt";
    /// Larger than the page cache keeps of it all, small enough for emulation.
    const FILE: usize = 3 << 20;

    pub(super) fn main() {
        match work() {
            Ok(()) => println!("whole"),
            Err(error) => println!("failed: {error}"),
        }
        rustix::fs::sync();
        // The end of the first process would be a panic of the kernel, which ends the machine too, but says much.
        let _ = reboot(RebootCommand::PowerOff);
    }

    fn work() -> Result<(), Box<dyn Error>> {
        for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc")] {
            mount(kind, place, kind, MountFlags::empty(), None)?;
        }
        load_modules()?;
        let begun = Instant::now();
        while !Path::new(DISK).exists() {
            if begun.elapsed() > Duration::from_secs(20) {
                return Err(format!("{DISK} did not appear").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        mount(DISK, MOUNT, "ext4", MountFlags::empty(), None)?;
        let sizes =
            std::env::args().skip(1).map(|size| size.parse::<u64>()).collect::<Result<Vec<_>, _>>()?;
        for size in &sizes {
            grow(*size)?;
            let path = format!("{MOUNT}/{size}");
            fs::write(&path, content(*size))?;
            File::open(&path)?.sync_all()?;
        }
        unmount(MOUNT, UnmountFlags::empty())?;

        // Read from the disk and not from memory, with the descriptors of groups that the disk has.
        mount(DISK, MOUNT, "ext4", MountFlags::empty(), None)?;
        for size in &sizes {
            if fs::read(format!("{MOUNT}/{size}"))? != content(*size) {
                return Err(format!("the file that was written at {size} bytes has changed").into());
            }
        }
        Ok(unmount(MOUNT, UnmountFlags::empty())?)
    }

    /// Lets the mounted file system grow to `size` bytes, and keeps the kernel from zeroing inode tables.
    fn grow(size: u64) -> Result<(), Box<dyn Error>> {
        const RESIZE: rustix::ioctl::Opcode = opcode::write::<u64>(b'f', 16);
        let directory = File::open(MOUNT)?;
        let begun = Instant::now();
        // SAFETY: EXT4_IOC_RESIZE_FS reads a 64-bit number of blocks.
        unsafe { ioctl(&directory, Setter::<RESIZE, u64>::new(size / 4096)) }
            .map_err(|error| format!("growing to {size} bytes: {error}"))?;
        let took = begun.elapsed();
        mount_remount(MOUNT, MountFlags::empty(), c"noinit_itable")?;
        let found = rustix::fs::fstatvfs(&directory)?;
        println!("grown {size} {} {} {}", found.f_blocks * found.f_frsize, found.f_files, took.as_micros());
        Ok(())
    }

    fn content(seed: u64) -> Vec<u8> {
        (0..FILE as u64 / 8)
            .flat_map(|index| (index ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect()
    }

    /// Loads them in whatever order their dependencies allow.
    fn load_modules() -> Result<(), Box<dyn Error>> {
        let mut waiting: Vec<_> = fs::read_dir("/modules")?.collect::<Result<_, _>>()?;
        loop {
            let before = waiting.len();
            waiting.retain(|module| {
                let loaded = File::open(module.path()).is_ok_and(|file| {
                    matches!(finit_module(&file, c"", 0), Ok(()) | Err(rustix::io::Errno::EXIST))
                });
                !loaded
            });
            if waiting.is_empty() || waiting.len() == before {
                for module in waiting {
                    println!("not loaded: {}", module.path().display());
                }
                return Ok(());
            }
        }
    }
}
