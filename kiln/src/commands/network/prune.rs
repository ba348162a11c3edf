//! `kiln network prune`.

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Remove all networks that no instance uses, and print their names
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Accepted for Docker's sake: nothing is asked
    #[arg(short, long, hide = true)]
    force: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let mut out = Out::new();
        for name in context.networks()?.prune()? {
            out.line(name)?;
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
