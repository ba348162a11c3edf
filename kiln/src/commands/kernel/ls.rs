//! `kiln kernel ls`.

use std::path::PathBuf;

use jiff::Timestamp;
use kiln_boot::{Arch, Kernel, Kernels, Source};
use kiln_contract::{ByteSize, Digest};
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Out, Table, print_rows};
use crate::resolve::ago;

/// List the kernels that machines can boot
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// A kernel, as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// Its name.
    name: String,
    /// What `uname -r` says in it.
    version: String,
    /// The processors that it is for.
    arch: Arch,
    /// Whether machines boot it if none is named.
    default: bool,
    /// Where it came from.
    source: Source,
    /// Bytes of its files.
    size: u64,
    /// How many modules it has, of those that machines may need.
    modules: usize,
    /// Options of its configuration that it would need for all that machines may do.
    absent: Vec<String>,
    /// Of all that is booted of it.
    digest: Digest,
    /// When it was installed.
    created: Timestamp,
    /// Where it is.
    path: PathBuf,
}

impl Row {
    fn new(kernel: &Kernel, default: Option<&str>) -> Self {
        let record = kernel.record();
        Self {
            name: record.name.clone(),
            version: record.version.clone(),
            arch: record.arch,
            default: default == Some(kernel.name()),
            source: record.source.clone(),
            size: record.size,
            modules: record.modules.len(),
            absent: record.absent.clone(),
            digest: record.digest,
            created: record.created,
            path: kernel.directory().into(),
        }
    }
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let kernels = Kernels::open(context.home());
        let all = kernels.list()?;
        if self.quiet {
            let mut out = Out::new();
            for kernel in &all {
                out.line(kernel.name())?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let default = kernels.default().ok();
        let default = default.as_ref().map(Kernel::name);
        let rows: Vec<Row> = all.iter().map(|kernel| Row::new(kernel, default)).collect();
        let now = Timestamp::now();
        print_rows(self.format.format, &rows, |rows| {
            let mut table =
                Table::new(["NAME", "VERSION", "ARCH", "SOURCE", "SIZE", "CREATED", "DEFAULT"]).right("SIZE");
            for row in rows {
                table.row([
                    row.name.clone(),
                    row.version.clone(),
                    row.arch.to_string(),
                    source(&row.source).to_owned(),
                    ByteSize(row.size).to_string(),
                    ago(row.created, now),
                    if row.default { "default" } else { "" }.to_owned(),
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}

/// A word for a column.
fn source(source: &Source) -> &'static str {
    match source {
        Source::Host(_) => "host",
        Source::Packages(_) => "packages",
        Source::Path(_) => "path",
        Source::Distribution => "debian",
        Source::Build { .. } => "built",
    }
}
