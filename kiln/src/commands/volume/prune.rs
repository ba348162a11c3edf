//! `kiln volume prune`.

use kiln_contract::ByteSize;
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Table, print_rows};

/// Remove anonymous volumes that no instance uses, or all that no instance uses
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Named ones too
    #[arg(short, long)]
    all: bool,
    /// Accepted for Docker's sake: nothing is asked
    #[arg(short, long, hide = true)]
    force: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// A volume that was removed, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// Its name.
    name: String,
    /// Bytes that were in it.
    size: u64,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let removed = context.volumes()?.prune(self.all)?;
        let rows: Vec<Row> = removed.into_iter().map(|(name, size)| Row { name, size }).collect();
        print_rows(self.format.format, &rows, |rows| {
            let mut table = Table::new(["REMOVED", "SIZE"]).right("SIZE");
            for row in rows {
                table.row([row.name.clone(), ByteSize(row.size).to_string()]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
