//! `kiln volume inspect`.

use clap_complete::engine::ArgValueCompleter;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, Table, print_json, print_rows};

/// Show everything that is known of volumes, as JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names
    #[arg(required = true, value_name = "VOLUME", add = ArgValueCompleter::new(complete::volumes))]
    volumes: Vec<String>,
    /// The form of the output
    #[arg(long, value_name = "FORMAT", default_value = "json")]
    format: Format,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let volumes = context.volumes()?;
        let all = self.volumes.iter().map(|name| Ok(volumes.find(name)?)).collect::<Result<Vec<_>>>()?;
        match self.format {
            Format::Jsonl => print_rows(Format::Jsonl, &all, |_| Table::default())?,
            _ => print_json(Format::Json, &all)?,
        }
        Ok(Exit::SUCCESS)
    }
}
