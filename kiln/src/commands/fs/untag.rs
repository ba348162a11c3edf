//! `kiln fs untag`.

use clap_complete::engine::ArgValueCompleter;
use kiln_store::{Store, StoreError};

use crate::commands::image::image_name;
use crate::complete;
use crate::context::{self, Context};
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;
use crate::suggest;

/// Take names away, with their histories; or with --latest, let them name what they named before
///
/// The space is given back by `kiln fs clean`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(complete::images))]
    names: Vec<String>,
    /// Only the latest version of each: what was NAME~1 is NAME
    #[arg(long)]
    latest: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        context::each(&self.names, |text| {
            let name = image_name(text)?;
            let there = if self.latest {
                match Store::untag_latest(context.home(), &name) {
                    Err(StoreError::NotFound { .. }) => false,
                    other => other.map(|_| true)?,
                }
            } else {
                context.store()?.untag(&name)?
            };
            if !there {
                let error = CliError::failed(format!("there is no tag `{}`", name.familiar()));
                let tags = context.store()?.tags()?;
                let names: Vec<String> = tags.iter().map(|(name, _)| name.familiar()).collect();
                return Err(match suggest::nearest(&name.familiar(), names.iter().map(String::as_str)) {
                    Some(near) => error.with_hint(format!("did you mean `{near}`?")),
                    None => error.with_hint("`kiln fs ls-tags` lists them"),
                });
            }
            let mut out = Out::new();
            out.line(name.familiar())?;
            out.flush()
        })
    }
}
