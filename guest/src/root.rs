//! The root: the image's disk below, the writable disk above.
//!
//! ```text
//! /image                   EROFS, read-only
//! /disk                    ext4: upper/ and work/ of the overlay; docker/, containerd/ and kiln/, which must not lie on one
//! /root                    the overlay; becomes /
//! ```
//!
//! Paths of the image lead through links that the image decides, so each is opened as in a root of its own and mounted on by
//! its descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use kiln_link::message::Root as Wanted;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount, mount_bind, mount_change, mount_remount,
    move_mount,
};

use crate::cgroup::Workload;
use crate::disks::{self, Disk};
use crate::failure::{Doing as _, Failure, failed, invalid};

/// Where the root is until it becomes `/`.
pub(crate) const MOUNT: &str = "/root";
pub(crate) const IMAGE: &str = "/image";
pub(crate) const DISK: &str = "/disk";
const SHM: &str = "/dev/shm";
/// Where container engines keep what they have.
const ENGINES: [&str; 3] = ["/var/lib/docker", "/var/lib/containerd", "/var/lib/kiln"];
/// Bytes of shared memory unless more or less is asked for.
const USUAL_SHM: u64 = 64 << 20;

/// A mounted root, and what of it is out of reach once it is `/`.
#[derive(Debug)]
pub(crate) struct Root {
    /// Whether it was made for whoever comes, and nobody has.
    pub(crate) is_nobodys: bool,
    /// Bytes of the writable disk.
    disk_size: u64,
    /// The root of the writable disk.
    pub(crate) disk: OwnedFd,
    /// What the workload changed.
    pub(crate) upper: OwnedFd,
    /// Files that the host decides.
    pub(crate) files: OwnedFd,
}

/// What a root is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The device with the image.
    pub(crate) image: String,
    /// The writable disk.
    pub(crate) disk: Disk,
    /// Whether that is mounted and no image was seen through it yet.
    pub(crate) is_new: bool,
    /// What is mounted in any root.
    pub(crate) system: System,
}

/// Makes the directories that a root needs of the mounted writable disk. Whether they were not there.
pub(crate) fn lay_out() -> Result<bool, Failure> {
    let mut is_new = false;
    for directory in ["upper", "work"] {
        let path = format!("{DISK}/{directory}");
        match std::fs::create_dir(&path) {
            Ok(()) => is_new = true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(format_args!("make {path}"), error)),
        }
    }
    Ok(is_new)
}

/// Mounts the root at [`MOUNT`] with everything that belongs to any Linux system. A disk that is not mounted yet has
/// `disk_size`, as the host says.
pub(crate) fn make(parts: Parts, disk_size: Option<u64>) -> Result<Root, Failure> {
    let Parts { image, disk, is_new, system } = parts;
    disks::forget(&image)?;
    mount(image.as_str(), IMAGE, "erofs", MountFlags::RDONLY, None).doing("mount the image")?;
    let (disk, disk_size) = disk.mounted(DISK, disk_size)?;
    if is_new || lay_out()? {
        copy_attributes(IMAGE, &format!("{DISK}/upper"))?;
    }
    let options = format!("lowerdir={IMAGE},upperdir={DISK}/upper,workdir={DISK}/work");
    let options = std::ffi::CString::new(options).doing("say how the root is mounted")?;
    mount("kiln", MOUNT, "overlay", MountFlags::empty(), Some(options.as_c_str())).doing("mount the root")?;
    mount_change(MOUNT, MountPropagationFlags::SHARED).doing("share the root's mounts")?;
    system.mount()?;
    let root = Root {
        is_nobodys: true,
        disk_size,
        disk,
        upper: directory(&format!("{DISK}/upper"))?,
        files: directory(crate::mounts::FILES)?,
    };
    for engine in ENGINES {
        if let Ok(place) = place(MOUNT, engine, false) {
            root.keep_off_the_overlay(engine, &place)?;
        }
    }
    Ok(root)
}

impl Root {
    /// Makes it as somebody wants it. It is `/` now.
    pub(crate) fn become_somebodys(&mut self, wanted: &Wanted, workload: &Workload) -> Result<(), Failure> {
        self.is_nobodys = false;
        if wanted.disk_size != self.disk_size {
            disks::grow_to(&self.disk, wanted.disk_size)?;
            self.disk_size = wanted.disk_size;
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        if wanted.shm_size != USUAL_SHM {
            let size = format!("size={}", wanted.shm_size);
            let size = std::ffi::CString::new(size).doing("say how large shared memory is")?;
            mount_remount(descriptor(&place("/", SHM, false)?).as_str(), flags, size.as_c_str())
                .doing("size shared memory")?;
        }
        if wanted.system {
            // A container's /run is its image's; a system's is memory.
            let run = place("/", "/run", true)?;
            mount("tmpfs", descriptor(&run).as_str(), "tmpfs", flags, Some(c"mode=0755"))
                .doing("mount memory at /run")?;
            workload.give_to_system();
            workload.show_whole()?;
            for engine in ENGINES {
                if place("/", engine, false).is_err() {
                    self.keep_off_the_overlay(engine, &place("/", engine, true)?)?;
                }
            }
        }
        Ok(())
    }

    /// Container engines put overlays of their own below these, and an overlay cannot be the upper layer of another.
    fn keep_off_the_overlay(&self, engine: &str, place: &OwnedFd) -> Result<(), Failure> {
        let name = engine.rsplit('/').next().unwrap_or(engine);
        match mkdirat(&self.disk, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(format_args!("make a directory for {engine}"), errno)),
        }
        let source = format!("{}/{name}", descriptor(&self.disk));
        mount_bind(source.as_str(), descriptor(place).as_str()).doing(format_args!("mount {engine}"))
    }
}

/// Nothing of `/` can be changed any more, except what is mounted in it.
pub(crate) fn make_read_only() -> Result<(), Failure> {
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "").doing("make the root read-only")
}

/// The overlay's root has the attributes of the upper directory: those of the image's root, then.
fn copy_attributes(from: &str, to: &str) -> Result<(), Failure> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
    let image = std::fs::metadata(from).doing("look at the image's root")?;
    let made = std::fs::metadata(to).doing("look at the disk")?;
    if (image.uid(), image.gid(), image.mode()) == (made.uid(), made.gid(), made.mode()) {
        return Ok(());
    }
    chown(to, Some(image.uid()), Some(image.gid()))
        .and_then(|()| std::fs::set_permissions(to, std::fs::Permissions::from_mode(image.mode() & 0o7777)))
        .doing("give the root its attributes")
}

fn directory(path: &str) -> Result<OwnedFd, Failure> {
    openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .doing(format_args!("open {path}"))
}

/// What is mounted in any root, mounted nowhere yet.
#[derive(Debug)]
pub(crate) struct System(Vec<(&'static str, OwnedFd)>);

impl System {
    /// Makes them all. What they show of processes and control groups is what the caller sees.
    pub(crate) fn make() -> Result<Self, Failure> {
        let private = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let hardened = private | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let devices = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let table: [(&str, &str, MountAttrFlags, &str); 7] = [
            ("proc", "/proc", hardened, ""),
            ("sysfs", "/sys", hardened, ""),
            ("devtmpfs", "/dev", devices, ""),
            ("devpts", "/dev/pts", devices, "mode=0620,gid=5,ptmxmode=0666"),
            ("tmpfs", SHM, private, "mode=1777,size=64m"),
            ("mqueue", "/dev/mqueue", hardened, ""),
            ("cgroup2", "/sys/fs/cgroup", hardened, ""),
        ];
        for directory in ["/dev/pts", SHM, "/dev/mqueue"] {
            std::fs::create_dir_all(directory).doing(format_args!("make {directory}"))?;
        }
        let mut made = Vec::with_capacity(table.len());
        for (kind, target, flags, options) in table {
            match detached(kind, flags, options) {
                Ok(mounted) => made.push((target, mounted)),
                // Kernels without message queues are rare, but exist.
                Err(Errno::NODEV) if kind == "mqueue" => {}
                Err(errno) => return Err(failed(format_args!("make {kind} for {target}"), errno)),
            }
        }
        // The kernel makes its own devices only; these belong to any system.
        for (link, target) in [
            ("/dev/fd", "/proc/self/fd"),
            ("/dev/stdin", "/proc/self/fd/0"),
            ("/dev/stdout", "/proc/self/fd/1"),
            ("/dev/stderr", "/proc/self/fd/2"),
        ] {
            std::os::unix::fs::symlink(target, link).doing(format_args!("make {link}"))?;
        }
        Ok(Self(made))
    }

    fn mount(self) -> Result<(), Failure> {
        for (target, mounted) in self.0 {
            let place = place(MOUNT, target, true)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(&mounted, "", &place, "", flags).doing(format_args!("mount {target}"))?;
        }
        Ok(())
    }
}

/// A mount of a new filesystem that nobody sees yet.
fn detached(kind: &str, flags: MountAttrFlags, options: &str) -> Result<OwnedFd, Errno> {
    let filesystem = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in options.split(',').filter_map(|option| option.split_once('=')) {
        fsconfig_set_string(filesystem.as_fd(), name, value)?;
    }
    fsconfig_create(filesystem.as_fd())?;
    fsmount(filesystem.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// Opens `path` in the root at `root`, through the image's links but not out of it. With `make`, missing directories are made.
pub(crate) fn place(root: &str, path: &str, make: bool) -> Result<OwnedFd, Failure> {
    let root = &directory(root)?;
    if !path.starts_with('/') {
        return Err(invalid(format!("`{path}` is not absolute")));
    }
    let relative = path.trim_start_matches('/');
    let relative = if relative.is_empty() { "." } else { relative };
    match open_in(root, relative) {
        Err(Errno::NOENT) if make => {}
        found => return found.doing(format_args!("open {path}")),
    }
    let mut made = String::new();
    for part in relative.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            return Err(invalid(format!("`{path}` has `..` in it")));
        }
        let parent = if made.is_empty() { "." } else { &made };
        let parent = open_in(root, parent).doing(format_args!("open {path}"))?;
        match mkdirat(&parent, part, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(format_args!("make {path}"), errno)),
        }
        if !made.is_empty() {
            made.push('/');
        }
        made.push_str(part);
    }
    open_in(root, relative).doing(format_args!("open {path}"))
}

fn open_in(root: &OwnedFd, path: &str) -> Result<OwnedFd, Errno> {
    openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// A path by which the kernel finds what is open.
pub(crate) fn descriptor(open: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", open.as_raw_fd())
}

/// A file below a directory that is out of reach by path.
pub(crate) fn create_below(directory: BorrowedFd<'_>, name: &str) -> Result<File, Failure> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::from_raw_mode(0o644))
        .map(File::from)
        .doing(format_args!("write {name}"))
}
