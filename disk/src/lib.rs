//! Writable disks of machines, copied without copying.
//!
//! A disk is a raw image (a file, or a ZFS volume) that begins as an empty ext4 out of this program itself
//! ([`template`]) and that its machine grows to the size it has. Four back ends keep disks, all behind
//! [`DiskBackend`](kiln_contract::DiskBackend):
//!
//! | back end | disks are | a copy |
//! |---|---|---|
//! | `reflink` | files on btrfs, XFS, bcachefs, APFS | shares all blocks |
//! | `btrfs` | files in a pool: a btrfs in a file of the home (`BtrfsPool`) | shares all blocks |
//! | `zfs` | volumes of a ZFS dataset | shares all blocks |
//! | `sparse` | files on any file system | takes the room and time of what the disk holds |
//!
//! [`open`] chooses one, by trying what works, and says why. [`usage_of`] counts what files take from their extents, so
//! that what is shared is counted once.
//!
//! ```
//! use kiln_contract::{DiskId, Home, SnapshotName};
//! use kiln_disk::{Choice, open};
//!
//! # let directory = tempfile::tempdir()?;
//! let home = Home::at(directory.path());
//! let disks = open(&home, &Choice::Auto)?.backend;
//! let (web, fork): (DiskId, DiskId) = ("web".parse()?, "fork".parse()?);
//! let before: SnapshotName = "before".parse()?;
//!
//! let image = disks.create(&web, 10 << 30)?;
//! assert_eq!(std::fs::metadata(&image)?.len(), 10 << 30);
//! disks.snapshot(&web, &before)?;
//! disks.clone_disk(&web, Some(&before), &fork)?;
//! disks.resize(&fork, 20 << 30)?;
//! assert_eq!((disks.size(&web)?, disks.size(&fork)?), (10 << 30, 20 << 30));
//! disks.remove(&web)?;
//! assert_eq!(disks.list()?, [fork]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(target_os = "macos")]
mod apfs;
#[cfg(target_os = "linux")]
mod btrfs;
mod choice;
mod copy;
mod error;
#[cfg(target_os = "linux")]
mod fiemap;
mod files;
#[cfg(target_os = "linux")]
mod lock;
#[cfg(target_os = "linux")]
mod mounts;
mod open;
#[cfg(target_os = "linux")]
mod programs;
#[cfg(not(target_os = "macos"))]
mod reflink;
mod room;
mod size;
mod sparse;
mod staging;
pub mod template;
mod usage;
#[cfg(target_os = "linux")]
mod zfs;

#[cfg(target_os = "linux")]
pub use btrfs::{BtrfsPool, PoolStatus, SMALLEST_POOL};
pub use choice::{Choice, ChoiceError};
pub use copy::{Copying, copy_file};
pub use error::{DiskError, Result};
pub use open::{Opened, doctor, open, prepare};
pub use usage::{SetUsage, usage_of};
