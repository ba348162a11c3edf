//! `kiln fs info`.

use std::collections::{BTreeMap, HashMap};

use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use kiln_contract::{Digest, ErrorKind};
use kiln_store::ImageName;
use kiln_view::Bind;
use kiln_view::views::{ViewRecord, Views};
use serde::Serialize;

use super::{find_view, stack};
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{Format, print_json};

/// Show all that is known of a view, or of what would be seen in one, as JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The view's name, or REF[+REF…]; the view in which this runs otherwise
    #[arg(value_name = "VIEW|REF", add = ArgValueCompleter::new(complete::views_and_images))]
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

/// A reference as it is shown.
#[derive(Debug, Serialize)]
struct Named {
    /// What was asked for.
    reference: String,
    /// `sha256:…`: the id of the image whose configuration a view has.
    image: Digest,
    /// Names of that image.
    names: Vec<String>,
    /// When it was made, by its config (RFC 3339).
    created: Option<Timestamp>,
    /// The stack, bottom first.
    layers: Vec<Digest>,
    /// What of the host's would be shown in a view.
    binds: Vec<Bind>,
    /// Labels of the image.
    labels: BTreeMap<String, String>,
    /// Annotations of its manifest.
    annotations: BTreeMap<String, String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        match (find_view(&views, self.view.as_deref()), &self.view) {
            (Ok(record), _) => {
                let active = views.is_active(&record);
                print_json(Format::Json, &Shown { record, active })?;
            }
            (Err(error), Some(reference)) if error.kind() == Some(ErrorKind::NotFound) => {
                let named = named(context, reference).map_err(|not_named| match error.hint() {
                    // A view has nearly that name.
                    Some(_) => error,
                    None => not_named,
                })?;
                print_json(Format::Json, &named)?;
            }
            (Err(error), _) => return Err(error),
        }
        Ok(Exit::SUCCESS)
    }
}

fn named(context: &Context, reference: &str) -> Result<Named> {
    let store = context.store()?;
    let stack = stack(&store, reference)?;
    let image = store.image(&stack.image)?.ok_or_else(|| CliError::failed("the image has gone meanwhile"))?;
    let sorted = |map: Option<HashMap<String, String>>| map.unwrap_or_default().into_iter().collect();
    let labels = image.config.config().as_ref().and_then(|config| config.labels().clone());
    Ok(Named {
        reference: reference.to_owned(),
        image: image.id,
        names: store.names_of(&image.id)?.iter().map(ImageName::familiar).collect(),
        created: image.config.created().as_deref().and_then(|text| text.parse().ok()),
        layers: stack.layers,
        binds: stack.binds,
        labels: sorted(labels),
        annotations: sorted(image.manifest.annotations().clone()),
    })
}
