//! `kiln wait`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend;

use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Wait until instances do not run, and print their exit codes
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        context::each(&self.instances, |name| {
            let record = context.instance(&instances, name)?;
            let status = instances.wait(&record.id)?;
            let mut out = Out::new();
            out.line(status.code.to_string())?;
            out.flush()
        })
    }
}
