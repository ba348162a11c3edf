//! `kiln snapshot restore`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend as _;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Put a machine back to what it was when it was saved
///
/// It must not run. If its memory was saved too, its next start goes on from there; otherwise it boots from its disk.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  kiln snapshot restore --force dev before-upgrade\n  kiln start dev")]
pub(crate) struct Args {
    /// The machine
    #[arg(value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// The snapshot
    #[arg(value_name = "NAME")]
    name: String,
    /// Kill it first if it runs
    #[arg(short, long)]
    force: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        instances.restore(&record.id, &self.name, self.force)?;
        let mut out = Out::new();
        out.line(&self.instance)?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
