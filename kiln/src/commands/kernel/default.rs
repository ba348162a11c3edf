//! `kiln kernel default`.

use clap_complete::engine::ArgValueCompleter;
use kiln_boot::Kernels;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Choose the kernel that machines boot if none is named, or print which one that is
///
/// Unless one was chosen, it is the newest.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The name of the one to choose
    #[arg(value_name = "KERNEL", add = ArgValueCompleter::new(complete::kernels))]
    kernel: Option<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let kernels = Kernels::open(context.home());
        let kernel = match &self.kernel {
            Some(name) => kernels.set_default(name)?,
            None => kernels.default()?,
        };
        let mut out = Out::new();
        out.line(kernel.name())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
