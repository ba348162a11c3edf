//! Start-up scripts: what a view's content does before a command runs in it.
//!
//! `etc/kiln/startup.d/*.sh` in a view are sourced, in the order of their names, by the shell that then becomes the command:
//! they set its environment. What a script returns does not matter; one that ends the shell, or that the shell cannot
//! read, keeps the command from running.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kiln_contract::ErrorKind;

use super::{Result, ViewRecord, Views};
use crate::TreeContents;

/// Where they are, below the view.
const DIRECTORY: &str = "etc/kiln/startup.d";

/// Sources the scripts of `$1` and becomes the rest. In a function, so that what a script does to its own arguments is not
/// done to the command.
const SOURCE: &str = r#"kiln_directory=$1
shift
trap 'echo "error: the start-up script $kiln_script has ended the shell, so the command was not run" >&2; exit 125' EXIT
kiln_source() { . "$1"; }
for kiln_script in "$kiln_directory"/*.sh; do
    [ ! -e "$kiln_script" ] || kiln_source "$kiln_script"
done
trap - EXIT
unset kiln_directory kiln_script
unset -f kiln_source
exec "$@""#;

impl Views {
    /// The command that runs a view's start-up scripts, and then `command`; that itself if there are none.
    ///
    /// # Errors
    /// The view's tree cannot be read.
    pub fn with_startup(&self, record: &ViewRecord, command: &[String]) -> Result<Vec<String>> {
        if command.is_empty() || !self.has_startup(record)? {
            return Ok(command.to_vec());
        }
        let directory = record.at.join(DIRECTORY).display().to_string();
        let shell = ["/bin/sh", "-c", SOURCE, "kiln", &directory].map(str::to_owned);
        Ok([&shell[..], command].concat())
    }

    fn has_startup(&self, record: &ViewRecord) -> Result<bool> {
        let below = Path::new(DIRECTORY);
        let bound = record
            .binds
            .iter()
            .any(|bind| bind.dest.starts_with("etc/kiln") || below.starts_with(&bind.dest));
        let changed = self.scratch(record).is_some_and(|scratch| scratch.upper.join(DIRECTORY).exists());
        if bound || changed {
            return Ok(true);
        }
        let store = self.store()?;
        let contents =
            TreeContents::open(&self.tree(&store, record)?, &store.objects_dir(), self.fetcher.clone())?;
        match contents.list(format!("{DIRECTORY}/.").as_bytes()) {
            Ok(entries) => Ok(entries.iter().any(|entry| {
                Path::new(OsStr::from_bytes(&entry.name)).extension() == Some(OsStr::new("sh"))
            })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}
