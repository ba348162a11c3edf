//! `kiln save`, as Docker has it.

use std::path::PathBuf;

use clap_complete::engine::ArgValueCompleter;

use super::export;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Write images as a docker-archive (`kiln image export --format docker-archive`)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE", add = ArgValueCompleter::new(complete::images))]
    images: Vec<String>,
    /// Where to; standard output otherwise
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        export::Args::docker(self.images, self.output).run(context)
    }
}
