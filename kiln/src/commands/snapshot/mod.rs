//! `kiln snapshot …`.

mod create;
mod ls;
mod restore;
mod rm;

use clap::Subcommand;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    Restore(restore::Args),
    #[command(visible_alias = "remove")]
    Rm(rm::Args),
}

impl Command {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Create(args) => args.run(context),
            Self::Ls(args) => args.run(context),
            Self::Restore(args) => args.run(context),
            Self::Rm(args) => args.run(context),
        }
    }
}
