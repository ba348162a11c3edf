//! `kiln fs edit`.

use clap_complete::engine::ArgValueCompleter;
use kiln_view::views::{Alteration, Views};

use super::find_view;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Let a view be changed from now on, while programs go on in it
///
/// Files that are open stay open. A process whose working directory is in the view sees the new one when it enters the
/// directory again.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The view's name; that in which this runs otherwise
    #[arg(add = ArgValueCompleter::new(complete::views))]
    view: Option<String>,
    /// Let it not be changed any more; what was changed stays
    #[arg(long)]
    off: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        let record = find_view(&views, self.view.as_deref())?;
        views.alter(&record, &Alteration::Edit(!self.off))?;
        Ok(Exit::SUCCESS)
    }
}
