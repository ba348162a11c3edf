//! `kiln kernel build`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use kiln_boot::Source;

use super::New;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Build a small kernel for machines and install it, and print its name
///
/// It has all that machines and container engines in them need, no modules, and no drivers of real hardware, and boots
/// much faster than a distribution's. Building takes a compiler, some minutes and 2 GB on disk.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Build so many files at a time; as many as there are processors otherwise
    #[arg(short, long, value_name = "NUMBER")]
    jobs: Option<NonZeroUsize>,
    /// The source of Linux: a directory, a tar, or a Debian package of one; Debian's linux-source otherwise
    #[arg(long, value_name = "PATH")]
    source: Option<PathBuf>,
    #[command(flatten)]
    new: New,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        self.new.install(context, &[Source::Build { source: self.source, jobs: self.jobs }])
    }
}
