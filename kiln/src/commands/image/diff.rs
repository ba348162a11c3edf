//! `kiln image diff`.

use clap_complete::engine::ArgValueCompleter;

use crate::commands::diff::print_changes;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::FormatArgs;

/// Show what one image has that another has not: A added, C changed, D deleted
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image to start from
    #[arg(add = ArgValueCompleter::new(complete::images))]
    from: String,
    /// The image to end with
    #[arg(add = ArgValueCompleter::new(complete::images))]
    to: String,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let from = context.image(&store, &self.from)?;
        let to = context.image(&store, &self.to)?;
        print_changes(self.format.format, &store.diff(&from.layers, &to.layers)?)?;
        Ok(Exit::SUCCESS)
    }
}
