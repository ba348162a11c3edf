//! Certificates of registries: `certs.d` (containers-certs.d(5), Docker's `/etc/docker/certs.d`).

use std::fs;
use std::path::{Path, PathBuf};

use reqwest::{Certificate, Identity};

use crate::config::user_config_dir;
use crate::{Config, RegistryError, Result};

/// What a registry's directory holds.
#[derive(Debug, Default)]
pub(crate) struct Certs {
    /// Authorities to trust besides the system's: `*.crt`.
    pub(crate) authorities: Vec<Certificate>,
    /// The certificate to show: `<name>.cert` and `<name>.key`.
    pub(crate) identity: Option<Identity>,
}

impl Certs {
    /// Reads the directories of `host` (with its port).
    pub(crate) fn load(config: &Config, host: &str) -> Result<Self> {
        let mut certs = Self::default();
        for dir in directories(config, host) {
            certs.add(&dir)?;
        }
        Ok(certs)
    }

    fn add(&mut self, dir: &Path) -> Result<()> {
        let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => {
                    let authorities = Certificate::from_pem_bundle(&read(&path)?)
                        .map_err(|error| bad(&path, &format!("it is not a PEM certificate: {error}")))?;
                    if authorities.is_empty() {
                        return Err(bad(&path, "it holds no PEM certificate"));
                    }
                    self.authorities.extend(authorities);
                }
                Some("cert") if self.identity.is_none() => {
                    let key = path.with_extension("key");
                    let mut pem = read(&path)?;
                    pem.push(b'\n');
                    pem.extend(read(&key)?);
                    let identity = Identity::from_pem(&pem)
                        .map_err(|error| bad(&path, &format!("it and its key cannot be used: {error}")))?;
                    self.identity = Some(identity);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn directories(config: &Config, host: &str) -> Vec<PathBuf> {
    if let Some(dir) = &config.cert_dir {
        return vec![dir.clone()];
    }
    let user = user_config_dir().map(|dir| dir.join("containers/certs.d"));
    [user, Some("/etc/containers/certs.d".into()), Some("/etc/docker/certs.d".into())]
        .into_iter()
        .flatten()
        .map(|dir| dir.join(host))
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|source| RegistryError::Io { doing: "read", path: path.to_owned(), source })
}

fn bad(path: &Path, reason: &str) -> RegistryError {
    RegistryError::Config { path: path.to_owned(), reason: reason.to_owned() }
}
