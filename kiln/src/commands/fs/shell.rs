//! `kiln fs shell`.

use clap_complete::engine::ArgValueCompleter;

use super::run::{BackendArgs, PullArgs, ViewArgs, run_new};
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Start your shell where an image, or several as one, is seen at a path
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is to be seen; of several, joined by `+`, later ones lie over earlier ones
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    #[command(flatten)]
    view: ViewArgs,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    pulling: PullArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let shell = std::env::var("SHELL").ok().filter(|shell| !shell.is_empty());
        run_new(
            context,
            &self.reference,
            &self.view,
            &self.backend,
            &self.pulling,
            &[shell.unwrap_or_else(|| "/bin/sh".to_owned())],
        )
    }
}
