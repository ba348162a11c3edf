//! `kiln volume ls`.

use std::collections::BTreeSet;

use jiff::Timestamp;
use kiln_contract::{MountKind, RuntimeBackend};

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Filters, FormatArgs, Out, Table, print_rows};
use crate::resolve::ago;

/// List volumes
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what fits: name, label, dangling
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let filters = Filters::parse(&self.filter, &["name", "label", "dangling"])?;
        let mut volumes = context.volumes()?.list()?;
        if let Some(wanted) = filters.switch("dangling")? {
            let used = used(context)?;
            volumes.retain(|volume| wanted != used.contains(&volume.name));
        }
        volumes.retain(|volume| {
            filters.any("name", |part| volume.name.contains(part)) && filters.labels(&volume.labels)
        });
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        if self.quiet {
            let mut out = Out::new();
            for volume in &volumes {
                out.line(&volume.name)?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let now = Timestamp::now();
        print_rows(self.format.format, &volumes, |volumes| {
            let mut table = Table::new(["NAME", "KIND", "CREATED", "PATH"]);
            for volume in volumes {
                let kind = if volume.anonymous { "anonymous" } else { "named" };
                table.row([
                    volume.name.clone(),
                    kind.to_owned(),
                    ago(volume.created, now),
                    volume.path.display().to_string(),
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}

/// Volumes that instances use, whether they run or not.
fn used(context: &Context) -> Result<BTreeSet<String>> {
    let records = context.instances()?.list()?;
    let named = records.iter().flat_map(|record| &record.spec.mounts).filter_map(|mount| match &mount.kind {
        MountKind::Volume { name, .. } => name.clone(),
        _ => None,
    });
    let anonymous = records.iter().flat_map(|record| record.volumes.iter().cloned());
    Ok(named.chain(anonymous).collect())
}
