//! `kiln kernel rm`.

use clap_complete::engine::ArgValueCompleter;
use kiln_boot::Kernels;

use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Remove kernels
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names
    #[arg(required = true, value_name = "KERNEL", add = ArgValueCompleter::new(complete::kernels))]
    kernels: Vec<String>,
    /// The default one too
    #[arg(short, long)]
    force: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let kernels = Kernels::open(context.home());
        context::each(&self.kernels, |name| {
            kernels.remove(name, self.force)?;
            let mut out = Out::new();
            out.line(name)?;
            out.flush()
        })
    }
}
