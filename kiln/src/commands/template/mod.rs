//! `kiln template …`.

mod ls;
mod prune;
mod rm;

use clap::Subcommand;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    #[command(visible_alias = "remove")]
    Rm(rm::Args),
    Prune(prune::Args),
}

impl Command {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Ls(args) => args.run(context),
            Self::Rm(args) => args.run(context),
            Self::Prune(args) => args.run(context),
        }
    }
}
