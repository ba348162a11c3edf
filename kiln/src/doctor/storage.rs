//! Where the store is: its file system and its space.

use std::fs::File;
use std::path::{Path, PathBuf};

use kiln_contract::{ByteSize, Home};

use super::Finding;

const LITTLE: u64 = 2 << 30;

pub(super) fn examine(home: &Home) -> Vec<Finding> {
    let place = existing(home.path());
    vec![writable(home, &place), space(&place), reflink(&place)]
}

/// The nearest directory that is there: the home itself may not be made yet.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn writable(home: &Home, place: &Path) -> Finding {
    let shown = home.path().display();
    match tempfile::tempfile_in(place) {
        Ok(_) => Finding::ok("home", format!("{shown}")),
        Err(error) => Finding::fail(
            "home",
            format!("{shown} cannot be written to: {error}"),
            "set $KILN_HOME to a directory of yours",
        ),
    }
}

fn space(place: &Path) -> Finding {
    match rustix::fs::statvfs(place) {
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            let why = format!("{} free of {}", ByteSize(free), ByteSize(stat.f_blocks * stat.f_frsize));
            if free < LITTLE {
                Finding::warn("space", why, "kiln system prune, or set $KILN_HOME to a larger file system")
            } else {
                Finding::ok("space", why)
            }
        }
        Err(error) => Finding::warn(
            "space",
            format!("cannot be told: {error}"),
            "set $KILN_HOME to a local file system",
        ),
    }
}

/// Whether files can share their blocks: tried on two files without names.
fn reflink(place: &Path) -> Finding {
    let what = "reflink";
    let kind = rustix::fs::statfs(place).map_or("unknown", |stat| name_of(stat.f_type as u64));
    let try_clone = || -> std::io::Result<()> {
        let (from, to): (File, File) = (tempfile::tempfile_in(place)?, tempfile::tempfile_in(place)?);
        rustix::fs::ioctl_ficlone(&to, &from)?;
        Ok(())
    };
    match try_clone() {
        Ok(()) => Finding::ok(what, format!("{kind} shares blocks between files")),
        Err(_) => {
            Finding::ok(what, format!("{kind} shares no blocks between files; containers do not need it"))
        }
    }
}

/// Magic numbers of statfs(2).
fn name_of(magic: u64) -> &'static str {
    match magic & 0xffff_ffff {
        0xef53 => "ext4",
        0x9123_683e => "btrfs",
        0x5846_5342 => "xfs",
        0xca45_1a4e => "bcachefs",
        0x2fc1_2fc1 => "zfs",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x6969 => "nfs",
        0x6573_5546 => "fuse",
        _ => "this file system",
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_home_that_is_not_there_yet_is_judged_by_the_nearest_directory() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path().join("not/yet/there"));
        assert_eq!(existing(home.path()), directory.path());
        let findings = examine(&home);
        assert_eq!(findings[0].verdict, Verdict::Ok, "{findings:?}");
        assert!(!home.path().exists());
    }
}
