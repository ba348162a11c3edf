//! `kiln image …`.

pub(crate) mod diff;
pub(crate) mod export;
pub(crate) mod history;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod load;
pub(crate) mod ls;
pub(crate) mod prune;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod rm;
pub(crate) mod save;
pub(crate) mod tag;

use clap::Subcommand;

use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Pull(pull::Args),
    Push(push::Args),
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    #[command(visible_alias = "remove")]
    Rm(rm::Args),
    Inspect(inspect::Args),
    Import(import::Args),
    Export(export::Args),
    #[command(hide = true)]
    Save(save::Args),
    #[command(hide = true)]
    Load(load::Args),
    Tag(tag::Args),
    History(history::Args),
    Diff(diff::Args),
    Prune(prune::Args),
}

impl Command {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Pull(args) => args.run(context),
            Self::Push(args) => args.run(context),
            Self::Ls(args) => args.run(context),
            Self::Rm(args) => args.run(context),
            Self::Inspect(args) => args.run(context),
            Self::Import(args) => args.run(context),
            Self::Export(args) => args.run(context),
            Self::Save(args) => args.run(context),
            Self::Load(args) => args.run(context),
            Self::Tag(args) => args.run(context),
            Self::History(args) => args.run(context),
            Self::Diff(args) => args.run(context),
            Self::Prune(args) => args.run(context),
        }
    }
}

/// A name that will be given to an image.
pub(crate) fn image_name(text: &str) -> Result<kiln_store::ImageName> {
    kiln_store::ImageName::parse(text).map_err(|error| {
        CliError::from(error)
            .with_hint("a name is [registry/]path[:tag], in lower case: me/app:1, localhost:5000/app")
    })
}
