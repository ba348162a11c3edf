//! `kiln update`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ByteSize, CpuLimit, RestartPolicy, RuntimeBackend as _, Update};

use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;

/// Change what instances are given from their next start on
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln update --cpus 2 --memory 2g dev\n  kiln update --restart always web"
)]
pub(crate) struct Args {
    /// Instances, which must not run
    #[arg(required = true, value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
    /// Processors; a machine gets whole ones
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<CpuLimit>,
    /// Memory
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// The kernel of machines
    #[arg(long, value_name = "KERNEL", add = ArgValueCompleter::new(complete::kernels))]
    kernel: Option<String>,
    /// What happens when they end: no, always, unless-stopped, on-failure[:TIMES]
    #[arg(long, value_name = "POLICY")]
    restart: Option<RestartPolicy>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let update =
            Update { cpus: self.cpus, memory: self.memory, kernel: self.kernel, restart: self.restart };
        if update == Update::default() {
            return Err(CliError::usage("nothing is to be changed")
                .with_hint("give --cpus, --memory, --kernel or --restart"));
        }
        context.each_instance(&self.instances, |instances, id| Ok(instances.update(id, &update).map(drop)?))
    }
}
