//! Where a disk is put together before it is seen, and where it goes when it is removed.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::Result;
use crate::error::Context as _;

/// A directory among those of a back end, removed with all that is in it when dropped.
///
/// The flock on it tells a living process from one that was killed.
#[derive(Debug)]
pub(crate) struct Staging {
    directory: TempDir,
    _lock: File,
}

impl Staging {
    /// Makes one below `parent`, which must be on the file system where the result is to be.
    pub(crate) fn new(parent: &Path) -> Result<Self> {
        loop {
            let directory = tempfile::Builder::new().prefix("").tempdir_in(parent).doing("create", parent)?;
            // Until the lock is taken, a sweep may take the new directory for an old one: then another is made.
            let lock = match File::open(directory.path()) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                opened => opened.doing("open", directory.path())?,
            };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && directory.path().exists() {
                return Ok(Self { directory, _lock: lock });
            }
        }
    }

    /// Its own name, which no other has at the same time.
    #[cfg(target_os = "linux")]
    pub(crate) fn name(&self) -> String {
        self.directory.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Removes a directory with all that is in it: at once as far as anybody sees, by a rename into `tmp`. Makes nothing new, so
/// that it works where there is no room at all. Says whether it was there.
pub(crate) fn remove_at_once(path: &Path, tmp: &Path) -> Result<bool> {
    let Some(aside) = set_aside(path, tmp)? else { return Ok(false) };
    remove_aside(&aside);
    Ok(true)
}

/// Renames a directory into `tmp`, if it is there: nobody finds it any more.
pub(crate) fn set_aside(path: &Path, tmp: &Path) -> Result<Option<PathBuf>> {
    loop {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(std::io::Error::other).doing("choose a name in", tmp)?;
        let aside = tmp.join(format!("removed-{:016x}", u64::from_ne_bytes(random)));
        match fs::rename(path, &aside) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error)
                if [ErrorKind::DirectoryNotEmpty, ErrorKind::AlreadyExists].contains(&error.kind()) => {}
            renamed => return renamed.doing("remove", path).map(|()| Some(aside)),
        }
    }
}

fn remove_aside(aside: &Path) {
    // What stays is swept by whoever opens the disks next.
    if let Err(error) = fs::remove_dir_all(aside)
        && error.kind() != ErrorKind::NotFound
    {
        tracing::debug!(path = %aside.display(), %error, "left for another time");
    }
}

/// Removes what was set aside in a process of its own, which nobody waits for and which may outlive this one.
pub(crate) fn remove_behind(aside: &Path) {
    let mut command = Command::new("rm");
    command.arg("-rf").arg("--").arg(aside).current_dir("/");
    // Whoever ends this process with a key does not mean that one.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    match command.spawn() {
        Ok(mut child) => drop(std::thread::spawn(move || child.wait())),
        Err(_) => remove_aside(aside),
    }
}

/// Removes what killed processes left below `parent`.
pub(crate) fn sweep(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).doing("read", parent)? {
        let path = entry.doing("read", parent)?.path();
        let Ok(directory) = File::open(&path) else { continue };
        if flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).doing("remove", &path),
            _ => {}
        }
    }
    Ok(())
}

/// Puts on the storage which names a directory holds.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).doing("write to disk", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_behind_is_out_of_sight_at_once_and_gone_soon() {
        let parent = tempfile::tempdir().unwrap();
        let (disk, tmp) = (parent.path().join("disk"), parent.path().join("tmp"));
        fs::create_dir_all(disk.join("files")).unwrap();
        fs::create_dir(&tmp).unwrap();
        let aside = set_aside(&disk, &tmp).unwrap().unwrap();
        assert!(!disk.exists() && aside.join("files").exists());
        remove_behind(&aside);
        let begun = std::time::Instant::now();
        while aside.exists() {
            assert!(begun.elapsed().as_secs() < 60, "{} stays", aside.display());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(set_aside(&disk, &tmp).unwrap(), None);
    }

    #[test]
    fn a_sweep_takes_what_nobody_holds_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let held = Staging::new(parent.path()).unwrap();
        fs::write(held.path("part"), "half").unwrap();
        let left = parent.path().join("left");
        fs::create_dir_all(left.join("new")).unwrap();
        fs::write(left.join("new/disk.img"), "half").unwrap();
        sweep(parent.path()).unwrap();
        assert!(!left.exists());
        assert!(held.path("part").exists());
        drop(held);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
