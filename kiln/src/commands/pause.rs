//! `kiln pause`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Suspend all processes of instances
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        context.each_instance(&self.instances, |instances, id| Ok(instances.pause(id)?))
    }
}
