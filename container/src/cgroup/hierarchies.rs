//! Where this host has its control groups, and where containers' groups go in them.
//!
//! - **v2**: one hierarchy at `/sys/fs/cgroup`. Root's groups are `/kiln/<id>`. Others use what was delegated to them
//!   (`systemd` gives a user's manager a subtree): a sibling of the group in which this process is.
//! - **v1 and hybrid**: a hierarchy a controller at `/sys/fs/cgroup/<controller>`; groups are `/kiln/<id>` in each.
//!   Only root can have them: v1 cannot be delegated safely. The controllerless v2 hierarchy of a hybrid host is not
//!   used.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, CWD};

/// Where all of them are mounted, by a convention that every distribution keeps.
pub(crate) const MOUNT: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC` (linux/magic.h).
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// What of a container a v1 hierarchy is needed for even if nothing is limited: its groups are cheap to join
/// (0.05 ms each), and none can be joined later without a race.
pub(crate) const ALWAYS: [&str; 6] = ["freezer", "pids", "memory", "cpuacct", "devices", "blkio"];
/// Joined only for a limit.
pub(crate) const FOR_LIMITS: [&str; 2] = ["cpu", "cpuset"];

/// The kind of control groups that a host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hierarchies {
    /// A hierarchy a controller.
    V1,
    /// One hierarchy.
    V2,
    /// None that this program knows.
    None,
}

impl Hierarchies {
    /// Looks at what is mounted.
    pub(crate) fn detect() -> Self {
        match rustix::fs::statfs(MOUNT) {
            #[allow(clippy::unnecessary_cast, reason = "the field's type is another on other processors")]
            Ok(stat) if stat.f_type as u64 == CGROUP2_MAGIC => Self::V2,
            Ok(_) if Path::new(MOUNT).join("freezer").exists() => Self::V1,
            _ => Self::None,
        }
    }
}

/// The directory of `group` in the v1 hierarchy of `controller`.
pub(crate) fn v1_directory(controller: &str, group: &str) -> PathBuf {
    Path::new(MOUNT).join(controller).join(group.trim_start_matches('/'))
}

/// The directory of `group` in the v2 hierarchy.
pub(crate) fn v2_directory(group: &str) -> PathBuf {
    Path::new(MOUNT).join(group.trim_start_matches('/'))
}

/// The group of this process in the v2 hierarchy.
fn own_v2_group() -> Option<String> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    text.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
}

/// The v2 group below which this user's containers go, if there is one that may be written to: `/kiln` for the
/// host's root, else the highest group above this process that was delegated to the user.
pub(crate) fn v2_parent(host_root: bool) -> Option<String> {
    if host_root {
        return Some("/kiln".into());
    }
    // Processes may only be moved within the subtree that was delegated, whose top is the highest writable group.
    let own = own_v2_group()?;
    let mut parent = None;
    for group in Path::new(&own).ancestors() {
        let group = group.to_str()?;
        let writable = |file: &str| {
            rustix::fs::accessat(
                CWD,
                v2_directory(group).join(file),
                Access::WRITE_OK,
                rustix::fs::AtFlags::EACCESS,
            )
            .is_ok()
        };
        if !(writable("cgroup.procs") && writable("cgroup.subtree_control")) {
            break;
        }
        parent = Some(group.to_owned());
    }
    parent
}
