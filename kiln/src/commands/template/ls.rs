//! `kiln template ls`.

use jiff::Timestamp;
use kiln_contract::{ByteSize, Digest, RuntimeBackend as _};
use kiln_machine::{Disk, Saved, SpareState};
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Out, Table, print_rows};
use crate::resolve::ago;

/// List the templates that machines start from, the one used last first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// A template, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// The digest of all that it depends on.
    id: Digest,
    /// The kernel's name.
    kernel: String,
    /// Virtual processors.
    cpus: u32,
    /// Bytes of memory.
    memory: u64,
    /// What its machines have for a writable disk.
    disk: Disk,
    /// How long its guest took to boot, in milliseconds.
    boot_millis: u64,
    /// Bytes that it takes.
    size: u64,
    /// How far the machine is that is kept for its next start, if one is.
    spare: Option<SpareState>,
    /// When it was made.
    created: Timestamp,
}

impl From<&Saved> for Row {
    fn from(template: &Saved) -> Self {
        let record = template.record();
        Self {
            id: record.key,
            kernel: record.kernel.clone(),
            cpus: record.shape.cpus,
            memory: record.shape.memory,
            disk: record.disk,
            boot_millis: record.boot_millis,
            size: template.size(),
            spare: kiln_machine::spare_state(template),
            created: record.made,
        }
    }
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        // What dead supervisors left of their machines is set right first: they use templates.
        context.instances()?.list()?;
        let rows: Vec<Row> = kiln_machine::templates(context.home())?.iter().map(Row::from).collect();
        if self.quiet {
            let mut out = Out::new();
            for row in &rows {
                out.line(row.id.short())?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let now = Timestamp::now();
        print_rows(self.format.format, &rows, |rows| {
            let titles = ["ID", "KERNEL", "CPUS", "MEMORY", "DISK", "BOOT", "SIZE", "SPARE", "CREATED"];
            let mut table = Table::new(titles).right("CPUS").right("MEMORY").right("BOOT").right("SIZE");
            for row in rows {
                let disk = match row.disk {
                    Disk::Empty => "new",
                    Disk::Root => "image",
                    Disk::Own => "own",
                };
                let spare = match row.spare {
                    Some(SpareState::Ready) => "ready",
                    Some(SpareState::Making) => "making",
                    None => "",
                };
                table.row([
                    row.id.short(),
                    row.kernel.clone(),
                    row.cpus.to_string(),
                    ByteSize(row.memory).to_string(),
                    disk.to_owned(),
                    format!("{} ms", row.boot_millis),
                    ByteSize(row.size).to_string(),
                    spare.to_owned(),
                    ago(row.created, now),
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
