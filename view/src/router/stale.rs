//! Mounts whose service has ended without taking them away.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::mounting::{Host, Mounting as _, SHARED_SOURCE};

/// Takes away the mounts of this user's routers that nobody serves any more; with `at`, only what is mounted there.
pub(super) fn clean(at: Option<&Path>) {
    let table = match fs::read("/proc/self/mountinfo") {
        Ok(table) => table,
        Err(error) => return tracing::warn!(%error, "stale mounts cannot be looked for"),
    };
    let own = rustix::process::getuid().as_raw();
    // Later ones lie over earlier ones.
    for target in routers(&table, own).into_iter().rev() {
        if at.is_none_or(|at| at == target) && is_dead(&target) {
            match Host.detach(&target) {
                Ok(()) => tracing::info!(target = %target.display(), "a stale mount was taken away"),
                Err(error) => tracing::warn!(%error, "a stale mount stays"),
            }
        }
    }
}

/// Where a router of this user is mounted above a path.
pub(crate) fn router_above(path: &Path) -> Option<PathBuf> {
    let table = fs::read("/proc/thread-self/mountinfo").ok()?;
    let targets = routers(&table, rustix::process::getuid().as_raw());
    targets.into_iter().find(|target| path != target && path.starts_with(target))
}

/// Its connection was ended with its server.
fn is_dead(target: &Path) -> bool {
    matches!(fs::metadata(target), Err(error) if error.raw_os_error() == Some(libc::ENOTCONN))
}

/// Where routers of a user are mounted (proc_pid_mountinfo(5)).
fn routers(table: &[u8], user: u32) -> Vec<PathBuf> {
    let user = format!("user_id={user}");
    let lines = table.split(|byte| *byte == b'\n');
    let found = lines.filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let target = fields.nth(4)?;
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, source, options) = (rest.next()?, rest.next()?, rest.next()?);
        let ours = kind == b"fuse.kiln"
            && source == SHARED_SOURCE.as_bytes()
            && options.split(|byte| *byte == b',').any(|option| option == user.as_bytes());
        ours.then(|| PathBuf::from(std::ffi::OsString::from_vec(unescaped(target))))
    });
    found.collect()
}

/// Spaces and the like stand there as three octal digits.
pub(crate) fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match digits {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

/// What a path is, when a mount at it may be stale.
pub(crate) fn metadata(path: &Path) -> io::Result<fs::Metadata> {
    match fs::metadata(path) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            clean(Some(path));
            fs::metadata(path)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_users_routers_are_found_whatever_their_paths_are() {
        let table = b"36 35 98:0 / /mnt1 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
36 35 0:50 / /kiln rw,nosuid,nodev shared:2 - fuse.kiln kiln-router rw,user_id=1000,group_id=1000,default_permissions
37 35 0:51 / /a\\040b\\134 rw - fuse.kiln kiln-router rw,user_id=1000,group_id=1000
38 35 0:52 / /other rw - fuse.kiln kiln-router rw,user_id=10001,group_id=1000
39 35 0:53 / /alone rw - fuse.kiln kiln rw,user_id=1000
40 35 0:54 / /short -";
        assert_eq!(routers(table, 1000), [PathBuf::from("/kiln"), PathBuf::from("/a b\\")]);
        assert_eq!(routers(b"", 0), Vec::<PathBuf>::new());
    }
}
