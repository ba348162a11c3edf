//! `kiln image export`.

use std::path::{Path, PathBuf};

use clap_complete::engine::ArgValueCompleter;
use kiln_store::ImageName;

use super::import::ArchiveFormat;
use super::push::Compression;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::progress;

/// Write images to a file, a directory or standard output
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE", add = ArgValueCompleter::new(complete::images))]
    images: Vec<String>,
    /// Where to; `-` is standard output
    #[arg(short, long, value_name = "PATH", default_value = "-")]
    output: PathBuf,
    /// The form
    #[arg(long, value_name = "FORMAT", default_value = "oci-archive")]
    format: ArchiveFormat,
    /// How layers are compressed
    #[arg(long, value_name = "COMPRESSION", default_value = "none")]
    compression: Compression,
    /// Show nothing meanwhile
    #[arg(short, long)]
    quiet: bool,
}

impl Args {
    /// What `kiln save` means.
    pub(super) fn docker(images: Vec<String>, output: PathBuf) -> Self {
        Self {
            images,
            output,
            format: ArchiveFormat::DockerArchive,
            compression: Compression::None,
            quiet: true,
        }
    }

    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        refuse_terminal(&self.output)?;
        let store = context.store()?;
        let mut images = Vec::new();
        for text in &self.images {
            let image = context.image(&store, text)?;
            let image = context.whole(&store, image, kiln_registry::Config::default(), self.quiet)?;
            // An id, or a name from the past, is no name to give the copy.
            let name = ImageName::parse(text).ok();
            let name = name.filter(|name| {
                name.digest.is_none() && store.tag_history(name).is_ok_and(|all| !all.is_empty())
            });
            images.push((name, image));
        }
        let progress = progress::new(self.quiet);
        kiln_registry::export(
            &store,
            &images,
            self.format.into(),
            &self.output,
            self.compression.into(),
            &*progress,
        )?;
        Ok(Exit::SUCCESS)
    }
}

/// An archive on a terminal helps nobody.
fn refuse_terminal(output: &Path) -> Result<()> {
    use std::io::IsTerminal;
    if output == Path::new("-") && std::io::stdout().is_terminal() {
        return Err(crate::error::CliError::usage(
            "standard output is a terminal, and an archive is not text",
        )
        .with_hint("give --output FILE, or redirect it"));
    }
    Ok(())
}
