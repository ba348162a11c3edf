//! `kiln fs …`.

mod add;
mod clean;
mod commit;
mod diff;
mod edit;
mod info;
mod join;
mod layers;
mod log;
mod ls;
mod mount;
mod read;
mod render;
mod reset;
mod run;
mod runtimes;
mod service;
mod shell;
mod tags;
mod untag;
mod write;

use clap::Subcommand;
use kiln_contract::{BackendError, Digest, ErrorKind};
use kiln_registry::Config;
use kiln_store::{Store, StoreError};
use kiln_view::views::{VARIABLE, ViewRecord, Views};
use kiln_view::{Bind, Fetcher, StackError, TreeContents};

use super::{image, system};
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::{Exit, Owner};
use crate::suggest;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(Box<run::Args>),
    Shell(Box<shell::Args>),
    Join(join::Args),
    Edit(edit::Args),
    Commit(commit::Args),
    Reset(reset::Args),
    Add(add::Add),
    Switch(add::Switch),
    Diff(diff::Args),
    Info(info::Args),
    Ls(ls::Args),
    #[command(visible_alias = "cat")]
    Read(read::Args),
    Write(write::Args),
    Render(render::Args),
    Tag(image::tag::Args),
    Untag(untag::Args),
    LsTags(tags::Ls),
    Search(tags::Search),
    Log(log::Args),
    Layers(layers::Args),
    Push(image::push::Args),
    Pull(image::pull::Args),
    Clean(clean::Args),
    Check(system::check::Args),
    /// Work with the views that there are
    #[command(subcommand, arg_required_else_help = true)]
    Runtimes(runtimes::Command),
    Mount(mount::MountArgs),
    Unmount(mount::UnmountArgs),
    /// Work with the service that shows the router's views
    #[command(subcommand, arg_required_else_help = true)]
    Service(service::Command),
}

impl Command {
    /// To whom the exit code belongs.
    pub(crate) fn owner(&self) -> Owner {
        match self {
            Self::Run(_) | Self::Shell(_) | Self::Join(_) => Owner::Workload,
            _ => Owner::Kiln,
        }
    }

    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Run(args) => args.run(context),
            Self::Shell(args) => args.run(context),
            Self::Join(args) => args.run(context),
            Self::Edit(args) => args.run(context),
            Self::Commit(args) => args.run(context),
            Self::Reset(args) => args.run(context),
            Self::Add(args) => args.run(context),
            Self::Switch(args) => args.run(context),
            Self::Diff(args) => args.run(context),
            Self::Info(args) => args.run(context),
            Self::Ls(args) => args.run(context),
            Self::Read(args) => args.run(context),
            Self::Write(args) => args.run(context),
            Self::Render(args) => args.run(context),
            Self::Tag(args) => args.run(context),
            Self::Untag(args) => args.run(context),
            Self::LsTags(args) => args.run(context),
            Self::Search(args) => args.run(context),
            Self::Layers(args) => args.run(context),
            Self::Clean(args) => args.run(context),
            Self::Check(args) => args.run(context),
            Self::Log(args) => args.run(context),
            Self::Push(args) => args.run(context),
            Self::Pull(args) => args.run(context),
            Self::Runtimes(command) => command.run(context),
            Self::Mount(args) => args.run(context),
            Self::Unmount(args) => args.run(context),
            Self::Service(command) => command.run(context),
        }
    }
}

/// What `REF[+REF…]` names, in files too: a stack, and the image whose configuration it has, which is the first's.
struct Stack {
    image: Digest,
    layers: Vec<Digest>,
    /// Of some of them not all files need be here.
    is_partial: bool,
    /// What of the host's is shown in a view of it.
    binds: Vec<Bind>,
}

fn stack(store: &Store, reference: &str) -> Result<Stack> {
    let kiln_view::Stack { image, layers, is_partial, binds } = kiln_view::Stack::resolve(store, reference)
        .map_err(|error| {
        let StackError::Store { part, source } = error else {
            return CliError::from(BackendError::from(error));
        };
        let missing = matches!(source, StoreError::NotFound { .. });
        let error = CliError::from(source);
        if missing && error.hint().is_none() {
            return error.with_hint(format!("fetch it first: kiln fs pull {part}"));
        }
        error
    })?;
    let image = image.ok_or_else(|| {
        CliError::usage(format!("`{reference}` names no image"))
            .with_hint("live layers are shown in a view of something: join them to it by `+`")
    })?;
    Ok(Stack { image, layers, is_partial, binds })
}

/// What a reference names, to be looked at.
fn contents(context: &Context, reference: &str) -> Result<TreeContents> {
    let store = context.store()?;
    let stack = stack(&store, reference)?;
    Ok(TreeContents::open(&store.merged_tree(&stack.layers)?, &store.objects_dir(), Some(fetcher(context)?))?)
}

/// What brings objects that are missing or damaged: this program, in a process of its own.
fn fetcher(context: &Context) -> Result<Fetcher> {
    let program = kiln_instance::process::program()
        .map_err(|error| CliError::file("cannot tell which program this is", error))?;
    let home = context.home().path().to_owned();
    Ok(Fetcher { program, arguments: vec!["fetch-object".into()], home })
}

/// What a reference names, after what is not here of it was pulled.
fn whole_stack(context: &Context, store: &Store, reference: &str) -> Result<Stack> {
    let named = stack(store, reference)?;
    if !named.is_partial {
        return Ok(named);
    }
    context.whole_layers(store, &named.layers, &Config::default())?;
    // A table of contents may have told another tree than the layer has.
    stack(store, reference)
}

/// A view by its name; without one, that in which this command runs.
fn find_view(views: &Views, name: Option<&str>) -> Result<ViewRecord> {
    let Some(name) = name.map(str::to_owned).or_else(|| std::env::var(VARIABLE).ok()) else {
        return Err(CliError::usage("which view? This command does not run in one")
            .with_hint("name one: `kiln fs runtimes ls` lists them"));
    };
    views.find(&name).map_err(|error| {
        let missing = error.kind() == ErrorKind::NotFound;
        let all = if missing { views.list().unwrap_or_default() } else { Vec::new() };
        let error = CliError::from(error);
        match suggest::nearest(&name, all.iter().map(|record| record.name.as_str())) {
            Some(near) => error.with_hint(format!("did you mean `{near}`?")),
            None => error,
        }
    })
}

/// As shells tell it: the command's own code, or 128 and the signal that ended it.
fn ended(status: std::process::ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255);
    Exit(u8::try_from(code).unwrap_or(255))
}
