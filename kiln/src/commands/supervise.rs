//! `kiln supervise`, which Kiln itself calls.

use kiln_contract::InstanceId;

use crate::backends::KINDS;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Own a running instance until it ends (started by Kiln itself)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The instance
    id: InstanceId,
    /// The number of the descriptor that takes one line of JSON when the instance runs or has failed
    ready: i32,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        kiln_instance::supervise(context.home(), &self.id, self.ready, KINDS)?;
        Ok(Exit::SUCCESS)
    }
}
