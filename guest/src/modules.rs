//! Kernel modules: those that the host put into the initramfs, in the order that it found.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use crate::failure::{Doing as _, Failure};
use crate::told::told;

/// The list: a path a line, parameters after a space.
const LIST: &str = "/modules/load";
/// The others, with the names of those that each needs, in their order.
const LATER: &str = "/modules/later";

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
    if told("network").is_some() {
        load_later("virtio_net")?;
    }
    Ok(())
}

/// Loads one that not every machine needs, with what it needs itself. A kernel that has it built in has no such module.
fn load_later(name: &str) -> Result<(), Failure> {
    let list = match std::fs::read_to_string(LATER) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(crate::failure::failed("read the list of modules", error)),
    };
    for path in with_needs(&list, name) {
        // Those that are loaded are not there any more.
        if Path::new(&path).exists() {
            insert(&path, "").doing(format_args!("load the module {path}"))?;
        }
    }
    Ok(())
}

/// The paths of a module and of what it needs, which comes first. One that is not in the list needs nothing.
fn with_needs(list: &str, name: &str) -> Vec<String> {
    fn visit(list: &str, name: &str, seen: &mut Vec<String>, order: &mut Vec<String>) {
        if seen.iter().any(|known| known == name) {
            return;
        }
        seen.push(name.to_owned());
        let path = format!("/modules/{name}.ko");
        let needs = list.lines().find_map(|line| line.strip_prefix(path.as_str())?.strip_prefix(' '));
        for need in needs.unwrap_or_default().split_whitespace() {
            visit(list, need, seen, order);
        }
        order.push(path);
    }
    let mut order = Vec::new();
    visit(list, name, &mut Vec::new(), &mut order);
    order
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_before_it() {
        let list = "/modules/a.ko b c\n/modules/b.ko d\n/modules/c.ko b d\n/modules/d.ko\n/modules/ab.ko z\n/modules/x.ko y\n/modules/y.ko x\n";
        let names = |name: &str| {
            let names = with_needs(list, name);
            names.iter().map(|path| path[9..path.len() - 3].to_owned()).collect::<String>()
        };
        for (name, order) in [("a", "dbca"), ("d", "d"), ("missing", "missing")] {
            assert_eq!(names(name), order, "{name}");
        }
        // No list of Linux's has a circle; one that has ends all the same.
        assert_eq!(names("x"), "yx");
    }
}
