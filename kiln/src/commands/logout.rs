//! `kiln logout`.

use kiln_registry::Registry;

use super::RegistryArgs;
use super::login::eprint;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Forget the password for a registry
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The registry
    #[arg(default_value = "docker.io")]
    registry: String,
    #[command(flatten)]
    options: RegistryArgs,
}

impl Args {
    pub(crate) fn run(self, _context: &Context) -> Result<Exit> {
        let found = Registry::new(self.options.config())?.logout(&self.registry)?;
        eprint(&if found {
            format!("forgot the password for {}", self.registry)
        } else {
            format!("there was no password for {}", self.registry)
        });
        Ok(Exit::SUCCESS)
    }
}
