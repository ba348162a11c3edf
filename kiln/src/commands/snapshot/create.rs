//! `kiln snapshot create`.

use clap_complete::engine::ArgValueCompleter;
use jiff::Zoned;
use kiln_contract::{RuntimeBackend as _, SnapshotOptions};

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Save a machine as it is now
///
/// A running machine goes on. Without --memory its disk is saved as it is at one instant; with it, what runs in it is too.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln snapshot create dev before-upgrade\n  kiln snapshot create --memory dev"
)]
pub(crate) struct Args {
    /// The machine
    #[arg(value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// The snapshot's name; the time otherwise
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Save its memory too: it must run
    #[arg(long)]
    memory: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        let name = self.name.unwrap_or_else(|| Zoned::now().strftime("%Y-%m-%dT%H-%M-%S").to_string());
        instances.snapshot(&record.id, &SnapshotOptions { name: name.clone(), memory: self.memory })?;
        let mut out = Out::new();
        out.line(&name)?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
