//! `kiln image push`.

use clap::ValueEnum;
use clap_complete::engine::ArgValueCompleter;
use kiln_contract::ByteSize;
use kiln_registry::{PushOptions, Registry};

use super::image_name;
use crate::commands::RegistryArgs;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;
use crate::progress;

/// Give an image to a registry, and print the digest of its manifest
///
/// Only what the registry lacks is sent.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: String,
    /// The name that it gets there; its own otherwise
    destination: Option<String>,
    /// How layers are compressed that are not compressed yet
    ///
    /// Of zstd:chunked, views can be made before all of it is pulled; with it, layers that the registry has in another form are
    /// sent in this one, too.
    #[arg(long, value_name = "COMPRESSION", default_value = "gzip")]
    compression: Packing,
    /// How many layers are sent at once
    #[arg(long, value_name = "NUMBER")]
    parallel: Option<usize>,
    /// Show nothing while pushing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// How layers are compressed for a registry.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Packing {
    Gzip,
    Zstd,
    /// Zstd, and each file can be had alone
    #[value(name = "zstd:chunked")]
    Chunked,
    None,
}

impl From<Packing> for kiln_registry::Packing {
    fn from(packing: Packing) -> Self {
        match packing {
            Packing::Gzip => Self::Stream(kiln_registry::Compression::Gzip),
            Packing::Zstd => Self::Stream(kiln_registry::Compression::Zstd),
            Packing::None => Self::Stream(kiln_registry::Compression::None),
            Packing::Chunked => Self::Chunked,
        }
    }
}

/// How layers are compressed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Compression {
    Gzip,
    Zstd,
    None,
}

impl From<Compression> for kiln_registry::Compression {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::Gzip => Self::Gzip,
            Compression::Zstd => Self::Zstd,
            Compression::None => Self::None,
        }
    }
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let to = image_name(self.destination.as_deref().unwrap_or(&self.image))?;
        let store = context.store()?;
        let image = context.image(&store, &self.image)?;
        let image = context.whole(&store, image, self.registry.config(), self.quiet)?;
        let registry = Registry::new(self.registry.config())?;
        let options = PushOptions { packing: self.compression.into(), parallel: self.parallel };
        let progress = progress::new(self.quiet);
        let pushed = registry.push(&store, &image, &to, &options, &*progress)?;
        progress.note(&format!(
            "pushed {}: {} layers sent ({}), {} mounted, {} there already",
            to.familiar(),
            pushed.layers_pushed,
            ByteSize(pushed.bytes),
            pushed.layers_mounted,
            pushed.layers_present,
        ));
        let mut out = Out::new();
        out.line(pushed.manifest.to_string())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
