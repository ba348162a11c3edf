//! `kiln snapshot rm`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend as _;

use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Remove snapshots of a machine
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The machine
    #[arg(value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// Snapshots
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        context::each(&self.names, |name| {
            instances.remove_snapshot(&record.id, name)?;
            let mut out = Out::new();
            out.line(name)?;
            out.flush()
        })
    }
}
