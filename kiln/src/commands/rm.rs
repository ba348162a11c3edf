//! `kiln rm`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ErrorKind, InstanceStatus, RemoveOptions, RuntimeBackend};

use crate::complete;
use crate::context::{self, Context};
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Remove instances, with all that they left
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required_unless_present = "exited", value_name = "INSTANCE", add = ArgValueCompleter::new(complete::instances))]
    instances: Vec<String>,
    /// Kill those that run; those that do not exist are no error
    #[arg(short, long)]
    force: bool,
    /// Remove their anonymous volumes too
    #[arg(short, long)]
    volumes: bool,
    /// All that do not run
    #[arg(long, conflicts_with = "instances")]
    exited: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let options = RemoveOptions { force: self.force, volumes: self.volumes };
        let names = if self.exited {
            let idle = |status| matches!(status, InstanceStatus::Created | InstanceStatus::Exited);
            let all = instances.list()?.into_iter().filter(|record| idle(record.status));
            all.map(|record| record.spec.name).collect()
        } else {
            self.instances
        };
        context::each(&names, |name| {
            let found = context.instance(&instances, name);
            let record = match found {
                Err(error) if self.force && error.kind() == Some(ErrorKind::NotFound) => return Ok(()),
                other => other?,
            };
            instances.remove(&record.id, options).map_err(|error| {
                let running = error.kind() == ErrorKind::State && error.hint_text().is_none();
                let error = CliError::from(error);
                if running {
                    error.with_hint("stop it first, or kill and remove it with --force")
                } else {
                    error
                }
            })?;
            let mut out = Out::new();
            out.line(name)?;
            out.flush()
        })
    }
}
