//! What every command has at hand: the home, and what is opened in it on demand.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kiln_contract::{ErrorKind, Home, InstanceId, InstanceRecord, RuntimeBackend, Stdio};
use kiln_instance::Volumes;
use kiln_net::Networks;
use kiln_registry::{Config, Registry};
use kiln_store::{Image, ImportLimits, Store, StoreError};

use crate::backends::{self, Backends};
use crate::error::{CliError, Result};
use crate::exit::{self, Exit};
use crate::{progress, suggest};

/// The surroundings of a command. Making it opens nothing.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    home: Home,
}

impl Context {
    /// The surroundings below `home`.
    pub(crate) fn new(home: Home) -> Self {
        Self { home }
    }

    /// Where everything is kept.
    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// The store, opened now.
    pub(crate) fn store(&self) -> Result<Store> {
        Ok(Store::open(&self.home)?)
    }

    /// The instances, opened now. Enters the user namespace of an unprivileged user first: no thread may run yet.
    pub(crate) fn instances(&self) -> Result<Backends> {
        backends::prepare()?;
        Ok(Backends::open(&self.home)?)
    }

    /// The volumes. Enters the user namespace as [`Self::instances`] does: files in volumes have many owners.
    pub(crate) fn volumes(&self) -> Result<Volumes> {
        backends::prepare()?;
        Ok(Volumes::open(&self.home))
    }

    /// The networks.
    pub(crate) fn networks(&self) -> Result<Networks> {
        backends::prepare()?;
        Ok(Networks::open(&self.home))
    }

    /// Finds an instance; a near name is suggested if there is none.
    pub(crate) fn instance(&self, instances: &Backends, name: &str) -> Result<InstanceRecord> {
        instances.find(name).map_err(|error| {
            let missing = error.kind() == ErrorKind::NotFound;
            let error = CliError::from(error);
            let all = if missing { instances.list().unwrap_or_default() } else { Vec::new() };
            match suggest::nearest(name, all.iter().map(|record| record.spec.name.as_str())) {
                Some(near) => error.with_hint(format!("did you mean `{near}`?")),
                None => error,
            }
        })
    }

    /// Finds an image; the store suggests near names if there is none.
    pub(crate) fn image(&self, store: &Store, name: &str) -> Result<Image> {
        store.resolve(name).map_err(|error| {
            let error = CliError::from(error);
            match error {
                CliError::Store(StoreError::NotFound { .. }) if error.hint().is_none() => {
                    error.with_hint("`kiln image ls` lists the images that there are")
                }
                _ => error,
            }
        })
    }

    /// The image, after what is not here of it was pulled.
    pub(crate) fn whole(&self, store: &Store, image: Image, config: Config, quiet: bool) -> Result<Image> {
        if image.whole {
            return Ok(image);
        }
        let progress = progress::new(quiet);
        progress.note(&format!("fetching what is not here yet of image {}", image.id.short()));
        let registry = Registry::new(config)?;
        Ok(registry.complete(store, &image, ImportLimits::default(), &*progress)?)
    }

    /// The same for each image that has one of these layers.
    #[cfg(target_os = "linux")]
    pub(crate) fn whole_layers(
        &self,
        store: &Store,
        layers: &[kiln_contract::Digest],
        config: &Config,
    ) -> Result<()> {
        for image in store.lazy_among(layers)? {
            self.whole(store, image, config.clone(), false)?;
        }
        Ok(())
    }

    /// Does something to each of several instances. What fails is reported, and the others are done all the same.
    pub(crate) fn each_instance(
        &self,
        names: &[String],
        mut action: impl FnMut(&Backends, &InstanceId) -> Result<()>,
    ) -> Result<Exit> {
        let instances = self.instances()?;
        each(names, |name| {
            let record = self.instance(&instances, name)?;
            action(&instances, &record.id)?;
            let mut out = crate::output::Out::new();
            out.line(name)?;
            out.flush()
        })
    }
}

/// Does something to each of several targets. What fails is reported, and the others are done all the same.
pub(crate) fn each<T>(targets: &[T], mut action: impl FnMut(&T) -> Result<()>) -> Result<Exit> {
    let mut failed = None;
    for target in targets {
        match action(target) {
            Ok(()) => {}
            Err(error) if error.is_broken_pipe() => return Err(error),
            // One target: the exit code may tell more about it than «some failed».
            Err(error) if targets.len() == 1 => return Err(error),
            Err(error) => {
                exit::print_error(&error);
                failed = Some(CliError::Reported);
            }
        }
    }
    failed.map_or(Ok(Exit::SUCCESS), Err)
}

/// This process's own standard streams, for a workload to use.
pub(crate) fn stdio() -> Result<Stdio> {
    Ok(Stdio { stdin: own(io::stdin())?, stdout: own(io::stdout())?, stderr: own(io::stderr())? })
}

fn own(stream: impl AsFd) -> Result<OwnedFd> {
    let owned = stream.as_fd().try_clone_to_owned();
    owned.map_err(|error| CliError::file("cannot use this process's standard streams", error))
}
