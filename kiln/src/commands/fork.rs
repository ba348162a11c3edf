//! `kiln fork`

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{RuntimeBackend as _, StartMode};

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Make a new machine that begins as a copy of another, and start it
///
/// A running machine is copied as it is at one instant, with its memory and its processes, and goes on; one that does not
/// run is copied with its disk.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  kiln fork dev try-1\n  kiln fork --disk dev clean")]
pub(crate) struct Args {
    /// The machine
    #[arg(value_name = "MACHINE", add = ArgValueCompleter::new(complete::instances))]
    source: String,
    /// The name of the copy
    #[arg(value_name = "NAME")]
    name: String,
    /// Copy the memory too: it must run
    #[arg(long, conflicts_with = "disk")]
    memory: bool,
    /// Copy only the disk, and do not start the copy
    #[arg(long)]
    disk: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let source = instances.find(&self.source)?;
        let runs = source.status == kiln_contract::InstanceStatus::Running;
        let memory = self.memory || (runs && !self.disk);
        let fork = instances.fork(&source.id, &self.name, memory)?;
        if memory {
            instances.start(&fork.id, StartMode::Detached)?;
        }
        let mut out = Out::new();
        out.line(fork.id.as_str())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
