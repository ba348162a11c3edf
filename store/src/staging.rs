//! Where a writer puts things before they are seen.

use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::Result;
use crate::error::Context as _;
use crate::format::Layout;

/// A directory below `tmp/`, removed with all that is in it when dropped.
///
/// The flock on it tells a living writer from one that was killed.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    directory: File,
}

impl Staging {
    pub(crate) fn new(layout: &Layout) -> Result<Self> {
        loop {
            let path = fresh_path(layout);
            match std::fs::create_dir(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error).doing("create", &path),
            }
            // Until the lock is taken, a sweep may take the new directory for an old one: then another is made.
            let directory = match File::open(&path) {
                Ok(directory) => directory,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).doing("open", &path),
            };
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if path.exists() => return Ok(Self { path, directory }),
                Ok(()) | Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error).doing("lock", &path),
            }
        }
    }

    /// The directory `name`, which all use who make the same thing: one at a time, so that it is made once. Calls
    /// `waiting` once if somebody else has it. Whoever gets it has to see whether there is still something to be made.
    pub(crate) fn in_turn(layout: &Layout, name: &str, waiting: &dyn Fn()) -> Result<Self> {
        let path = layout.tmp().join(name);
        let mut waited = false;
        loop {
            match std::fs::create_dir(&path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(error).doing("create", &path);
                }
                _ => {}
            }
            let directory = match File::open(&path) {
                Ok(directory) => directory,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).doing("open", &path),
            };
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    if !std::mem::replace(&mut waited, true) {
                        waiting();
                    }
                    rustix::fs::flock(&directory, FlockOperation::LockExclusive).doing("lock", &path)?;
                }
                locked => locked.doing("lock", &path)?,
            }
            // Whoever had it, or a sweep, may have removed it meanwhile, and somebody may have made a new one.
            let id = |metadata: &std::fs::Metadata| (metadata.dev(), metadata.ino());
            let mine = directory.metadata().doing("read", &path)?;
            if !std::fs::metadata(&path).is_ok_and(|there| id(&there) == id(&mine)) {
                continue;
            }
            let staging = Self { path, directory };
            staging.remove_leavings()?;
            return Ok(staging);
        }
    }

    /// Removes what whoever had it before left when it was killed.
    fn remove_leavings(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.path).doing("read", &self.path)? {
            let path = entry.doing("read", &self.path)?.path();
            std::fs::remove_file(&path).doing("remove", &path)?;
        }
        Ok(())
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Puts all that was written to the store's file system on the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        #[cfg(target_os = "linux")]
        rustix::fs::syncfs(&self.directory).doing("write to disk", &self.path)?;
        #[cfg(not(target_os = "linux"))]
        {
            let _ = &self.directory;
            rustix::fs::sync();
        }
        Ok(())
    }
}

impl Staging {
    /// Removes all that is in it.
    pub(crate) fn clear(&self) {
        // What cannot be removed now is swept by whoever opens the store next.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Writes a small file, puts it on the disk and makes it visible as `to`.
///
/// It needs no directory of its own: the flock is on the file.
pub(crate) fn publish_file(layout: &Layout, bytes: &[u8], to: &Path) -> Result<()> {
    loop {
        let from = fresh_path(layout);
        let mut file = match File::create_new(&from) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            created => created.doing("create", &from)?,
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let written = file.write_all(bytes).and_then(|()| file.sync_data());
        let renamed = written.and_then(|()| std::fs::rename(&from, to));
        match renamed {
            // A sweep took it for an old one before it was locked.
            Err(error)
                if error.kind() == ErrorKind::NotFound
                    && !from.exists()
                    && to.parent().is_some_and(Path::exists) => {}
            Err(error) => {
                let _ = std::fs::remove_file(&from);
                return Err(error).doing("write", to);
            }
            Ok(()) => return Ok(()),
        }
    }
}

/// A path in `tmp/` that this process has not used. Another one may have: of this id in another pid namespace, or
/// before a reboot.
fn fresh_path(layout: &Layout) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    layout.tmp().join(format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)))
}

/// Removes what writers left that are no more. Returns how many bytes that were.
pub(crate) fn sweep(layout: &Layout, dry_run: bool) -> Result<u64> {
    let tmp = layout.tmp();
    let mut bytes = 0;
    for entry in std::fs::read_dir(&tmp).doing("read", &tmp)? {
        let path = entry.doing("read", &tmp)?.path();
        let Ok(file) = File::open(&path) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        bytes += crate::usage::tree_bytes(&path);
        if dry_run {
            continue;
        }
        let removed =
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).doing("remove", &path);
            }
            _ => {}
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use kiln_contract::Home;

    use super::*;
    use crate::Store;

    #[test]
    fn one_at_a_time_has_a_directory_in_turn_and_what_a_killed_one_left_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path())).unwrap();
        let layout = &store.layout;
        // As somebody leaves it who was killed.
        std::fs::create_dir(layout.tmp().join("x")).unwrap();
        std::fs::write(layout.tmp().join("x/half"), "half").unwrap();
        let first = Staging::in_turn(layout, "x", &|| panic!("nobody has it")).unwrap();
        assert!(!first.path("half").exists());
        std::fs::write(first.path("mine"), "").unwrap();
        std::thread::scope(|scope| {
            let (sender, waits) = channel();
            let second = scope.spawn(move || {
                let second = Staging::in_turn(layout, "x", &|| sender.send(()).unwrap()).unwrap();
                assert!(!second.path("mine").exists());
                std::fs::write(second.path("other"), "").unwrap();
                assert_eq!(sweep(layout, false).unwrap(), 0, "it is in use");
                assert!(second.path("other").exists());
            });
            waits.recv().unwrap();
            assert!(first.path("mine").exists());
            drop(first);
            second.join().unwrap();
        });
        assert_eq!(std::fs::read_dir(layout.tmp()).unwrap().count(), 0);
    }
}
