//! `kiln volume create`.

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;
use crate::resolve::{check_name, label_map};

/// Make a volume, and print its name
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name; a random one otherwise
    name: Option<String>,
    /// Add a label
    #[arg(short, long, value_name = "NAME=VALUE")]
    label: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        if let Some(name) = &self.name {
            check_name("NAME", name)?;
        }
        let labels = label_map("--label", &self.label)?;
        let volume = context.volumes()?.create(self.name.as_deref(), &labels)?;
        let mut out = Out::new();
        out.line(volume.name)?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
