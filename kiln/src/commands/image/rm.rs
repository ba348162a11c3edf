//! `kiln image rm`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend;

use crate::complete;
use crate::context::{self, Context};
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Remove names of images, or by their id images with all their names
///
/// The space is given back by `kiln system prune`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE", add = ArgValueCompleter::new(complete::images))]
    images: Vec<String>,
    /// Also those that instances were made from, or that have several names; those that do not exist are no error
    #[arg(short, long)]
    force: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let store = context.store()?;
        context::each(&self.images, |text| {
            let image = match context.image(&store, text) {
                Err(_) if self.force => return Ok(()),
                other => other?,
            };
            if !self.force {
                let users = instances.list()?.into_iter().filter(|record| record.spec.image_id == image.id);
                let users: Vec<String> = users.map(|record| record.spec.name).collect();
                if !users.is_empty() {
                    let users = users.join(", ");
                    return Err(CliError::failed(format!("the image `{text}` is in use by {users}"))
                        .with_hint("remove these instances first, or take the name away with --force"));
                }
            }
            let mut out = Out::new();
            for name in store.remove_image(text, self.force)? {
                out.line(name)?;
            }
            out.flush()
        })
    }
}
