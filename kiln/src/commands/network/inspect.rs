//! `kiln network inspect`.

use clap_complete::engine::ArgValueCompleter;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, Table, print_json, print_rows};

/// Show everything that is known of networks, as JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names
    #[arg(required = true, value_name = "NETWORK", add = ArgValueCompleter::new(complete::networks))]
    networks: Vec<String>,
    /// The form of the output
    #[arg(long, value_name = "FORMAT", default_value = "json")]
    format: Format,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let networks = context.networks()?;
        let all = self.networks.iter().map(|name| Ok(networks.find(name)?)).collect::<Result<Vec<_>>>()?;
        match self.format {
            Format::Jsonl => print_rows(Format::Jsonl, &all, |_| Table::default())?,
            _ => print_json(Format::Json, &all)?,
        }
        Ok(Exit::SUCCESS)
    }
}
