//! `kiln fs log`.

use clap_complete::engine::ArgValueCompleter;

use crate::commands::image::history;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::FormatArgs;

/// Show what a name pointed to over time: `NAME~1` is the one before
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The name
    #[arg(add = ArgValueCompleter::new(complete::images))]
    name: String,
    /// Digests in full
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        history::targets(context, &self.name, self.no_trunc, self.format.format)?;
        Ok(Exit::SUCCESS)
    }
}
