//! The pool: a btrfs in a file, mounted where a home keeps its disks, for hosts whose file system cannot share blocks.
//!
//! ```text
//! disks.btrfs   the file system: a sparse file
//! disks/        where it is mounted, through a loop device that vanishes with the mount
//! ```
//!
//! How it comes and goes:
//! 1. [`BtrfsPool::make`] writes a file system into `.disks.btrfs.new`, puts it on the storage, renames it and mounts it.
//! 2. After a reboot, whoever opens the disks of this home first mounts it again; that takes root.
//! 3. [`BtrfsPool::grow`] makes file, loop device and file system larger, in this order, while disks are in use. Killed in
//!    between, it is repeated with the same size.
//! 4. [`BtrfsPool::remove`] unmounts it and removes the file.
//!
//! What is freed in the pool becomes holes in the file (`discard=async`). A pool is never made larger than what its file
//! could take of the host's file system at that moment: a sparse file that cannot grow is a failing device for the file
//! system in it.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use kiln_contract::{ByteSize, DiskId, ErrorKind as Kind, Home};
use rustix::mount::{UnmountFlags, unmount};

use crate::copy::Copying;
use crate::error::Context as _;
use crate::files::FileDisks;
use crate::lock::lock;
use crate::mounts;
use crate::programs::{HostPrograms, Programs as _};
use crate::staging::sync_directory;
use crate::{DiskError, Result, room, usage_of};

/// The least that a pool can have, in bytes: below, most of it would be btrfs's own.
pub const SMALLEST_POOL: u64 = 512 << 20;

/// What a pool has and takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStatus {
    /// What it could take of the host's file system.
    pub size: u64,
    /// What it takes now.
    pub taken: u64,
    /// What is free in it for disks.
    pub free: u64,
}

/// The pool of a home.
#[derive(Debug, Clone)]
pub struct BtrfsPool {
    home: Home,
    image: PathBuf,
    mount: PathBuf,
}

impl BtrfsPool {
    /// The pool of this home, mounted or not; `None` if there is none.
    pub fn of(home: &Home) -> Option<Self> {
        let pool = Self { home: home.clone(), image: home.disk_pool(), mount: home.disks() };
        pool.image.exists().then_some(pool)
    }

    /// Makes a pool of `size` bytes and mounts it.
    ///
    /// # Errors
    /// There is one, or there are disks outside of it; the size is too small, or more than there is room for; this is not
    /// root; `mkfs.btrfs` is not installed; the kernel has no btrfs or no loop devices. Then nothing is left.
    pub fn make(home: &Home, size: u64) -> Result<Self> {
        let _lock = lock(home)?;
        let pool = Self { home: home.clone(), image: home.disk_pool(), mount: home.disks() };
        pool.refuse_to_make(size)?;
        let new = home.path().join(".disks.btrfs.new");
        remove_if_there(&new)?;
        let made = pool.write_image(&new, size).and_then(|()| {
            fs::rename(&new, &pool.image).doing("create", &pool.image)?;
            sync_directory(home.path())?;
            pool.mount_now()
        });
        if made.is_err() {
            let _ = unmount(&pool.mount, UnmountFlags::DETACH);
            let _ = fs::remove_file(&new);
            let _ = fs::remove_file(&pool.image);
        }
        made.map(|()| pool)
    }

    fn refuse_to_make(&self, size: u64) -> Result<()> {
        if self.image.exists() {
            let what = format!("there is a pool `{}` already", self.image.display());
            return Err(DiskError::place(Kind::Conflict, what, "it can be grown"));
        }
        require_root(&self.mount)?;
        if size < SMALLEST_POOL {
            let what = format!("a pool has at least {}, not {}", ByteSize(SMALLEST_POOL), ByteSize(size));
            return Err(DiskError::place(Kind::Invalid, what, "give a larger size"));
        }
        let disks = count_disks(&self.mount)?;
        if disks > 0 {
            let what = format!("{} in `{}`, which a pool would hide", told(disks), self.mount.display());
            return Err(DiskError::place(Kind::Conflict, what, "remove their machines first"));
        }
        if mounts::at(&self.mount_point()?)?.is_some() {
            let what = format!("another file system is mounted at `{}` already", self.mount.display());
            return Err(DiskError::place(Kind::Conflict, what, "unmount it, or use it as it is"));
        }
        self.refuse_too_large(size, 0)
    }

    /// The pool's file takes `taken` bytes already.
    fn refuse_too_large(&self, size: u64, taken: u64) -> Result<()> {
        let path = self.home.path().to_owned();
        let (needed, available) = (size.saturating_sub(taken), room::available(&path)?);
        if needed > available { Err(DiskError::DiskFull { path, needed, available }) } else { Ok(()) }
    }

    fn write_image(&self, path: &Path, size: u64) -> Result<()> {
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).doing("create", path)?;
        file.set_len(size).doing("set the size of", path)?;
        let arguments = ["-q".as_ref(), "-L".as_ref(), "kiln-disks".as_ref(), path.as_os_str()];
        HostPrograms.run("make a pool for disks", "mkfs.btrfs", &arguments)?;
        file.sync_all().doing("write to disk", path)
    }

    /// The place of the mount, made if it is not there, without symlinks.
    fn mount_point(&self) -> Result<PathBuf> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.mount).doing("create", &self.mount)?;
        fs::canonicalize(&self.mount).doing("find", &self.mount)
    }

    /// The loop device through which the pool is mounted.
    fn device(&self) -> Result<Option<PathBuf>> {
        let Some(mount) = mounts::at(&self.mount_point()?)? else { return Ok(None) };
        if mount.kind == "btrfs" && self.is_behind(&mount.source) {
            return Ok(Some(mount.source));
        }
        let what = format!(
            "`{}` ({}) is mounted at `{}`, and not the pool `{}`",
            mount.source.display(),
            mount.kind,
            self.mount.display(),
            self.image.display()
        );
        Err(DiskError::place(Kind::State, what, "unmount it"))
    }

    /// Whether a loop device shows the pool's file.
    fn is_behind(&self, device: &Path) -> bool {
        let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
        let backing = device.file_name().and_then(|name| {
            let path = Path::new("/sys/block").join(name).join("loop/backing_file");
            Some(PathBuf::from(fs::read_to_string(path).ok()?.trim_end_matches('\n')))
        });
        backing.and_then(|path| identity(&path)).is_some_and(|found| Some(found) == identity(&self.image))
    }

    /// Whether it is mounted.
    pub(crate) fn is_mounted(&self) -> Result<bool> {
        Ok(self.device()?.is_some())
    }

    /// Mounts it if it is not.
    pub(crate) fn mount(&self) -> Result<()> {
        if self.device()?.is_some() {
            return Ok(());
        }
        let _lock = lock(&self.home)?;
        if self.device()?.is_some() { Ok(()) } else { self.mount_now() }
    }

    fn mount_now(&self) -> Result<()> {
        require_root(&self.mount)?;
        let point = self.mount_point()?;
        let options = "loop,noatime,nodev,nosuid,noexec,discard=async";
        let arguments: [&std::ffi::OsStr; 6] = [
            "-t".as_ref(),
            "btrfs".as_ref(),
            "-o".as_ref(),
            options.as_ref(),
            self.image.as_os_str(),
            point.as_os_str(),
        ];
        HostPrograms.run("mount the pool for disks", "mount", &arguments)?;
        fs::set_permissions(&point, Permissions::from_mode(0o700)).doing("set the permissions of", &point)?;
        // The pool's own cache is enough: without this everything would be in memory twice, and be put on the storage much
        // more slowly. File systems that cannot do it stay as they are.
        if let Some(device) = self.device()? {
            let arguments = ["--direct-io=on".as_ref(), device.as_os_str()];
            if let Err(error) = HostPrograms.run("set up the pool", "losetup", &arguments) {
                tracing::debug!(%error, "the pool's file is cached twice");
            }
        }
        Ok(())
    }

    /// Its disks; it is mounted if it was not.
    pub(crate) fn disks(&self) -> Result<FileDisks> {
        self.mount()?;
        FileDisks::open(self.mount.clone(), "btrfs", Copying::Reflink)
    }

    /// Grows it to `size` bytes. Disks may be in use.
    ///
    /// # Errors
    /// `size` is less than it has, or more than there is room for; this is not root; `btrfs` is not installed.
    pub fn grow(&self, size: u64) -> Result<()> {
        self.mount()?;
        let _lock = lock(&self.home)?;
        require_root(&self.mount)?;
        let image = OpenOptions::new().write(true).open(&self.image).doing("open", &self.image)?;
        let has = image.metadata().doing("read", &self.image)?.len();
        if size < has {
            return Err(DiskError::Shrink { what: "the pool for disks".into(), size: has, wanted: size });
        }
        self.refuse_too_large(size, self.taken()?)?;
        image.set_len(size).and_then(|()| image.sync_all()).doing("grow", &self.image)?;
        let Some(device) = self.device()? else {
            let what = format!("the pool `{}` was unmounted meanwhile", self.image.display());
            return Err(DiskError::place(Kind::State, what, "try again"));
        };
        let purpose = "grow the pool for disks";
        HostPrograms.run(purpose, "losetup", &["--set-capacity".as_ref(), device.as_os_str()])?;
        let arguments = ["filesystem", "resize", "max"].map(std::ffi::OsStr::new);
        let [what, verb, to] = arguments;
        HostPrograms.run(purpose, "btrfs", &[what, verb, to, self.mount.as_os_str()])?;
        Ok(())
    }

    fn taken(&self) -> Result<u64> {
        Ok(usage_of(&[&self.image])?.taken)
    }

    /// What it has and takes; it is mounted if it was not.
    ///
    /// # Errors
    /// It cannot be mounted or asked.
    pub fn status(&self) -> Result<PoolStatus> {
        self.mount()?;
        let size = fs::metadata(&self.image).doing("read", &self.image)?.len();
        Ok(PoolStatus { size, taken: self.taken()?, free: room::available(&self.mount)? })
    }

    /// Unmounts and removes it.
    ///
    /// # Errors
    /// There are disks in it; something else in it is in use; this is not root.
    pub fn remove(&self) -> Result<()> {
        self.mount()?;
        let _lock = lock(&self.home)?;
        require_root(&self.mount)?;
        let disks = count_disks(&self.mount)?;
        if disks > 0 {
            let what = format!("{} in the pool `{}`", told(disks), self.image.display());
            return Err(DiskError::place(Kind::State, what, "remove their machines first"));
        }
        match unmount(&self.mount_point()?, UnmountFlags::empty()) {
            Err(rustix::io::Errno::BUSY) => {
                let what = format!("the pool at `{}` is in use", self.mount.display());
                return Err(DiskError::place(Kind::State, what, "`fuser -vm` tells by whom"));
            }
            unmounted => unmounted.doing("unmount", &self.mount)?,
        }
        fs::remove_file(&self.image).doing("remove", &self.image)?;
        sync_directory(self.home.path())
    }
}

fn require_root(mount: &Path) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let what = format!("to mount a pool at `{}` takes root", mount.display());
    Err(DiskError::place(
        Kind::Unsupported,
        what,
        "run the same command as root once, or choose another back end",
    ))
}

fn count_disks(directory: &Path) -> Result<usize> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        entries => entries.doing("read", directory)?,
    };
    let is_disk = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.parse::<DiskId>().is_ok());
    Ok(entries.flatten().filter(|entry| is_disk(&entry.file_name())).count())
}

fn told(disks: usize) -> String {
    if disks == 1 { "there is a disk".to_owned() } else { format!("there are {disks} disks") }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).doing("remove", path),
        _ => Ok(()),
    }
}
