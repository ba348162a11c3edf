//! `kiln load`, as Docker has it.

use std::path::PathBuf;

use super::import;
use crate::commands::LayerLimitArgs;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Take images from an archive (`kiln image import`)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where it is; standard input otherwise
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
    /// Show nothing meanwhile
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    limits: LayerLimitArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        import::Args::docker(self.input, self.quiet, self.limits).run(context)
    }
}
