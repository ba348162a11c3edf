//! `kiln fs join`.

use clap_complete::engine::ArgValueCompleter;
use kiln_view::views::Views;

use super::{ended, find_view};
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Run a command in a view in which something runs already
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The view's name
    #[arg(add = ArgValueCompleter::new(complete::views))]
    view: String,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        let record = find_view(&views, Some(&self.view))?;
        let command = views.with_startup(&record, &self.command)?;
        Ok(ended(views.join_and_run(&record, &command)?))
    }
}
