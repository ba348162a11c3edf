//! What is mounted where, as `/proc/thread-self/mountinfo` tells it (proc_pid_mountinfo(5)): of the calling thread, which may
//! have a mount namespace of its own.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::Context as _;

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The type of its file system.
    pub(crate) kind: String,
    /// What was mounted: a device, where the type has one.
    pub(crate) source: PathBuf,
}

/// What is mounted at `path`, which has no symlinks in it; the last one, if there are several on top of each other.
pub(crate) fn at(path: &Path) -> Result<Option<Mount>> {
    let table = "/proc/thread-self/mountinfo";
    let text = std::fs::read(table).doing("read", table)?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(|line| parse(line, path)).next_back())
}

/// `36 35 98:0 /root /mount/point options [optional fields …] - type source options`
fn parse(line: &[u8], path: &Path) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    if unescape(fields.nth(4)?) != path {
        return None;
    }
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    Some(Mount { kind, source: unescape(fields.next()?) })
}

/// Blanks, newlines and backslashes are written in octal.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let escaped = after.get(..3).filter(|_| *first == b'\\');
        let escaped = escaped.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_their_place() {
        let pool = b"41 29 0:45 / /var/lib/my\\040kiln/disks rw,noatime shared:12 master:3 - btrfs /dev/loop3 rw,ssd";
        let path = Path::new("/var/lib/my kiln/disks");
        let mount = Mount { kind: "btrfs".into(), source: "/dev/loop3".into() };
        assert_eq!(parse(pool, path), Some(mount));
        assert_eq!(parse(pool, Path::new("/var/lib")), None);
        let bare = b"24 1 0:22 / /proc rw - proc proc rw";
        assert_eq!(parse(bare, Path::new("/proc")).unwrap().kind, "proc");
        for cut in
            [&b""[..], b"41 29 0:45 / /proc", b"41 29 0:45 / /proc rw -", b"41 29 0:45 / /proc rw - proc"]
        {
            assert_eq!(parse(cut, Path::new("/proc")), None);
        }
        for (escaped, plain) in
            [(r"a\134b\012", "a\\b\n"), (r"a\", r"a\"), (r"\04", r"\04"), (r"\999", r"\999")]
        {
            assert_eq!(unescape(escaped.as_bytes()), Path::new(plain));
        }
    }

    #[test]
    fn this_host_has_proc_and_no_mount_at_a_file() {
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().kind, "proc");
        assert_eq!(at(Path::new("/proc/cpuinfo")).unwrap(), None);
    }
}
