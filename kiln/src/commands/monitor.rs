//! `kiln monitor`, which Kiln itself calls.

use kiln_contract::InstanceId;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Run below a machine until it ends (started by Kiln itself)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The instance
    id: InstanceId,
    /// The number of the descriptor of a socket to the supervisor
    socket: i32,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        Ok(Exit(kiln_machine::monitor(context.home(), &self.id, self.socket)?))
    }
}
