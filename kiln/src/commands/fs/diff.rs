//! `kiln fs diff`.

use clap_complete::engine::ArgValueCompleter;
use kiln_view::views::Views;

use super::{find_view, stack};
use crate::commands::diff::print_changes;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::FormatArgs;

/// Show what was changed in a view, or between two images: A added, C changed, D deleted
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The view's name, or the image to start from; the view in which this runs otherwise
    #[arg(value_name = "FROM", add = ArgValueCompleter::new(complete::views))]
    from: Option<String>,
    /// The image to end with
    #[arg(add = ArgValueCompleter::new(complete::images))]
    to: Option<String>,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let changes = match (&self.from, &self.to) {
            (Some(from), Some(to)) => {
                let store = context.store()?;
                let (from, to) = (stack(&store, from)?, stack(&store, to)?);
                store.diff(&from.layers, &to.layers)?
            }
            (from, _) => {
                let views = Views::open(context.home());
                views.changes(&find_view(&views, from.as_deref())?)?
            }
        };
        print_changes(self.format.format, &changes)?;
        Ok(Exit::SUCCESS)
    }
}
