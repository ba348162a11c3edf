//! Images whose layers are not all here, made whole.

use kiln_contract::Progress;
use kiln_store::{Image, ImageName, ImportLimits, Store};

use crate::{PullOptions, PullPolicy, Registry, RegistryError, Result};

impl Registry {
    /// Pulls the layers of an image that came lazily, from where it came from. An image that is whole is given back as it is.
    ///
    /// # Errors
    /// [`RegistryError::NotWhole`] if nobody is known to have it; as [`Registry::pull`] otherwise.
    pub fn complete(
        &self,
        store: &Store,
        image: &Image,
        limits: ImportLimits,
        progress: &dyn Progress,
    ) -> Result<Image> {
        if image.whole {
            return Ok(image.clone());
        }
        let mut failed = RegistryError::NotWhole { image: image.id };
        for repository in store.repositories_of(&image.id)? {
            let Ok(name) = ImageName::parse(&format!("{repository}@{}", image.manifest_digest)) else {
                continue;
            };
            let options = PullOptions { policy: PullPolicy::Always, limits, ..PullOptions::default() };
            match self.pull(store, &name, &options, progress) {
                Ok(pulled) => return Ok(pulled.image),
                Err(error @ RegistryError::Store(_)) => return Err(error),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }
}
