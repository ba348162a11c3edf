//! `kiln fs commit`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::CommitOptions;
use kiln_view::views::Views;

use super::find_view;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;

/// Make an image of what a view shows, and print its id
///
/// The image has the view's layers and one more, with what was changed. The view goes on as it is.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The view's name; that in which this runs otherwise
    #[arg(add = ArgValueCompleter::new(complete::views))]
    view: Option<String>,
    /// A name for the image
    #[arg(short, long, value_name = "NAME")]
    tag: Vec<String>,
    /// What the change is for
    #[arg(short, long, default_value = "", hide_default_value = true)]
    message: String,
    /// Who made it
    #[arg(short, long, default_value = "", hide_default_value = true)]
    author: String,
    /// Change the image's config with a Dockerfile instruction (`CMD ["sh"]`, `ENV A=1`)
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        let record = find_view(&views, self.view.as_deref())?;
        let options = CommitOptions {
            tags: self.tag,
            message: self.message,
            author: self.author,
            changes: self.change,
            pause: false,
        };
        let id = views.commit(&record, &options)?;
        let mut out = Out::new();
        out.line(id.to_string())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
