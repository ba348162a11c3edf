//! Kernel modules: those that the host put into the initramfs, in the order that it found.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use crate::failure::{Doing as _, Failure};

/// The list: a path a line, parameters after a space.
const LIST: &str = "/modules/load";

/// Loads them. A kernel that has everything built in comes without a list.
pub(crate) fn load() -> Result<(), Failure> {
    let list = match std::fs::read_to_string(LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(crate::failure::failed("read the list of modules", error)),
    };
    for line in list.lines().filter(|line| !line.is_empty()) {
        let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
        insert(path, parameters).doing(format_args!("load the module {path}"))?;
        // Nobody reads it again, and it is in the machine's memory.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

fn insert(path: &str, parameters: &str) -> io::Result<()> {
    let file = File::open(path)?;
    let parameters = CString::new(parameters)?;
    // SAFETY: the descriptor is open and the string ends with a zero; finit_module(2) takes both by value.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).or_else(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => Ok(()),
            _ => Err(error),
        }),
    }
}
