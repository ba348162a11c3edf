//! `kiln kernel …`.

mod build;
mod default;
mod install;
mod ls;
mod rm;

use clap::Subcommand;
use kiln_boot::{Kernels, Source};

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;
use crate::progress;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Install(install::Args),
    Build(build::Args),
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    #[command(visible_alias = "remove")]
    Rm(rm::Args),
    Default(default::Args),
}

impl Command {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Install(args) => args.run(context),
            Self::Build(args) => args.run(context),
            Self::Ls(args) => args.run(context),
            Self::Rm(args) => args.run(context),
            Self::Default(args) => args.run(context),
        }
    }
}

/// Where a new kernel goes.
#[derive(Debug, clap::Args)]
struct New {
    /// Its name; its version otherwise
    #[arg(long)]
    name: Option<String>,
    /// Make it the default
    #[arg(long)]
    default: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

impl New {
    /// Installs from the first of `sources` that has a kernel, and prints its name.
    fn install(&self, context: &Context, sources: &[Source]) -> Result<Exit> {
        let kernels = Kernels::open(context.home());
        let progress = progress::new(self.quiet);
        let kernel = kernels.install_first(sources, self.name.as_deref(), &*progress)?;
        if self.default {
            kernels.set_default(kernel.name())?;
        }
        let mut out = Out::new();
        out.line(kernel.name())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
