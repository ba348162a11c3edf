//! `kiln ssh-proxy`, which SSH clients call.

use std::path::PathBuf;

use kiln_contract::InstanceId;

use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;

/// Carry an SSH client's connection to a machine (called by ssh itself)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The machine
    id: InstanceId,
    /// A file of public keys that may enter too
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        instances.machines().ssh_proxy(&self.id, &self.key, context::stdio()?)?;
        Ok(Exit::SUCCESS)
    }
}
