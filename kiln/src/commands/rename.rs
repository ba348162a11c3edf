//! `kiln rename`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::resolve::check_name;

/// Give an instance another name
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// The new name
    new_name: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        check_name("NEW_NAME", &self.new_name)?;
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        instances.rename(&record.id, &self.new_name)?;
        Ok(Exit::SUCCESS)
    }
}
