//! `kiln fs add` and `kiln fs switch`.

use clap_complete::engine::ArgValueCompleter;
use kiln_view::views::{Alteration, Views};

use super::{Stack, find_view, whole_stack};
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Lay more images over those that a view shows, while programs go on in it
///
/// What was changed in the view stays on top, and files that are open stay open. A process whose working directory is in
/// the view sees the new one when it enters the directory again.
#[derive(Debug, clap::Args)]
pub(crate) struct Add {
    /// What is to be seen besides; of several, joined by `+`, later ones lie over earlier ones
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    /// The view's name; that in which this runs otherwise
    #[arg(long, value_name = "NAME", add = ArgValueCompleter::new(complete::views))]
    view: Option<String>,
}

/// Show other images in a view instead of those that it shows, while programs go on in it
///
/// What was changed in the view stays on top, as with `kiln fs add`.
#[derive(Debug, clap::Args)]
pub(crate) struct Switch {
    /// What is to be seen; of several, joined by `+`, later ones lie over earlier ones
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    /// The view's name; that in which this runs otherwise
    #[arg(long, value_name = "NAME", add = ArgValueCompleter::new(complete::views))]
    view: Option<String>,
}

impl Add {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        let record = find_view(&views, self.view.as_deref())?;
        let Stack { layers: new, binds, .. } = whole_stack(context, &context.store()?, &self.reference)?;
        let mut layers = record.layers.clone();
        for layer in new {
            // What is there already is not put over what came after it once more.
            if !layers.contains(&layer) {
                layers.push(layer);
            }
        }
        let reference = format!("{}+{}", record.reference, self.reference);
        let binds = [record.binds.as_slice(), &binds].concat();
        views.alter(&record, &Alteration::Show { reference, image: record.image, layers, binds })?;
        Ok(Exit::SUCCESS)
    }
}

impl Switch {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        let record = find_view(&views, self.view.as_deref())?;
        let Stack { image, layers, binds, .. } = whole_stack(context, &context.store()?, &self.reference)?;
        views.alter(&record, &Alteration::Show { reference: self.reference, image, layers, binds })?;
        Ok(Exit::SUCCESS)
    }
}
