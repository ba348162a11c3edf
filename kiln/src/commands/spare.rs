//! `kiln spare`, which Kiln itself calls.

use std::path::PathBuf;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Keep a machine ready for the next start from a template (started by Kiln itself)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The template's key
    template: String,
    /// The image disk of its machines
    image: PathBuf,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        kiln_machine::keep_spare(context.home(), &self.template, &self.image)?;
        Ok(Exit::SUCCESS)
    }
}
