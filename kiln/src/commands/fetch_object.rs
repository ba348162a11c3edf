//! `kiln fetch-object`, which Kiln itself calls.

use kiln_contract::Digest;
use kiln_registry::Registry;

use crate::commands::RegistryArgs;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::progress;

/// Bring an object that is missing or damaged into the store, from where its image came from (started by Kiln itself)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which
    object: Digest,
    #[command(flatten)]
    registry: RegistryArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let (registry, progress) = (Registry::new(self.registry.config())?, progress::new(true));
        store.fetch_object(&self.object, &registry.repair(&store, &*progress))?;
        Ok(Exit::SUCCESS)
    }
}
