//! `kiln image pull`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{ByteSize, Platform};
use kiln_registry::{PullOptions, PullPolicy, Registry};

use super::image_name;
use crate::commands::{LayerLimitArgs, RegistryArgs};
use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;
use crate::progress;

/// Take images from a registry, and print their ids
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names
    #[arg(required = true, value_name = "IMAGE", add = ArgValueCompleter::new(complete::images))]
    images: Vec<String>,
    /// Take the image made for this platform (os/arch[/variant])
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,
    /// How many layers are taken at once
    #[arg(long, value_name = "NUMBER")]
    parallel: Option<usize>,
    /// Take only what their trees take; files come when they are opened in a view
    ///
    /// That can be done with layers of zstd:chunked; others are taken whole. Without it, an image that was taken so is made
    /// whole.
    #[arg(long)]
    lazy: bool,
    /// Show nothing while pulling
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    limits: LayerLimitArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let store = context.store()?;
        let registry = Registry::new(self.registry.config())?;
        let options = PullOptions {
            platform: self.platform,
            policy: PullPolicy::Always,
            limits: self.limits.limits(),
            parallel: self.parallel,
            lazy: self.lazy,
        };
        context::each(&self.images, |text| {
            let name = image_name(text)?;
            let progress = progress::new(self.quiet);
            let pulled = registry.pull(&store, &name, &options, &*progress)?;
            if pulled.up_to_date {
                progress.note(&format!("{} is up to date", name.familiar()));
            } else {
                let (layers, bytes) = (pulled.layers_pulled, ByteSize(pulled.bytes));
                let lazy = match pulled.layers_lazy {
                    0 => String::new(),
                    count => format!(", of {count} more only the trees"),
                };
                progress.note(&format!("pulled {}: {layers} layers{lazy}, {bytes}", name.familiar()));
            }
            let mut out = Out::new();
            out.line(pulled.image.id.to_string())?;
            out.flush()
        })
    }
}
