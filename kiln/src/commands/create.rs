//! `kiln create`, and the making of instances for `run` too.

use std::fs;
use std::io::{ErrorKind as IoErrorKind, Write};
use std::path::PathBuf;

use kiln_contract::{ErrorKind, InstanceRecord, Platform, RuntimeBackend};
use kiln_registry::{PullOptions, PullPolicy, Registry, RegistryError};
use kiln_store::{Image, ImageName, Store, StoreError};

use super::workload::{Pull, WorkloadArgs};
use crate::backends::Backends;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;
use crate::progress;
use crate::resolve::{Host, ImageFacts, ImageSettings, instance_spec, random_name};

/// Make an instance without starting it, and print its id
#[derive(Debug, clap::Args)]
#[command(
    disable_help_flag = true,
    override_usage = "kiln create [OPTIONS] <IMAGE> [COMMAND]...",
    after_help = "Flags after the image belong to the command."
)]
pub(crate) struct Args {
    /// Show nothing while pulling
    #[arg(short, long)]
    quiet: bool,
    /// Print help
    #[arg(long, action = clap::ArgAction::HelpShort)]
    help: Option<bool>,
    #[command(flatten)]
    workload: WorkloadArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let record = create(context, &instances, &self.workload, self.quiet, false)?;
        let mut out = Out::new();
        out.line(record.id.as_str())?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}

/// Makes an instance: finds or pulls its image, resolves its specification, creates it. Whether it is `started_at_once`
/// matters if this process dies before it has.
pub(super) fn create(
    context: &Context,
    instances: &Backends,
    args: &WorkloadArgs,
    quiet: bool,
    started_at_once: bool,
) -> Result<InstanceRecord> {
    let cidfile = args.cidfile.clone().map(IdFile::make).transpose()?;
    let store = context.store()?;
    let image = find_image(context, &store, args, quiet)?;
    let config = store.blob(&image.id)?.ok_or_else(|| {
        CliError::failed(format!("the store lacks the config {} of the image `{}`", image.id, args.image()))
            .with_hint("`kiln system check --repair` fetches what is missing")
    })?;
    let settings = ImageSettings::read(args.image(), &config)?;
    let facts = ImageFacts { id: image.id, layers: image.layers, settings };
    let record = create_named(instances, args, &facts, started_at_once)?;
    if let Some(file) = cidfile {
        file.write(record.id.as_str())?;
    }
    Ok(record)
}

fn create_named(
    instances: &Backends,
    args: &WorkloadArgs,
    image: &ImageFacts,
    started_at_once: bool,
) -> Result<InstanceRecord> {
    let mut attempt = 0;
    loop {
        let name = args.name.clone().unwrap_or_else(|| random_name(attempt));
        let mut spec = Host::real(|host| instance_spec(args, &name, image, host))?;
        spec.transient = started_at_once && spec.remove;
        match instances.create(&spec) {
            Ok(record) => return Ok(record),
            // A random name that is taken: another one.
            Err(error) if error.kind() == ErrorKind::Conflict && args.name.is_none() && attempt < 8 => {
                attempt += 1;
            }
            Err(error) if error.kind() == ErrorKind::Conflict && error.hint_text().is_none() => {
                let hint = format!("choose another --name, or remove it: kiln rm {name}");
                return Err(CliError::from(error).with_hint(hint));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The image, from the store first: a registry is asked only where the policy wants it.
fn find_image(context: &Context, store: &Store, args: &WorkloadArgs, quiet: bool) -> Result<Image> {
    let policy = match args.pulling.pull {
        Pull::Never => {
            let image = context.image(store, args.image())?;
            return if image.whole {
                Ok(image)
            } else {
                Err(RegistryError::NotWhole { image: image.id }.into())
            };
        }
        Pull::Always => PullPolicy::Always,
        Pull::Newer => PullPolicy::Newer,
        Pull::Missing => PullPolicy::Missing,
    };
    let missing = match store.resolve(args.image()) {
        Ok(image) if policy == PullPolicy::Missing && runs_on(&image, args.pulling.platform.as_ref()) => {
            return context.whole(store, image, args.pulling.registry.config(), quiet);
        }
        Ok(_) => false,
        Err(StoreError::NotFound { .. }) => true,
        Err(error) => return Err(error.into()),
    };
    let Ok(name) = ImageName::parse(args.image()) else {
        // Not a name that a registry could know, such as `name~3`: the store's answer is the whole answer.
        let image = context.image(store, args.image())?;
        return context.whole(store, image, args.pulling.registry.config(), quiet);
    };
    let platform = args.pulling.platform.clone();
    // An image that is there for another platform does not count as there.
    let policy = match (policy, missing) {
        (PullPolicy::Missing, false) => PullPolicy::Always,
        (policy, _) => policy,
    };
    let limits = args.pulling.limits.limits();
    let options = PullOptions { platform, policy, limits, ..Default::default() };
    let registry = Registry::new(args.pulling.registry.config())?;
    let progress = progress::new(quiet);
    progress.note(&format!("pulling {}", name.familiar()));
    Ok(registry.pull(store, &name, &options, &*progress)?.image)
}

fn runs_on(image: &Image, wanted: Option<&Platform>) -> bool {
    let Some(wanted) = wanted else { return true };
    let platform = Platform {
        os: image.config.os().to_string(),
        architecture: image.config.architecture().to_string(),
        variant: image.config.variant().clone(),
    };
    platform.satisfies(wanted)
}

/// `--cidfile`: taken before anything is made, removed again if making fails.
struct IdFile {
    path: PathBuf,
    file: Option<fs::File>,
}

impl IdFile {
    fn make(path: PathBuf) -> Result<Self> {
        let made = fs::File::create_new(&path).map_err(|error| {
            let exists = error.kind() == IoErrorKind::AlreadyExists;
            let error = CliError::file(format!("cannot make the --cidfile {}", path.display()), error);
            if exists { error.with_hint("remove it first if no instance needs it any more") } else { error }
        })?;
        Ok(Self { path, file: Some(made) })
    }

    fn write(mut self, id: &str) -> Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let written = file.write_all(id.as_bytes());
        written.map_err(|error| {
            CliError::file(format!("cannot write the --cidfile {}", self.path.display()), error)
        })
    }
}

impl Drop for IdFile {
    fn drop(&mut self) {
        if self.file.is_some() {
            // The instance was not made; a file that stays behind is found by the next attempt, with its name.
            let _ = fs::remove_file(&self.path);
        }
    }
}
