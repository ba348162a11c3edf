//! `kiln template prune`.

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Remove all templates that no running machine began with
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        context.instances()?;
        let removed = kiln_machine::prune_templates(context.home(), self.dry_run)?;
        let mut out = Out::new();
        for template in removed {
            out.line(template.record().key.short())?;
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
