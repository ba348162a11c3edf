//! `kiln resize`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ByteSize, RuntimeBackend as _};

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Give a machine a larger disk, while it runs or not
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  kiln resize dev --disk 40G")]
pub(crate) struct Args {
    /// The machine
    #[arg(value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// The size that its writable disk should have; it cannot shrink
    #[arg(long, value_name = "SIZE", required = true)]
    disk: ByteSize,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        instances.resize(&record.id, self.disk.bytes())?;
        let mut out = Out::new();
        out.line(&self.instance)?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
