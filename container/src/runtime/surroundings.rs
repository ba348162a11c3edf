//! What a process of a container stands in: its streams and its working directory.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

/// Makes these the standard streams of this process.
pub(super) fn set_streams(streams: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    // First out of the way: one of them may be 0, 1 or 2 and be overwritten before it is copied.
    let copies = streams.map(|stream| rustix::io::fcntl_dupfd_cloexec(stream, 3));
    for (number, copy) in (0..).zip(copies) {
        let copy = copy?;
        // SAFETY: takes descriptors that are open; the result is one of the three standard ones.
        if unsafe { libc::dup2(copy.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A pipe or terminal of the container belongs to its user, so that `/dev/stdout` can be opened. What else the caller
/// gave (its own files) is left alone. Failure costs only that.
pub(super) fn own_streams(uid: u32, terminal: bool) {
    if uid == 0 {
        return;
    }
    for number in 0..3 {
        // SAFETY: 0, 1 and 2 are open for as long as this process lives.
        let stream = unsafe { BorrowedFd::borrow_raw(number) };
        let Ok(stat) = rustix::fs::fstat(stream) else { continue };
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        if kind == rustix::fs::FileType::Fifo || terminal && kind == rustix::fs::FileType::CharacterDevice {
            let _ = rustix::fs::fchown(stream, rustix::process::Uid::from_raw(uid).into(), None);
        }
    }
}

/// Goes to the working directory; with `make`, makes it first if it is missing, as Docker does for first processes. To
/// be called in the container, as its user.
pub(super) fn enter_directory(directory: &Path, make: bool) -> Result<(), String> {
    let failed = |doing: &str, error: &dyn std::fmt::Display| {
        format!("cannot {doing} the working directory {}: {error}", directory.display())
    };
    match std::env::set_current_dir(directory) {
        Err(error) if make && error.kind() == io::ErrorKind::NotFound => {
            make_directory(directory).map_err(|error| failed("make", &error))?;
            std::env::set_current_dir(directory)
        }
        other => other,
    }
    .map_err(|error| failed("enter", &error))?;
    // An image may name /proc/self/fd/<n> for it and so hope to come upon a directory of the host that is still open;
    // the kernel tells such a place by a name that is not absolute.
    match std::env::current_dir() {
        Ok(directory) if directory.is_absolute() => Ok(()),
        Ok(_) => Err(failed("enter", &"it is not in the container")),
        Err(error) => Err(failed("enter", &error)),
    }
}

fn make_directory(directory: &Path) -> io::Result<()> {
    let mut path = PathBuf::from("/");
    for part in directory.components() {
        let Component::Normal(part) = part else { continue };
        path.push(part);
        match DirBuilder::new().mode(0o755).create(&path) {
            // This process is already the workload's user, but the directory is root's, as Docker has it.
            Ok(()) => std::os::unix::fs::lchown(&path, Some(0), Some(0))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
