//! `kiln fs reset`.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use clap_complete::engine::ArgValueCompleter;
use kiln_view::views::{Alteration, ViewRecord, Views};

use super::find_view;
use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;

/// Take back what was changed in a view: everything, or some files and directories
///
/// Files that are open stay open; a directory comes back with everything in it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln fs reset\n  kiln fs reset /kiln/etc/app.conf\n  kiln fs reset --view work /etc /usr/bin/tool"
)]
pub(crate) struct Args {
    /// Paths, as they are seen or as `kiln fs diff` tells them
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// The view's name; that in which this runs otherwise
    #[arg(long, value_name = "NAME", add = ArgValueCompleter::new(complete::views))]
    view: Option<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        let record = find_view(&views, self.view.as_deref())?;
        let paths = self.paths.iter().map(|path| in_view(path, &record).as_os_str().as_bytes().to_vec());
        views.alter(&record, &Alteration::Reset(paths.collect()))?;
        Ok(Exit::SUCCESS)
    }
}

/// A path from the root of the view on.
fn in_view(path: &Path, record: &ViewRecord) -> PathBuf {
    let below = |path: &Path| path.strip_prefix(&record.at).ok().map(Path::to_owned);
    let seen = std::env::current_dir().ok().and_then(|working| below(&working.join(path)));
    below(path).or(seen).unwrap_or_else(|| path.to_owned())
}
