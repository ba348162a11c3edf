//! `kiln diff`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{Change, ChangeKind, RuntimeBackend};
use serde::Serialize;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, Table, print_rows};

/// Show where an instance's root differs from its image: A added, C changed, D deleted
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        print_changes(self.format.format, &instances.changes(&record.id)?)?;
        Ok(Exit::SUCCESS)
    }
}

/// A change as the JSON forms write it.
#[derive(Debug, Serialize)]
struct ChangeRow {
    /// `added`, `modified`, `deleted`.
    kind: ChangeKind,
    /// Absolute in the root; bytes that are not UTF-8 are replaced.
    path: String,
}

/// Prints changes as Docker does (`C /etc`), or as JSON.
pub(super) fn print_changes(format: Format, changes: &[Change]) -> Result<()> {
    if format == Format::Table {
        let mut out = Out::new();
        for change in changes {
            let letter = match change.kind {
                ChangeKind::Added => "A ",
                ChangeKind::Modified => "C ",
                ChangeKind::Deleted => "D ",
            };
            out.bytes(&[letter.as_bytes(), &change.path, b"\n"].concat())?;
        }
        return out.flush();
    }
    let row = |change: &Change| ChangeRow {
        kind: change.kind,
        path: String::from_utf8_lossy(&change.path).into_owned(),
    };
    print_rows(format, &changes.iter().map(row).collect::<Vec<_>>(), |_| Table::default())
}
