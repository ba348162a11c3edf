//! `kiln volume rm`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::ErrorKind;

use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Remove volumes that no instance uses, with all that is in them
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names
    #[arg(required = true, value_name = "VOLUME", add = ArgValueCompleter::new(complete::volumes))]
    volumes: Vec<String>,
    /// Those that do not exist are no error
    #[arg(short, long)]
    force: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let volumes = context.volumes()?;
        context::each(&self.volumes, |name| {
            match volumes.remove(name) {
                Err(error) if self.force && error.kind() == ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
            let mut out = Out::new();
            out.line(name)?;
            out.flush()
        })
    }
}
