//! Chooses the back end, by trying what works, and says why.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use kiln_contract::{DiskBackend, Home};

use crate::copy::{Copying, probe_reflink};
use crate::error::Context as _;
use crate::files::FileDisks;
use crate::{Choice, Result, room};

/// A back end, and why it was taken.
pub struct Opened {
    /// The back end.
    pub backend: Box<dyn DiskBackend>,
    /// Why: one sentence without a full stop, as `kiln system doctor` shows it.
    pub reason: String,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("backend", &self.backend.name()).field("reason", &self.reason).finish()
    }
}

/// Opens what keeps the disks of this home; a pool is mounted if it was not. What killed processes left is taken away.
///
/// [`Choice::Auto`] takes what was chosen for this home, else its pool, else files that share blocks if the file system of
/// the home can do that (it is tried), else files that are copied.
///
/// # Errors
/// What was chosen does not work here.
pub fn open(home: &Home, choice: &Choice) -> Result<Opened> {
    match choice {
        Choice::Auto => match Choice::load(home)? {
            Choice::Auto => best(home),
            chosen => {
                let opened = explicit(home, &chosen)?;
                Ok(Opened { reason: format!("{}, as `kiln init` chose", opened.reason), ..opened })
            }
        },
        chosen => explicit(home, chosen),
    }
}

/// Makes what `choice` needs and this home lacks: a btrfs pool that may grow to `size` bytes.
///
/// # Errors
/// The pool cannot be made.
pub fn prepare(home: &Home, choice: &Choice, size: u64) -> Result<()> {
    #[cfg(target_os = "linux")]
    if *choice == Choice::Btrfs && crate::BtrfsPool::of(home).is_none() {
        crate::BtrfsPool::make(home, size)?;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (home, choice, size);
    Ok(())
}

fn best(home: &Home) -> Result<Opened> {
    #[cfg(target_os = "linux")]
    if crate::BtrfsPool::of(home).is_some() {
        return explicit(home, &Choice::Btrfs);
    }
    let why_not = match reflink(home) {
        Err(error @ crate::DiskError::NoReflinks { .. }) => error,
        opened => return opened,
    };
    let opened = sparse(home)?;
    let reason = format!("{}, because {why_not}", opened.reason);
    Ok(Opened { reason, ..opened })
}

fn explicit(home: &Home, choice: &Choice) -> Result<Opened> {
    match choice {
        Choice::Auto => best(home),
        Choice::Reflink => reflink(home),
        Choice::Sparse => sparse(home),
        #[cfg(target_os = "linux")]
        Choice::Btrfs => {
            let Some(pool) = crate::BtrfsPool::of(home) else {
                let what = format!("there is no pool `{}`", home.disk_pool().display());
                let hint = "`kiln init` makes one";
                return Err(crate::DiskError::place(kiln_contract::ErrorKind::NotFound, what, hint));
            };
            let backend = Box::new(pool.disks()?);
            let reason = format!("copies share blocks in the pool `{}`", home.disk_pool().display());
            Ok(Opened { backend, reason })
        }
        #[cfg(target_os = "linux")]
        Choice::Zfs { dataset } => {
            let backend = Box::new(crate::zfs::ZfsDisks::open(home, dataset)?);
            Ok(Opened { backend, reason: format!("copies share blocks in the ZFS dataset `{dataset}`") })
        }
        #[cfg(not(target_os = "linux"))]
        Choice::Btrfs | Choice::Zfs { .. } => {
            let what = format!("disks cannot be kept by {choice} on this system");
            let hint = "choose `auto`";
            Err(crate::DiskError::place(kiln_contract::ErrorKind::Unsupported, what, hint))
        }
    }
}

fn reflink(home: &Home) -> Result<Opened> {
    let backend = FileDisks::open(home.disks(), "reflink", Copying::Reflink)?;
    probe_reflink(&home.disks())?;
    let path = home.disks();
    let reason = format!("copies share blocks on {} at `{}`", room::file_system(&path), path.display());
    Ok(Opened { backend: Box::new(backend), reason })
}

fn sparse(home: &Home) -> Result<Opened> {
    let backend = FileDisks::open(home.disks(), "sparse", Copying::Sparse)?;
    Ok(Opened {
        backend: Box::new(backend),
        reason: "every copy takes the time and the room of what it holds".into(),
    })
}

/// What was looked at, whether it is as it should be, and what that means for the user. Mounts nothing, and leaves nothing
/// in the home.
pub fn doctor(home: &Home) -> Vec<(String, bool, String)> {
    let line = |ok: bool, text: String| ("disks".to_owned(), ok, text);
    let choice = match Choice::load(home) {
        Ok(choice) => choice,
        Err(error) => return vec![line(false, error.to_string())],
    };
    match choice {
        #[cfg(target_os = "linux")]
        Choice::Auto | Choice::Btrfs if crate::BtrfsPool::of(home).is_some() => {
            let (ok, text) = pool_state(home);
            vec![line(ok, text)]
        }
        Choice::Btrfs => {
            let path = home.disk_pool();
            vec![line(false, format!("btrfs was chosen, and there is no pool `{}`", path.display()))]
        }
        #[cfg(target_os = "linux")]
        Choice::Zfs { dataset } => match crate::zfs::ZfsDisks::examine(home, &dataset) {
            Ok(()) => vec![line(true, format!("zfs: copies share blocks in the dataset `{dataset}`"))],
            Err(error) => vec![line(false, format!("zfs: {error}"))],
        },
        #[cfg(not(target_os = "linux"))]
        Choice::Zfs { .. } => {
            vec![line(false, "zfs was chosen, and disks cannot be kept there on this system".into())]
        }
        Choice::Sparse => {
            vec![line(true, "sparse: copies take the room of what they hold, as `kiln init` chose".into())]
        }
        Choice::Auto | Choice::Reflink => {
            let place = existing(home.disks());
            let found = place.as_ref().map_err(ToString::to_string).and_then(|place| {
                probe_reflink(place).map(|()| room::file_system(place)).map_err(|error| error.to_string())
            });
            let (ok, text) = match found {
                Ok(file_system) => (true, format!("reflink: copies share blocks on {file_system}")),
                Err(why) if choice == Choice::Reflink => {
                    (false, format!("reflink was chosen, and does not work: {why}"))
                }
                Err(why) => {
                    let advice = "`kiln init` can make a pool";
                    (
                        false,
                        format!(
                            "sparse: every copy takes the room of what it holds, because {why}; {advice}"
                        ),
                    )
                }
            };
            vec![line(ok, text)]
        }
    }
}

#[cfg(target_os = "linux")]
fn pool_state(home: &Home) -> (bool, String) {
    let path = home.disk_pool();
    let path = path.display();
    match crate::BtrfsPool::of(home).map(|pool| pool.is_mounted()) {
        Some(Ok(false)) if !rustix::process::geteuid().is_root() => (
            false,
            format!("btrfs: the pool `{path}` is not mounted; any command of root's that uses it mounts it"),
        ),
        Some(Err(error)) => (false, format!("btrfs: {error}")),
        _ => (true, format!("btrfs: copies share blocks in the pool `{path}`")),
    }
}

/// The directory itself, or the nearest above it that is there.
fn existing(path: PathBuf) -> Result<PathBuf> {
    let found = path.ancestors().find(|candidate| candidate.is_dir()).map(PathBuf::from);
    let found = found.unwrap_or(path);
    fs::canonicalize(&found).doing("find", &found)
}
