//! The root: the image's disk below, the writable disk above.
//!
//! ```text
//! /image                   EROFS, read-only
//! /disk                    ext4: upper/ and work/ of the overlay; docker/ and containerd/, which must not lie on one
//! /root                    the overlay; becomes /
//! ```
//!
//! Paths of the image lead through links that the image decides, so each is opened as in a root of its own and mounted on by
//! its descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use kiln_link::message::Root as Wanted;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};

use crate::disks;
use crate::failure::{Doing as _, Failure, failed, invalid};

/// Where the root is until it becomes `/`.
pub(crate) const MOUNT: &str = "/root";
const IMAGE: &str = "/image";
const DISK: &str = "/disk";

/// A mounted root, and what of it is out of reach once it is `/`.
#[derive(Debug)]
pub(crate) struct Root {
    /// The root of the writable disk.
    pub(crate) disk: OwnedFd,
    /// What the workload changed.
    pub(crate) upper: OwnedFd,
    /// Files that the host decides.
    pub(crate) files: OwnedFd,
}

/// Mounts the root at [`MOUNT`] with everything that belongs to any Linux system.
pub(crate) fn make(wanted: &Wanted) -> Result<Root, Failure> {
    for directory in [IMAGE, DISK, MOUNT, crate::mounts::FILES] {
        std::fs::create_dir_all(directory).doing(format_args!("make {directory}"))?;
    }
    let image = disks::find(disks::IMAGE)?;
    mount(image.as_str(), IMAGE, "erofs", MountFlags::RDONLY, None).doing("mount the image")?;
    let disk = disks::find(disks::DISK)?;
    disks::wait_for_size(&disk, wanted.disk_size)?;
    // No access times: reading must not write. No barriers are given up: what was synced stays.
    mount(disk.as_str(), DISK, "ext4", MountFlags::NOATIME, None).doing("mount the disk")?;
    for directory in ["upper", "work"] {
        let path = format!("{DISK}/{directory}");
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(format_args!("make {path}"), error));
            }
            Ok(()) if directory == "upper" => copy_attributes(IMAGE, &path)?,
            _ => {}
        }
    }
    let root = Root {
        disk: directory(DISK)?,
        upper: directory(&format!("{DISK}/upper"))?,
        files: directory(crate::mounts::FILES)?,
    };
    disks::grow(&root.disk, wanted.disk_size)?;
    let options = format!("lowerdir={IMAGE},upperdir={DISK}/upper,workdir={DISK}/work");
    let flags = if wanted.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let options = std::ffi::CString::new(options).doing("say how the root is mounted")?;
    mount("kiln", MOUNT, "overlay", flags, Some(options.as_c_str())).doing("mount the root")?;
    mount_change(MOUNT, MountPropagationFlags::SHARED).doing("share the root's mounts")?;
    system_mounts(wanted)?;
    keep_engines_off_the_overlay(wanted)?;
    Ok(root)
}

/// The overlay's root has the attributes of the upper directory: those of the image's root, then.
fn copy_attributes(from: &str, to: &str) -> Result<(), Failure> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
    let image = std::fs::metadata(from).doing("look at the image's root")?;
    chown(to, Some(image.uid()), Some(image.gid()))
        .and_then(|()| std::fs::set_permissions(to, std::fs::Permissions::from_mode(image.mode() & 0o7777)))
        .doing("give the root its attributes")
}

fn directory(path: &str) -> Result<OwnedFd, Failure> {
    openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .doing(format_args!("open {path}"))
}

fn system_mounts(wanted: &Wanted) -> Result<(), Failure> {
    let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let shm = format!("mode=1777,size={}", wanted.shm_size);
    let table: [(&str, &str, MountFlags, &str); 8] = [
        ("proc", "/proc", hardened, ""),
        ("sysfs", "/sys", hardened, ""),
        ("devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC, ""),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0620,gid=5,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", MountFlags::NOSUID | MountFlags::NODEV, &shm),
        ("mqueue", "/dev/mqueue", hardened, ""),
        ("cgroup2", "/sys/fs/cgroup", hardened, ""),
        ("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755"),
    ];
    for (kind, target, flags, options) in table {
        // A container's /run is its image's; a system's is memory, and its init mounts it if we do not.
        if target == "/run" && !wanted.system {
            continue;
        }
        let place = place(MOUNT, target, true)?;
        let options = std::ffi::CString::new(options).doing("say how it is mounted")?;
        match mount(kind, descriptor(&place).as_str(), kind, flags, Some(options.as_c_str())) {
            // Kernels without message queues are rare, but exist.
            Err(Errno::NODEV) if kind == "mqueue" => {}
            outcome => outcome.doing(format_args!("mount {kind} at {target}"))?,
        }
    }
    // Its own on every machine; the kernel makes it only for consoles.
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "fd/0"),
        ("/dev/stdout", "fd/1"),
        ("/dev/stderr", "fd/2"),
    ] {
        let target = if link == "/dev/fd" { target.to_owned() } else { format!("/proc/self/{target}") };
        match std::os::unix::fs::symlink(target, format!("{MOUNT}{link}")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(format_args!("make {link}"), error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Container engines put overlays of their own below these, and an overlay cannot be the upper layer of another.
fn keep_engines_off_the_overlay(wanted: &Wanted) -> Result<(), Failure> {
    for engine in ["docker", "containerd"] {
        let target = format!("/var/lib/{engine}");
        let Ok(place) = place(MOUNT, &target, wanted.system) else { continue };
        let source = format!("{DISK}/{engine}");
        std::fs::create_dir_all(&source).doing(format_args!("make {source}"))?;
        mount_bind(source.as_str(), descriptor(&place).as_str()).doing(format_args!("mount {target}"))?;
    }
    Ok(())
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
