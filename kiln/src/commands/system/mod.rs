//! `kiln system …`.

pub(crate) mod check;
pub(crate) mod collected;
pub(crate) mod df;
pub(crate) mod doctor;
pub(crate) mod info;
pub(crate) mod prune;

use clap::Subcommand;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Df(df::Args),
    Prune(prune::Args),
    Check(check::Args),
    Doctor(doctor::Args),
    Info(info::Args),
}

impl Command {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Df(args) => args.run(context),
            Self::Prune(args) => args.run(context),
            Self::Check(args) => args.run(context),
            Self::Doctor(args) => args.run(context),
            Self::Info(args) => args.run(context),
        }
    }
}
