//! `kiln fs info`.

use clap_complete::engine::ArgValueCompleter;
use kiln_view::views::{ViewRecord, Views};
use serde::Serialize;

use super::find_view;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Format, print_json};

/// Show all that is known of a view, as JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The view's name; that in which this runs otherwise
    #[arg(add = ArgValueCompleter::new(complete::views))]
    view: Option<String>,
}

/// A view as it is shown.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    pub(super) record: ViewRecord,
    /// Whether somebody is in it.
    pub(super) active: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        let record = find_view(&views, self.view.as_deref())?;
        let active = views.is_active(&record);
        print_json(Format::Json, &Shown { record, active })?;
        Ok(Exit::SUCCESS)
    }
}
