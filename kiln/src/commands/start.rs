//! `kiln start`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{RuntimeBackend, StartMode};

use super::run::ended;
use crate::complete;
use crate::context::{self, Context};
use crate::error::{CliError, Result};
use crate::exit::Exit;

/// Start instances that do not run
///
/// With --attach, the exit code is the workload's own.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
    /// Stay with it: show what it writes, pass signals on
    #[arg(short, long)]
    attach: bool,
    /// Stay with it, and send it standard input (if it was created with --interactive)
    #[arg(short, long)]
    interactive: bool,
    /// Boot machines from their disks: what was saved of their memory is forgotten
    #[arg(long)]
    cold: bool,
    /// The key sequence that detaches from it; empty: none
    #[arg(long, value_name = "KEYS", default_value = super::DETACH_KEYS)]
    detach_keys: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        if !self.attach && !self.interactive {
            return context.each_instance(&self.instances, |instances, id| {
                if self.cold {
                    instances.machines().boot_next(id)?;
                }
                instances.start(id, StartMode::Detached)?;
                Ok(())
            });
        }
        let [name] = &self.instances[..] else {
            return Err(CliError::usage("--attach and --interactive take one instance only"));
        };
        let instances = context.instances()?;
        let record = context.instance(&instances, name)?;
        if self.cold {
            instances.machines().boot_next(&record.id)?;
        }
        let mut stdio = context::stdio()?;
        if !self.interactive {
            let null = std::fs::File::open("/dev/null");
            stdio.stdin = null.map_err(|error| CliError::file("cannot open /dev/null", error))?.into();
        }
        let mode = StartMode::Foreground { stdio, detach_keys: self.detach_keys, signal_proxy: true };
        Ok(instances.start(&record.id, mode)?.map_or(Exit::SUCCESS, |status| ended(&status)))
    }
}
