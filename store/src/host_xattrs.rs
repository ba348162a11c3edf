//! Extended attributes of the host's files.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use kiln_erofs::Xattrs;

use crate::Result;
use crate::error::Context as _;

/// The extended attributes of what a directory has under a name. `path` is its path, for messages.
pub(crate) fn xattrs_at(directory: &OwnedFd, name: &[u8], path: &Path) -> Result<Xattrs> {
    // There is no `…at` form of these calls on all kernels: a path through the open directory cannot be led astray.
    let reachable = if cfg!(target_os = "linux") {
        Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(OsStr::from_bytes(name))
    } else {
        path.to_owned()
    };
    let read = collect_xattrs(|| xattr::list(&reachable), |name| xattr::get(&reachable, name));
    read.doing("read the extended attributes of", path)
}

/// The extended attributes of an open file.
pub(crate) fn xattrs_of(file: &File) -> io::Result<Xattrs> {
    use xattr::FileExt as _;
    collect_xattrs(|| file.list_xattr(), |name| file.get_xattr(name))
}

fn collect_xattrs(
    list: impl FnOnce() -> io::Result<xattr::XAttrs>,
    get: impl Fn(&OsStr) -> io::Result<Option<Vec<u8>>>,
) -> io::Result<Xattrs> {
    let mut xattrs = Xattrs::new();
    let names = match list() {
        Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::NotFound) => {
            return Ok(xattrs);
        }
        names => names?,
    };
    for name in names {
        // The host's own label.
        if name == "security.selinux" {
            continue;
        }
        if let Some(value) = get(&name)? {
            xattrs.insert(name.into_vec(), value);
        }
    }
    Ok(xattrs)
}
