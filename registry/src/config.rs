//! What the user says on the command line about registries, and the places that are read without it.

use std::env;
use std::path::PathBuf;
use std::time::Duration;

/// Where credentials, mirrors and certificates come from. The default reads the places where Podman and
/// Docker keep them.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// `--authfile`: the only file that credentials are read from and written to. Otherwise
    /// `$REGISTRY_AUTH_FILE`, containers' `auth.json` and `~/.docker/config.json` (containers-auth.json(5)).
    pub authfile: Option<PathBuf>,
    /// `--registries-conf`: the only such file. Otherwise `$CONTAINERS_REGISTRIES_CONF`,
    /// `~/.config/containers/registries.conf` or `/etc/containers/registries.conf`, and their drop-ins
    /// (containers-registries.conf(5)).
    pub registries_conf: Option<PathBuf>,
    /// `--cert-dir`: a directory with `*.crt`, `*.cert` and `*.key` for every registry. Otherwise the
    /// registry's own directory in `certs.d` (containers-certs.d(5)).
    pub cert_dir: Option<PathBuf>,
    /// `--tls-verify=false`: certificates are not checked, and plain HTTP is accepted.
    pub insecure: bool,
    /// No byte for so long is a failure, and tried again. 30 s unless set.
    pub timeout: Option<Duration>,
    /// How often something is tried again after it failed without any progress. 4 unless set.
    pub retries: Option<u32>,
}

impl Config {
    pub(crate) fn idle_timeout(&self) -> Duration {
        self.timeout.unwrap_or(Duration::from_secs(30))
    }

    pub(crate) fn retries(&self) -> u32 {
        self.retries.unwrap_or(4)
    }
}

/// A variable's value, unless it is unset or empty.
pub(crate) fn path_from_env(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// `$XDG_CONFIG_HOME`, or `~/.config`.
pub(crate) fn user_config_dir() -> Option<PathBuf> {
    path_from_env("XDG_CONFIG_HOME").or_else(|| Some(path_from_env("HOME")?.join(".config")))
}
