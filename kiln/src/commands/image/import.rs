//! `kiln image import`.

use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

use clap::ValueEnum;
use kiln_contract::Platform;

use super::image_name;
use crate::commands::LayerLimitArgs;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;
use crate::progress;

/// Take images from a file, a directory or standard input, and print their names or ids
///
/// The source is an OCI layout, an oci-archive, a docker-archive, or a plain root filesystem (a directory or a tar);
/// compressed files too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where it is; `-` is standard input
    source: PathBuf,
    /// The name for an image that has none of its own
    image: Option<String>,
    /// What it is; found out otherwise
    #[arg(long, value_name = "FORMAT")]
    format: Option<ArchiveFormat>,
    /// Take the image made for this platform (os/arch[/variant])
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,
    /// Show nothing meanwhile
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    limits: LayerLimitArgs,
}

/// A form in which images are outside of registries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ArchiveFormat {
    /// A directory (OCI image-layout)
    #[value(alias = "oci")]
    OciLayout,
    /// The same in a tar
    OciArchive,
    /// What `docker save` writes
    DockerArchive,
    /// A directory or a tar of files
    Rootfs,
}

impl From<ArchiveFormat> for kiln_registry::Format {
    fn from(format: ArchiveFormat) -> Self {
        match format {
            ArchiveFormat::OciLayout => Self::OciLayout,
            ArchiveFormat::OciArchive => Self::OciArchive,
            ArchiveFormat::DockerArchive => Self::DockerArchive,
            ArchiveFormat::Rootfs => Self::Rootfs,
        }
    }
}

impl Args {
    /// What `kiln load` means.
    pub(super) fn docker(source: PathBuf, quiet: bool, limits: LayerLimitArgs) -> Self {
        Self { source, image: None, format: None, platform: None, quiet, limits }
    }

    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let name = self.image.as_deref().map(image_name).transpose()?;
        if self.source.as_os_str() == "-" {
            expect_input()?;
        }
        let store = context.store()?;
        let progress = progress::new(self.quiet);
        let images = kiln_registry::import(
            &store,
            &self.source,
            self.format.map(Into::into),
            name.as_ref(),
            self.platform.as_ref(),
            self.limits.limits(),
            &*progress,
        )?;
        let mut out = Out::new();
        for (name, image) in images {
            out.line(name.map_or_else(|| image.id.to_string(), |name| name.familiar()))?;
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}

/// Nothing at all is no archive, although a tar may end at once. What is looked at here is still there for the reader.
fn expect_input() -> Result<()> {
    let missing = |what: &str| {
        Err(CliError::failed(what).with_hint("for example: docker save IMAGE | kiln image import -"))
    };
    let mut stdin = io::stdin().lock();
    if stdin.is_terminal() {
        return missing("standard input is a terminal, and an archive is not text");
    }
    match stdin.fill_buf() {
        Ok([]) => missing("there is nothing on standard input"),
        Ok(_) => Ok(()),
        Err(error) => Err(CliError::file("cannot read standard input", error)),
    }
}
