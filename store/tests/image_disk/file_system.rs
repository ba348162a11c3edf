//! File systems of the tests' own.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_fixtures::{require, require_root};

pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Something mounted, until it is dropped.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Mounted {
    pub(crate) fn new(kind: &str, options: &str, source: &Path, at: PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        run(Command::new("mount").args(["-t", kind, "-o", options]).arg(source).arg(&at));
        Self(at)
    }

    /// Bytes in use, once everything is on the disk.
    pub(crate) fn used(&self) -> u64 {
        run(Command::new("sync").arg("-f").arg(&self.0));
        let free = rustix::fs::statvfs(&self.0).unwrap();
        (free.f_blocks - free.f_bfree) * free.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A file system of this kind in a file below `directory`. `None` after a skip.
pub(crate) fn fresh(kind: &str, megabytes: u64, directory: &Path) -> Option<Mounted> {
    if !require_root() {
        return None;
    }
    let (file, at) = (directory.join(format!("{kind}.img")), directory.join(kind));
    if kind == "tmpfs" {
        return Some(Mounted::new(kind, &format!("size={megabytes}m"), Path::new("kiln-test"), at));
    }
    let make = require(&format!("mkfs.{kind}"))?;
    std::fs::File::create(&file).unwrap().set_len(megabytes << 20).unwrap();
    let force = if kind == "ext4" { "-F" } else { "-f" };
    run(Command::new(make).args(["-q", force]).arg(&file));
    Some(Mounted::new(kind, "loop", &file, at))
}
