//! `kiln template rm`.

use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Remove templates; they are made again when they are needed
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Ids, or how they begin
    #[arg(required = true, value_name = "TEMPLATE")]
    templates: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        context.instances()?;
        context::each(&self.templates, |id| {
            kiln_machine::remove_template(context.home(), id)?;
            let mut out = Out::new();
            out.line(id)?;
            out.flush()
        })
    }
}
