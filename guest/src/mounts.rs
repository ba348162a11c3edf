//! What is seen in the root besides the image: files that the host decides, shares, memory.

use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use kiln_link::message::{HostFile, Mount, MountSource};
use kiln_link::{Opener, service};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::AsyncWriteExt as _;

use crate::agent::aside;
use crate::failure::{Doing as _, Failure, say};
use crate::root::{Root, create_below, descriptor, place};

/// Where the content of the host's files is, outside of the root.
pub(crate) const FILES: &str = "/files";
/// Bytes of a message of 9P: what is asked for; the server may give less.
const MESSAGE: usize = 512 << 10;

/// Lays files of the host's over the image's, at these paths. One that the image has not got is left out: no change of the root
/// is made for it.
pub(crate) fn host_files(root: &Root, paths: &[String]) -> Result<(), Failure> {
    paths.iter().try_for_each(|path| lay_over(root, crate::root::MOUNT, path))
}

fn lay_over(root: &Root, at: &str, path: &str) -> Result<(), Failure> {
    let Ok(target) = place(at, path, false) else { return Ok(()) };
    let name = name_of(path);
    create_below(root.files.as_fd(), &name)?;
    mount_bind(format!("{}/{name}", descriptor(&root.files)).as_str(), descriptor(&target).as_str())
        .doing(format_args!("show {path}"))
}

/// Gives the host's files their content, where they lie already.
pub(crate) fn write_host_files(root: &Root, files: &[HostFile]) -> Result<(), Failure> {
    for file in files {
        let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::CLOEXEC;
        // One that is not there was left out, for it had no place.
        if let Ok(open) = openat(&root.files, name_of(&file.path), flags, Mode::empty()) {
            File::from(open).write_all(&file.content).doing(format_args!("write {}", file.path))?;
        }
    }
    Ok(())
}

/// Takes their content away again.
pub(crate) fn empty_host_files(root: &Root, files: &[HostFile]) -> Result<(), Failure> {
    let empty: Vec<_> =
        files.iter().map(|file| HostFile { path: file.path.clone(), content: Vec::new() }).collect();
    write_host_files(root, &empty)
}

/// What the host decides for a system only: its `/run` is memory, so files in it are made, and it has an id even where its
/// image has no file for that, which its init would write one of its own to.
pub(crate) fn files_of_system(root: &Root, files: &[HostFile]) -> Result<(), Failure> {
    const MACHINE_ID: &str = "/etc/machine-id";
    for file in files.iter().filter(|file| file.path.starts_with("/run/")) {
        let (directory, name) = file.path.rsplit_once('/').unwrap_or_default();
        // A place is only a path: it is opened anew to make something in it.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = place("/", directory, true)?;
        let directory = openat(&place, ".", flags, Mode::empty()).doing(format_args!("open {directory}"))?;
        create_below(directory.as_fd(), name)?
            .write_all(&file.content)
            .doing(format_args!("write {}", file.path))?;
    }
    if place("/", MACHINE_ID, false).is_err() {
        drop(place("/", "/etc", true)?);
        File::create(MACHINE_ID).doing(format_args!("make {MACHINE_ID}"))?;
        lay_over(root, "/", MACHINE_ID)?;
    }
    Ok(())
}

fn name_of(path: &str) -> String {
    path.trim_start_matches('/').replace('/', "-")
}

/// Mounts the shares again, over another link: what they were mounted over is gone. Files that were open in them stay broken.
pub(crate) async fn again(mounts: &[Mount], files: String, opener: &Opener) -> Result<(), Failure> {
    let shares = mounts.iter().filter_map(|wanted| match wanted.source {
        MountSource::Share { number, file } => Some((wanted, number, file)),
        MountSource::Tmpfs { .. } => None,
    });
    // What lies in another share goes before it.
    for (wanted, ..) in shares.clone().rev() {
        let target = wanted.target.clone();
        aside(move || {
            rustix::mount::unmount(target.as_str(), UnmountFlags::DETACH)
                .doing(format_args!("take away {target}"))
        })
        .await?;
    }
    for (wanted, number, file) in shares {
        share(wanted, number, file, &files, opener).await?;
    }
    Ok(())
}

/// Mounts what the host asks for, in order. Shares of single files are kept in the directory `files`.
pub(crate) async fn all(mounts: &[Mount], files: String, opener: &Opener) -> Result<(), Failure> {
    for wanted in mounts {
        match &wanted.source {
            MountSource::Tmpfs { options } => {
                let flags = MountFlags::NOSUID | MountFlags::NODEV | read_only(wanted);
                let options = CString::new(options.as_str()).doing("say how it is mounted")?;
                let target = wanted.target.clone();
                // It may lie in a share.
                aside(move || {
                    let place = place("/", &target, true)?;
                    mount("tmpfs", descriptor(&place).as_str(), "tmpfs", flags, Some(options.as_c_str()))
                        .doing(format_args!("mount memory at {target}"))
                })
                .await?;
            }
            MountSource::Share { number, file } => share(wanted, *number, *file, &files, opener).await?,
        }
    }
    Ok(())
}

fn read_only(wanted: &Mount) -> MountFlags {
    if wanted.read_only { MountFlags::RDONLY } else { MountFlags::empty() }
}

/// Mounts a share of the host's: the kernel speaks 9P over a socket, and the agent carries it over the link.
async fn share(wanted: &Mount, number: u16, file: bool, files: &str, opener: &Opener) -> Result<(), Failure> {
    let doing = format!("mount the share at {}", wanted.target);
    let mut stream = opener.open(service::SHARE).await.doing(&doing)?;
    stream.write_u16_le(number).await.doing(&doing)?;
    let (kernel, agent) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).doing(&doing)?;
    let agent = std::os::unix::net::UnixStream::from(agent);
    agent.set_nonblocking(true).doing(&doing)?;
    let mut agent = tokio::net::UnixStream::from_std(agent).doing(&doing)?;
    let target = wanted.target.clone();
    tokio::spawn(async move {
        if let Err(error) =
            tokio::io::copy_bidirectional_with_sizes(&mut agent, &mut stream, MESSAGE, MESSAGE).await
        {
            say(format_args!("the share at {target} has ended: {error}"));
        }
    });
    let (target, flags) = (wanted.target.clone(), read_only(wanted));
    let aside = file.then(|| format!("{files}/share-{}", kernel.as_raw_fd()));
    // The kernel greets the server before the call returns, which takes this thread to carry.
    let attached = move || {
        let attached = attach(&kernel, &target, flags, aside.as_deref());
        if let Some(aside) = &aside {
            clear(aside);
        }
        attached
    };
    tokio::task::spawn_blocking(attached).await.doing(&doing)?
}

/// What the kernel may keep of a share: nothing that it reads, so that each side sees at once what the other writes. Before Linux
/// 6.4 `mmap` is just that, and lets programs map files for writing, as databases do; from then on it also believes what it has
/// read.
fn cache() -> &'static str {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(u32::MAX));
    let version = (numbers.next().unwrap_or(u32::MAX), numbers.next().unwrap_or(u32::MAX));
    if version < (6, 4) { "mmap" } else { "none" }
}

/// Mounts at `target`; what is a single file first at `aside`.
fn attach(kernel: &OwnedFd, target: &str, flags: MountFlags, aside: Option<&str>) -> Result<(), Failure> {
    let root = "/";
    let number = kernel.as_raw_fd();
    let options = format!(
        "trans=fd,rfdno={number},wfdno={number},version=9p2000.L,access=client,cache={},msize={MESSAGE}",
        cache()
    );
    let options = CString::new(options).doing("say how it is mounted")?;
    let doing = || format!("mount the share at {target}");
    let Some(aside) = aside else {
        let place = place(root, target, true)?;
        return mount("kiln", descriptor(&place).as_str(), "9p", flags, Some(options.as_c_str()))
            .doing(doing());
    };
    // A share of one file is a directory with that file in it.
    std::fs::create_dir_all(aside).doing(doing())?;
    mount("kiln", aside, "9p", flags, Some(options.as_c_str())).doing(doing())?;
    let entry = std::fs::read_dir(aside).doing(doing())?.flatten().next();
    let entry = entry.ok_or_else(|| crate::failure::failed(doing(), "the share is empty"))?;
    let (parent, _) = target.rsplit_once('/').unwrap_or(("", target));
    drop(place(root, if parent.is_empty() { "/" } else { parent }, true)?);
    let place = place(root, target, false).or_else(|_| {
        create_below(
            place(root, if parent.is_empty() { "/" } else { parent }, false)?.as_fd(),
            target.rsplit('/').next().unwrap_or_default(),
        )?;
        place(root, target, false)
    })?;
    // Where it may not be written to, neither may its filesystem.
    mount_bind(entry.path(), descriptor(&place).as_str()).doing(doing())
}

/// Takes away where a share of a single file was mounted first. What is mounted of it elsewhere stays; and in a fork, where all
/// that lies here leads to nobody, the next share may get the same name.
fn clear(aside: &str) {
    // It may not have come so far.
    let _ = rustix::mount::unmount(aside, UnmountFlags::DETACH);
    let _ = std::fs::remove_dir(aside);
}
