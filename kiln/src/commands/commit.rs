//! `kiln commit`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{CommitOptions, RuntimeBackend};

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// What of changes becomes an image, and what is said of it.
#[derive(Debug, clap::Args)]
pub(super) struct ImageArgs {
    /// What the change is for
    #[arg(short, long, default_value = "", hide_default_value = true)]
    message: String,
    /// Who made it
    #[arg(short, long, default_value = "", hide_default_value = true)]
    author: String,
    /// Change the image's config with a Dockerfile instruction (`CMD ["sh"]`, `ENV A=1`)
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,
    /// Make an image of the new layer alone, to be put over others (`A+B`)
    #[arg(long = "layer")]
    layer_only: bool,
    /// Make an image of the layers below and the new one: what happens anyway
    #[arg(long = "image", conflicts_with = "layer_only")]
    whole: bool,
    /// Take only what a pattern of paths fits: `opt/tool`, `usr/**/*.so`
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Leave out what a pattern of paths fits: `tmp`, `**/*.pyc`
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Hide what lies at a path in the layers below, and leave out what was changed there
    #[arg(long, value_name = "PATH")]
    mask: Vec<String>,
}

impl ImageArgs {
    pub(super) fn options(self, tags: Vec<String>) -> CommitOptions {
        CommitOptions {
            tags,
            message: self.message,
            author: self.author,
            changes: self.change,
            pause: false,
            layer_only: self.layer_only,
            include: self.include,
            exclude: self.exclude,
            masks: self.mask,
        }
    }
}

/// Make an image of an instance's changes, and print its id
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// A name for the image
    image: Option<String>,
    #[command(flatten)]
    image_args: ImageArgs,
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
        let options =
            CommitOptions { pause: self.pause, ..self.image_args.options(self.image.into_iter().collect()) };
        let id = instances.commit(&record.id, &options)?;
        let mut out = Out::new();
        out.line(id.to_string())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
