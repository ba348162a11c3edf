//! `kiln fs run`, and the entering of views for `shell` too.

use std::path::PathBuf;

use clap::ValueEnum;
use clap_complete::engine::ArgValueCompleter;
use kiln_contract::ErrorKind;
use kiln_registry::{Config, PullOptions, PullPolicy, Registry};
use kiln_store::{ImageName, Store, StoreError};
use kiln_view::Fetcher;
use kiln_view::views::{Backend, NewView, View, Views};

use super::{ended, fetcher, stack};
use crate::commands::RegistryArgs;
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::{self, Exit};
use crate::progress;
use crate::resolve::random_name;

/// Run a command that sees an image, or several as one, at a path
///
/// Only the command and what it starts see it. With --edit they may change everything; `kiln fs commit` keeps what was
/// changed. `$KILN_VIEW` names the view. REF may be a file, ./tools.yaml: a list of such names, or a live layer, which shows
/// files of this host in the view. Shell scripts in the view at etc/kiln/startup.d/*.sh are sourced before the command.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The exit code is the command's own; 125 if Kiln failed, 126 if the command cannot be executed, 127 if it is\nnot there.\n\nExamples:\n  kiln fs run me/tools:1 -- /kiln/bin/make\n  kiln fs run me/base+me/compiler+me/libs --edit --at /opt/env -- sh\n  kiln fs run ./environment.yaml --annotation ticket=42 -- make"
)]
pub(crate) struct Args {
    /// What is to be seen; of several, joined by `+`, later ones lie over earlier ones
    #[arg(value_name = "REF[+REF…]", required_unless_present = "rerun", add = ArgValueCompleter::new(complete::images))]
    reference: Option<String>,
    #[command(flatten)]
    view: ViewArgs,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    pulling: PullArgs,
    /// Enter a kept view again, with what was changed in it
    #[arg(long, value_name = "NAME", conflicts_with_all = ["reference", "name", "edit", "keep", "at", "backend", "pull"])]
    rerun: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// How it is to be seen.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ViewArgs {
    /// It may be changed
    #[arg(short, long)]
    edit: bool,
    /// The directory where it is seen
    #[arg(long, value_name = "PATH", default_value = "/kiln")]
    at: PathBuf,
    /// The view and what was changed in it stay when nobody is in it any more
    #[arg(long)]
    keep: bool,
    /// A name for the view; a random one otherwise
    #[arg(long)]
    name: Option<String>,
    /// Remember this of it: `kiln fs info` tells it
    #[arg(long = "annotation", value_name = "KEY=VALUE", value_parser = annotation)]
    annotations: Vec<(String, String)>,
}

/// By what it is to be shown.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct BackendArgs {
    /// How it is shown: by the kernel's overlay, by a FUSE server, or by one FUSE mount for all views
    #[arg(long, default_value = "auto")]
    backend: Choice,
}

/// What may be asked of registries.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PullArgs {
    /// When images are pulled
    #[arg(long, value_name = "POLICY", default_value = "never")]
    pull: Pull,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// When the images of a view are pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pull {
    /// What is not in the store is an error
    Never,
    /// What is not in the store
    Missing,
    /// Of what is not in the store only what the trees take: files come when they are opened
    Lazy,
    /// Always
    Always,
}

/// Which back end is to show a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// The overlay for root, FUSE for others
    Auto,
    /// The kernel's overlay
    Overlay,
    /// A FUSE server
    Fuse,
    /// One FUSE mount in which each process tree sees its own
    Router,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match (&self.rerun, &self.reference) {
            (Some(name), _) => {
                let views = Views::open(context.home()).fetching(fetcher_as(context, Some(&self.pulling))?);
                let view = views.reopen(name, self.command.clone())?;
                run_in(&views, view, &self.command)
            }
            (None, Some(reference)) => {
                run_new(context, reference, &self.view, &self.backend, &self.pulling, &self.command)
            }
            (None, None) => Err(CliError::usage("there is nothing to be seen")),
        }
    }
}

/// Makes a view and runs a command in it.
pub(super) fn run_new(
    context: &Context,
    reference: &str,
    args: &ViewArgs,
    backend: &BackendArgs,
    pulling: &PullArgs,
    command: &[String],
) -> Result<Exit> {
    let backend = match backend.backend {
        Choice::Auto => None,
        Choice::Overlay => Some(Backend::Overlay),
        Choice::Fuse => Some(Backend::Fuse),
        Choice::Router => Some(Backend::Router),
    };
    let view = create(context, reference, args, backend, Some(pulling), command)?;
    run_in(&Views::open(context.home()), view, command)
}

/// What brings objects that are missing, asking registries as the user said.
fn fetcher_as(context: &Context, pulling: Option<&PullArgs>) -> Result<Fetcher> {
    let mut fetcher = fetcher(context)?;
    if let Some(pulling) = pulling {
        fetcher.arguments.extend(pulling.registry.to_arguments());
    }
    Ok(fetcher)
}

/// Makes a view that nobody is in yet.
pub(super) fn create(
    context: &Context,
    reference: &str,
    args: &ViewArgs,
    backend: Option<Backend>,
    pulling: Option<&PullArgs>,
    command: &[String],
) -> Result<View> {
    let views = Views::open(context.home()).fetching(fetcher_as(context, pulling)?);
    // What was killed is cleaned up by who comes next; what cannot be is no reason not to go on.
    if let Err(error) = views.prune(false) {
        tracing::warn!(%error, "a view that nobody uses cannot be removed");
    }
    let store = context.store()?;
    if let Some(pulling) = pulling {
        pull(context, &store, reference, pulling)?;
    }
    let mut stack = stack(&store, reference)?;
    let mut backend = backend;
    if stack.is_partial {
        match backend {
            // It shows files as they are; nobody can fetch one meanwhile.
            Some(Backend::Overlay) => {
                progress::new(false).note("the overlay shows only what is here: all of it is pulled");
                let config = pulling.map_or_else(Config::default, |pulling| pulling.registry.config());
                context.whole_layers(&store, &stack.layers, &config)?;
                stack = super::stack(&store, reference)?;
            }
            None => backend = Some(Backend::Fuse),
            Some(Backend::Fuse | Backend::Router) => {}
        }
    }
    drop(store);
    let at = std::path::absolute(&args.at)
        .map_err(|error| CliError::file(format!("cannot use --at {}", args.at.display()), error))?;
    let new = NewView {
        name: String::new(),
        reference: reference.to_owned(),
        image: stack.image,
        layers: stack.layers,
        at,
        backend,
        editable: args.edit,
        keep: args.keep,
        command: command.to_vec(),
        binds: stack.binds,
        annotations: args.annotations.iter().cloned().collect(),
    };
    let mut attempt = 0;
    loop {
        let name = args.name.clone().unwrap_or_else(|| random_name(attempt));
        match views.create(NewView { name, ..new.clone() }) {
            // A random name that is taken: another one.
            Err(error) if error.kind() == ErrorKind::Conflict && args.name.is_none() && attempt < 8 => {
                attempt += 1;
            }
            other => break Ok(other?),
        }
    }
}

/// Pulls what the parts of a reference name, as far as that is wanted. What files name must be there.
fn pull(context: &Context, store: &Store, reference: &str, pulling: &PullArgs) -> Result<()> {
    if pulling.pull == Pull::Never {
        return Ok(());
    }
    let config = pulling.registry.config();
    for part in reference.split('+') {
        let Some(name) = ImageName::parse(part).ok().filter(|_| !kiln_view::Stack::is_file(part)) else {
            continue;
        };
        match store.resolve(part) {
            Ok(_) if pulling.pull == Pull::Lazy => continue,
            Ok(image) if pulling.pull == Pull::Missing => {
                context.whole(store, image, config.clone(), false)?;
                continue;
            }
            // What lacks something in the store is pulled as if it were not there.
            Ok(_) | Err(StoreError::NotFound { .. } | StoreError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let options = PullOptions {
            policy: PullPolicy::Always,
            lazy: pulling.pull == Pull::Lazy,
            ..PullOptions::default()
        };
        let progress = progress::new(false);
        progress.note(&format!("pulling {}", name.familiar()));
        Registry::new(config.clone())?.pull(store, &name, &options, &*progress)?;
    }
    Ok(())
}

/// What `--annotation` takes.
fn annotation(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("an annotation is KEY=VALUE".to_owned()),
    }
}

fn run_in(views: &Views, mut view: View, command: &[String]) -> Result<Exit> {
    let command = views.with_startup(view.record(), command)?;
    let entered = view.enter();
    if entered.is_ok() && view.is_seen_by_others() {
        let at = view.record().at.display();
        progress::new(false).note(&format!(
            "all your processes see the view at {at}: user namespaces are off on this host (`kiln system doctor`)"
        ));
    }
    let ran = entered.and_then(|()| view.run(&command));
    if let Err(error) = view.leave() {
        exit::print_error(&error.into());
    }
    Ok(ended(ran?))
}
