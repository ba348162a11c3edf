//! What is remembered of a view: `view.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use kiln_contract::Digest;
use serde::{Deserialize, Serialize};

use crate::Bind;
use crate::router::{Host, Process};

/// The version of the record's form that this program writes.
pub(super) const FORMAT: u32 = 1;

/// How a view is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// By the kernel's overlay.
    Overlay,
    /// By a FUSE server.
    Fuse,
    /// By the router, which shows each process another view at the same path.
    Router,
}

/// The processes to which the router shows a view. Those that descend from them see it too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownTo {
    /// The boot in which they are.
    boot: String,
    /// They.
    processes: Vec<Process>,
}

impl ShownTo {
    /// Processes of this boot.
    pub(crate) fn now(processes: Vec<Process>) -> Self {
        Self { boot: Host::boot(), processes }
    }

    /// Those that are left.
    pub fn living(&self) -> impl Iterator<Item = Process> + '_ {
        let of_this_boot = self.boot == Host::boot();
        self.processes.iter().copied().filter(move |process| of_this_boot && process.lives())
    }
}

/// A view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewRecord {
    /// Version of this form.
    pub format: u32,
    /// Its name.
    pub name: String,
    /// What it is a view of, as it was asked for.
    pub reference: String,
    /// The image whose configuration a commit goes on with.
    pub image: Digest,
    /// The stack that is seen, bottom first.
    pub layers: Vec<Digest>,
    /// The layer below the stack that has the places of `binds`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Digest>,
    /// What of the host's is shown in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub binds: Vec<Bind>,
    /// Where it is seen.
    pub at: PathBuf,
    /// How it is shown.
    pub backend: Backend,
    /// Whether it has a scratch.
    pub editable: bool,
    /// Whether its scratch takes no changes at present.
    #[serde(default, skip_serializing_if = "is_false")]
    pub frozen: bool,
    /// How often it was mounted anew; each has a work directory of its own.
    #[serde(default, skip_serializing_if = "is_first")]
    pub generation: u32,
    /// Whether it stays when its last process is gone.
    pub keep: bool,
    /// When it was made.
    pub created: Timestamp,
    /// What runs in it, or ran last.
    pub command: Vec<String>,
    /// What its maker wants to have remembered of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The inode of its mount namespace, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<u64>,
    /// The boot (`/proc/sys/kernel/random/boot_id`) in which that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// The user whose all its files are, if they are one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<(u32, u32)>,
    /// To whom the router shows it, while it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shown_to: Option<ShownTo>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_false(value: &bool) -> bool {
    !*value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_first(generation: &u32) -> bool {
    *generation == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_as_the_first_version_wrote_it() {
        let text = r#"{"format":1,"name":"tools","reference":"me/tools:1","image":"sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae","layers":["sha256:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9"],"at":"/kiln","backend":"fuse","editable":true,"keep":false,"created":"2026-01-01T12:00:00Z","command":["make","all"],"namespace":4026532000,"owner":[1000,100]}"#;
        let record: ViewRecord = serde_json::from_str(text).unwrap();
        assert_eq!(
            (record.name.as_str(), record.backend, record.owner),
            ("tools", Backend::Fuse, Some((1000, 100)))
        );
        assert_eq!(serde_json::to_string(&record).unwrap(), text);
        let least = text.replace(r#","namespace":4026532000,"owner":[1000,100]"#, "");
        assert_eq!(serde_json::from_str::<ViewRecord>(&least).unwrap().namespace, None);
    }
}
