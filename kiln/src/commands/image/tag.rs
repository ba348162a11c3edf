//! `kiln image tag`.

use clap_complete::engine::ArgValueCompleter;

use super::image_name;
use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;

/// Give an image further names
///
/// What a name pointed to before stays reachable as `name:tag~1`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: String,
    /// The new names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let image = context.image(&store, &self.image)?;
        context::each(&self.names, |text| {
            Ok(store.tag(&image_name(text)?, &image.manifest_digest, &format!("tag {}", self.image))?)
        })
    }
}
