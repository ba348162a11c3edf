//! `kiln inspect`.

use clap::ValueEnum;
use clap_complete::engine::ArgValueCompleter;
use kiln_contract::ErrorKind;
use serde_json::Value;

use super::image::inspect::details;
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::{self, Exit};
use crate::output::{Format, print_json, print_rows};

/// Show everything that is known of instances, images, volumes or networks, as JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, add = ArgValueCompleter::new(complete::instances))]
    names: Vec<String>,
    /// Look among these only
    #[arg(long, value_name = "TYPE")]
    r#type: Option<Kind>,
    /// The form of the output
    #[arg(long, value_name = "FORMAT", default_value = "json")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    #[value(alias = "container")]
    Instance,
    Image,
    Volume,
    Network,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let mut found = Vec::new();
        let mut failed = None;
        for name in &self.names {
            match find(context, name, self.r#type) {
                Ok(value) => found.push(value),
                Err(error) if self.names.len() == 1 => return Err(error),
                Err(error) => {
                    exit::print_error(&error);
                    failed = Some(CliError::Reported);
                }
            }
        }
        if self.format == Format::Jsonl {
            print_rows(Format::Jsonl, &found, |_| crate::output::Table::default())?;
        } else {
            print_json(Format::Json, &found)?;
        }
        failed.map_or(Ok(Exit::SUCCESS), Err)
    }
}

/// The first that has this name, in the order instance, image, volume, network.
fn find(context: &Context, name: &str, kind: Option<Kind>) -> Result<Value> {
    let wanted = |one| kind.is_none() || kind == Some(one);
    let mut missing = None;
    if wanted(Kind::Instance) {
        let instances = context.instances()?;
        match context.instance(&instances, name) {
            Ok(record) => return Ok(serde_json::to_value(record)?),
            Err(error) if error.kind() == Some(ErrorKind::NotFound) => missing = Some(error),
            Err(error) => return Err(error),
        }
    }
    if wanted(Kind::Image) {
        let store = context.store()?;
        match context.image(&store, name) {
            Ok(image) => return Ok(serde_json::to_value(details(&store, &image)?)?),
            Err(error) if kind.is_some() => return Err(error),
            Err(_) => {}
        }
    }
    if wanted(Kind::Volume) {
        match context.volumes()?.find(name) {
            Ok(volume) => return Ok(serde_json::to_value(volume)?),
            Err(error) if kind.is_some() || error.kind() != ErrorKind::NotFound => return Err(error.into()),
            Err(_) => {}
        }
    }
    if wanted(Kind::Network) {
        match context.networks()?.find(name) {
            Ok(network) => return Ok(serde_json::to_value(network)?),
            Err(error) if kind.is_some() || error.kind() != ErrorKind::NotFound => return Err(error.into()),
            Err(_) => {}
        }
    }
    let error = CliError::failed(format!("there is no instance, image, volume or network `{name}`"));
    Err(match missing.and_then(|error| error.hint()) {
        Some(hint) => error.with_hint(hint),
        None => error,
    })
}
