//! `kiln commit`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{CommitOptions, RuntimeBackend};

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Make an image of an instance's changes, and print its id
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// A name for the image
    image: Option<String>,
    /// What the change is for
    #[arg(short, long, default_value = "", hide_default_value = true)]
    message: String,
    /// Who made it
    #[arg(short, long, default_value = "", hide_default_value = true)]
    author: String,
    /// Change the image's config with a Dockerfile instruction (`CMD ["sh"]`, `ENV A=1`)
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,
    /// Whether the instance is suspended meanwhile
    #[arg(
        short, long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", action = clap::ArgAction::Set
    )]
    pause: bool,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        let options = CommitOptions {
            tags: self.image.into_iter().collect(),
            message: self.message,
            author: self.author,
            changes: self.change,
            pause: self.pause,
        };
        let id = instances.commit(&record.id, &options)?;
        let mut out = Out::new();
        out.line(id.to_string())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
