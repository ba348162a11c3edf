//! `kiln snapshot ls`.

use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use kiln_contract::{ByteSize, RuntimeBackend as _};

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Out, Table, print_rows};
use crate::resolve::ago;

/// List the snapshots of a machine, oldest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The machine
    #[arg(value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        let rows = instances.snapshots(&record.id)?;
        if self.quiet {
            let mut out = Out::new();
            for snapshot in &rows {
                out.line(&snapshot.name)?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let now = Timestamp::now();
        print_rows(self.format.format, &rows, |rows| {
            let mut table = Table::new(["NAME", "CREATED", "DISK", "MEMORY"]).right("DISK").right("MEMORY");
            for row in rows {
                table.row([
                    row.name.clone(),
                    ago(row.created, now),
                    ByteSize(row.disk_size).to_string(),
                    row.memory.map(|bytes| ByteSize(bytes).to_string()).unwrap_or_default(),
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
