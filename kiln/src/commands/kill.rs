//! `kiln kill`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::resolve::parse_signal;

/// Send a signal to the first process of instances
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
    /// The signal, by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "SIGKILL")]
    signal: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let signal = parse_signal("--signal", &self.signal)?;
        context.each_instance(&self.instances, |instances, id| Ok(instances.signal(id, signal)?))
    }
}
