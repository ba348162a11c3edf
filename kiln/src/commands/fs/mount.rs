//! `kiln fs mount` and `kiln fs unmount`.

use clap_complete::engine::ArgValueCompleter;
use kiln_view::router::Client;
use kiln_view::views::Backend;

use super::run::{ViewArgs, create};
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Show an image, or several as one, to a process that runs already, and print the view's name
///
/// The process and all that descend from it see it, by the router; it goes when they have ended.
#[derive(Debug, clap::Args)]
pub(crate) struct MountArgs {
    /// The process
    #[arg(value_name = "PID")]
    pid: u32,
    /// What is to be seen; of several, joined by `+`, later ones lie over earlier ones
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    #[command(flatten)]
    view: ViewArgs,
}

impl MountArgs {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let view = create(context, &self.reference, &self.view, Some(Backend::Router), None, &[])?;
        let name = view.record().name.clone();
        view.show_to(self.pid)?;
        let mut out = Out::new();
        out.line(name)?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}

/// Take from a process the views that were shown to it, and print those that nobody sees any more
#[derive(Debug, clap::Args)]
pub(crate) struct UnmountArgs {
    /// The process
    #[arg(value_name = "PID")]
    pid: u32,
}

impl UnmountArgs {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let mut client = Client::connect(context.home())?
            .ok_or_else(|| CliError::failed("no view is shown by the router: its service does not run"))?;
        let mut out = Out::new();
        for name in client.unmount_process(self.pid)? {
            out.line(name)?;
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
