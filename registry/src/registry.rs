//! [`Registry`]: what all operations with registries share.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_store::ImageName;
use tokio::runtime::Runtime;

use crate::registries_conf::RegistriesConf;
use crate::transport::Transport;
use crate::{Config, RegistryError, Result};

/// Registries as one user sees them: with that user's credentials, mirrors and certificates.
///
/// Its methods block, and must not be called from within an asynchronous runtime. Making one costs nothing:
/// files are read and the runtime is started by the first operation that needs the network.
pub struct Registry {
    config: Config,
    session: Mutex<Option<Arc<Session>>>,
}

/// What is made once the network is needed.
pub(crate) struct Session {
    /// One thread is enough: it moves and hashes compressed bytes, while unpacking has threads of its own.
    pub(crate) runtime: Runtime,
    pub(crate) transport: Transport,
    pub(crate) conf: RegistriesConf,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Registry {
    /// Registries, used as `config` says.
    ///
    /// # Errors
    /// None yet: files are read when they are needed.
    pub fn new(config: Config) -> Result<Self> {
        Ok(Self { config, session: Mutex::default() })
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn session(&self) -> Result<Arc<Session>> {
        let mut kept = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = &*kept {
            return Ok(session.clone());
        }
        let conf = RegistriesConf::load(&self.config)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|source| {
                RegistryError::Io { doing: "start the network runtime of", path: "kiln".into(), source }
            })?;
        let transport = Transport::new(self.config.clone(), conf.credential_helpers.clone());
        let session = Arc::new(Session { runtime, transport, conf });
        *kept = Some(session.clone());
        Ok(session)
    }
}

/// A reference with everything in it: `docker.io/library/alpine:3.20@sha256:…`.
pub(crate) fn full_name(name: &ImageName) -> String {
    let mut text = name.repository.clone();
    if let Some(tag) = &name.tag {
        text.push(':');
        text.push_str(tag);
    }
    if let Some(digest) = &name.digest {
        text.push('@');
        text.push_str(&digest.to_string());
    }
    text
}
