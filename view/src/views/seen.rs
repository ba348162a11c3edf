//! Whether a process sees what the router mounts.
//!
//! The service mounts where it runs. A process in another mount namespace sees that mount only if the kernel passes it on, and
//! nothing is mounted over it there; otherwise it would read and change what is below, and take it for its view.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use kiln_contract::{BackendError, ErrorKind};

use super::{Result, Views, namespace_now, namespace_of};
use crate::router::stale::{self, unescaped};

impl Views {
    /// Shows a recorded view of the router, at a path, to a process, and to all that descend from it.
    ///
    /// # Errors
    /// As [`Client::mount`](crate::router::Client::mount); or the process is in a mount namespace in which the service's mount is not seen.
    pub(super) fn show(&self, name: &str, at: &Path, pid: u32) -> Result<()> {
        if let Some(above) = stale::router_above(at) {
            let (at, above) = (at.display(), above.display());
            let what =
                format!("{at} lies in what the router shows at {above}, and its service sees nothing there");
            return Err(BackendError::new(ErrorKind::Unsupported, what).hint(format!(
                "use --backend fuse or overlay in it, {above} itself, or a directory outside"
            )));
        }
        let mut client = self.router()?;
        let service = client.status()?.pid;
        match client.mount(name, pid) {
            Ok(()) if is_seen(service, pid, at) => return Ok(()),
            Ok(()) => drop(client.unmount_process(pid)?),
            // The directory may be there for this process only.
            Err(_) if root_mount(service).zip(root_mount(pid)).is_some_and(|(its, own)| its != own) => {}
            Err(error) => return Err(error),
        }
        let what = format!(
            "process {pid} would not see the router's view at {}: it is in another mount namespace than the router's service ({service}), such as that of a view",
            at.display()
        );
        Err(BackendError::new(ErrorKind::Unsupported, what)
            .hint("use --backend fuse or overlay there; `kiln fs service stop` ends a service that runs where it should not"))
    }

    /// Who is in a view with a mount namespace of its own starts no service: nobody else would see what it mounts, and the
    /// view would stay as long as the service.
    ///
    /// # Errors
    /// This process is in one.
    pub(super) fn in_no_view(&self) -> Result<()> {
        let Some(own) = namespace_of(Path::new("/proc/self")) else { return Ok(()) };
        let Some(view) = self.list()?.into_iter().find(|record| namespace_now(record) == Some(own)) else {
            return Ok(());
        };
        let what = format!(
            "the router's service cannot be started in the view `{}`: what it mounts in that view's mount namespace nobody else would see",
            view.name
        );
        Err(BackendError::new(ErrorKind::Unsupported, what)
            .hint("use --backend fuse or overlay in it, or start the service outside: kiln fs service start"))
    }
}

/// Whether what a process has at a path is what the service has mounted there. What cannot be found out counts as seen.
fn is_seen(service: u32, pid: u32, at: &Path) -> bool {
    let Ok(table) = fs::read(format!("/proc/{service}/mountinfo")) else { return true };
    // This thread may be in another namespace than the process's first one.
    let mut root = OsString::new();
    if pid != std::process::id() {
        root.push(format!("/proc/{pid}/root"));
    }
    root.push(at);
    match fs::metadata(&root) {
        Ok(found) => {
            let device = (rustix::fs::major(found.dev()), rustix::fs::minor(found.dev()));
            devices_at(&table, at).any(|mounted| mounted == device)
        }
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

/// What the kernel tells of the first mount that a process sees: its number is another one in each mount namespace.
fn root_mount(pid: u32) -> Option<Vec<u8>> {
    let table = fs::read(format!("/proc/{pid}/mountinfo")).ok()?;
    table.split(|byte| *byte == b'\n').next().map(<[u8]>::to_vec)
}

/// The devices of what is mounted at a path (proc_pid_mountinfo(5)).
fn devices_at<'a>(table: &'a [u8], at: &'a Path) -> impl Iterator<Item = (u32, u32)> + 'a {
    use std::os::unix::ffi::OsStrExt as _;
    table.split(|byte| *byte == b'\n').filter_map(move |line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let (device, target) = (fields.next()?, fields.nth(1)?);
        let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
        let device = (major.parse().ok()?, minor.parse().ok()?);
        (unescaped(target) == at.as_os_str().as_bytes()).then_some(device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_at_a_path_is_told_by_its_devices() {
        let table = b"36 35 0:50 / /kiln rw,nosuid shared:2 - fuse.kiln kiln-router rw,user_id=1000
37 36 259:3 /sub /kiln rw - ext4 /dev/x rw
38 35 0:52 / /a\\040b rw - tmpfs t rw
39 35 0:5";
        let devices = |at: &str| devices_at(table, Path::new(at)).collect::<Vec<_>>();
        assert_eq!(devices("/kiln"), [(0, 50), (259, 3)]);
        assert_eq!(devices("/a b"), [(0, 52)]);
        assert_eq!(devices("/a"), []);
    }
}
