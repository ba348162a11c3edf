//! `kiln restart`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{HumanDuration, RuntimeBackend, StartMode};

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Stop instances, and start them again
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
    /// How long each may take to end; as it was created with (10s) otherwise
    #[arg(short, long, visible_alias = "timeout", value_name = "SECONDS")]
    time: Option<HumanDuration>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let time = self.time.map(|given| given.0);
        context.each_instance(&self.instances, |instances, id| {
            instances.stop(id, time)?;
            instances.start(id, StartMode::Detached)?;
            Ok(())
        })
    }
}
