//! `kiln image prune`.

use crate::commands::system::prune::collect;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::FormatArgs;

/// Remove images without a name, or all that no instance uses, and give their space back
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// All images that no instance uses, named or not
    #[arg(short, long)]
    all: bool,
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Accepted for Docker's sake: nothing is asked
    #[arg(short, long, hide = true)]
    force: bool,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        collect(context, &instances, self.all, self.dry_run)?.print(self.format.format)?;
        Ok(Exit::SUCCESS)
    }
}
