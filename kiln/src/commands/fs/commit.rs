//! `kiln fs commit`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{BackendError, CommitOptions, Digest};
use kiln_registry::Config;
use kiln_store::{Changes, CommitRequest};
use kiln_view::views::Views;

use super::{find_view, whole_stack};
use crate::commands::commit::ImageArgs;
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// Make an image of what a view shows, and print its id
///
/// The image has the view's layers and one more, with what was changed. The view goes on as it is. With --from, the layer
/// is made of a directory or a tar instead. If SOURCE_DATE_EPOCH is set, no time in the image is later than that many
/// seconds since 1970.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The view's name; that in which this runs otherwise
    #[arg(add = ArgValueCompleter::new(complete::views))]
    view: Option<String>,
    /// Make the layer of a directory or a tar, which may be compressed; `-` is a tar on standard input
    #[arg(long, value_name = "DIR|TAR", conflicts_with = "view")]
    from: Option<PathBuf>,
    /// Put what --from names on top of an image
    #[arg(long, value_name = "IMAGE", requires = "from", add = ArgValueCompleter::new(complete::images))]
    onto: Option<String>,
    /// A name for the image
    #[arg(short, long, value_name = "NAME")]
    tag: Vec<String>,
    #[command(flatten)]
    image: ImageArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let options = self.image.options(self.tag);
        let id = match &self.from {
            Some(from) => commit_from(context, from, self.onto.as_deref(), &options)?,
            None => {
                let views = Views::open(context.home());
                let record = find_view(&views, self.view.as_deref())?;
                context.whole_layers(&context.store()?, &record.layers, &Config::default())?;
                views.commit(&record, &options)?
            }
        };
        let mut out = Out::new();
        out.line(id.to_string())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}

fn commit_from(
    context: &Context,
    from: &Path,
    onto: Option<&str>,
    options: &CommitOptions,
) -> Result<Digest> {
    let store = context.store()?;
    let base = onto.map(|onto| whole_stack(context, &store, onto)).transpose()?;
    let name = from.display().to_string();
    let request = CommitRequest {
        name: &name,
        image: base.as_ref().map(|base| base.image),
        layers: base.as_ref().map_or(&[], |base| &base.layers),
        command: &["kiln".to_owned(), "fs".to_owned(), "commit".to_owned(), "--from".to_owned()],
        options,
    };
    let failed = |error| CliError::file(format!("cannot read {name}"), error);
    let mut tar: Box<dyn Read + Send>;
    let changes = if from == Path::new("-") {
        tar = kiln_registry::decompress(std::io::stdin()).map_err(failed)?.1;
        Changes::Tar(&mut *tar)
    } else if std::fs::metadata(from).map_err(failed)?.is_dir() {
        Changes::Directory(from)
    } else {
        tar = kiln_registry::decompress(File::open(from).map_err(failed)?).map_err(failed)?.1;
        Changes::Tar(&mut *tar)
    };
    Ok(store.commit(&request, changes).map_err(BackendError::from)?.id)
}
