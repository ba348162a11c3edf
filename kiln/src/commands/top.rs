//! `kiln top`.

use std::collections::BTreeMap;

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Table, print_rows};

/// Show the processes of an instance
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
        let table = instances.top(&record.id)?;
        let name = |title: &String| title.to_ascii_lowercase();
        let rows: Vec<BTreeMap<String, &String>> =
            table.rows.iter().map(|row| table.titles.iter().map(name).zip(row).collect()).collect();
        print_rows(self.format.format, &rows, |_| {
            let mut shown = Table::new(table.titles.clone());
            for row in &table.rows {
                shown.row(row.clone());
            }
            shown
        })?;
        Ok(Exit::SUCCESS)
    }
}
