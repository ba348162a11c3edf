//! One file a command: its `Args`, whose comments are its help, and its `run`.

pub(crate) mod attach;
pub(crate) mod commit;
pub(crate) mod completion;
pub(crate) mod console;
pub(crate) mod cp;
pub(crate) mod create;
pub(crate) mod diff;
pub(crate) mod exec;
pub(crate) mod fetch_object;
pub(crate) mod fork;
#[cfg(target_os = "linux")]
pub(crate) mod fs;
pub(crate) mod image;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod kernel;
pub(crate) mod kill;
pub(crate) mod login;
pub(crate) mod logout;
pub(crate) mod logs;
pub(crate) mod man;
pub(crate) mod monitor;
pub(crate) mod network;
pub(crate) mod pause;
pub(crate) mod port;
pub(crate) mod ps;
pub(crate) mod rename;
pub(crate) mod resize;
pub(crate) mod restart;
pub(crate) mod resume;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod snapshot;
pub(crate) mod spare;
pub(crate) mod ssh;
pub(crate) mod ssh_config;
pub(crate) mod ssh_proxy;
pub(crate) mod start;
pub(crate) mod stats;
pub(crate) mod stop;
pub(crate) mod supervise;
pub(crate) mod system;
pub(crate) mod template;
pub(crate) mod top;
pub(crate) mod update;
pub(crate) mod volume;
pub(crate) mod wait;
pub(crate) mod workload;

use std::path::PathBuf;

use clap::Args;
use kiln_contract::{ByteSize, HumanDuration};
use kiln_store::ImportLimits;

/// The keys that detach from a terminal unless others are asked for, as in Docker.
pub(crate) const DETACH_KEYS: &str = "ctrl-p,ctrl-q";

/// How registries are reached.
#[derive(Debug, Clone, Args)]
pub(crate) struct RegistryArgs {
    /// Take credentials from this file ($REGISTRY_AUTH_FILE)
    #[arg(long, value_name = "FILE", help_heading = "Registry")]
    pub(crate) authfile: Option<PathBuf>,
    /// Take mirrors and insecure registries from this file
    #[arg(long, value_name = "FILE", help_heading = "Registry")]
    pub(crate) registries_conf: Option<PathBuf>,
    /// Take certificates from this directory
    #[arg(long, value_name = "DIR", help_heading = "Registry")]
    pub(crate) cert_dir: Option<PathBuf>,
    /// Whether certificates are verified, and plain HTTP is refused
    #[arg(
        long, value_name = "BOOL", help_heading = "Registry", default_value_t = true, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set
    )]
    pub(crate) tls_verify: bool,
    /// Give up when no byte comes for so long (30s)
    #[arg(long, value_name = "DURATION", help_heading = "Registry")]
    pub(crate) registry_timeout: Option<HumanDuration>,
    /// Try again so often
    #[arg(long, value_name = "NUMBER", help_heading = "Registry")]
    pub(crate) retries: Option<u32>,
}

/// What a layer may be that is taken into the store: whoever made it may not be trusted.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct LayerLimitArgs {
    /// Refuse an image with a layer whose files are larger together, unpacked
    #[arg(long, value_name = "SIZE", help_heading = "Limits of layers")]
    pub(crate) max_size: Option<ByteSize>,
    /// Refuse an image with a layer of more files, directories and links (4000000)
    #[arg(long, value_name = "NUMBER", help_heading = "Limits of layers")]
    pub(crate) max_entries: Option<u64>,
    /// Refuse an image with a layer whose names, attributes and links take more memory (2G)
    #[arg(long, value_name = "SIZE", help_heading = "Limits of layers")]
    pub(crate) max_metadata: Option<ByteSize>,
}

impl LayerLimitArgs {
    /// As the store takes them.
    pub(crate) fn limits(self) -> ImportLimits {
        let usual = ImportLimits::default();
        ImportLimits {
            max_size: self.max_size.map(ByteSize::bytes),
            max_entries: self.max_entries.unwrap_or(usual.max_entries),
            max_memory: self.max_metadata.map_or(usual.max_memory, ByteSize::bytes),
        }
    }
}

impl Default for RegistryArgs {
    fn default() -> Self {
        Self {
            authfile: None,
            registries_conf: None,
            cert_dir: None,
            tls_verify: true,
            registry_timeout: None,
            retries: None,
        }
    }
}

impl RegistryArgs {
    /// The same, as a command line has it.
    #[cfg(target_os = "linux")]
    pub(crate) fn to_arguments(&self) -> Vec<std::ffi::OsString> {
        let paths = [
            ("--authfile", &self.authfile),
            ("--registries-conf", &self.registries_conf),
            ("--cert-dir", &self.cert_dir),
        ];
        let mut arguments = Vec::new();
        for (flag, path) in paths {
            // Who is started may be in another directory.
            let path = path.as_ref().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()));
            arguments.extend(path.into_iter().flat_map(|path| [flag.into(), path.into()]));
        }
        arguments.push(format!("--tls-verify={}", self.tls_verify).into());
        if let Some(timeout) = &self.registry_timeout {
            arguments.extend(["--registry-timeout".into(), timeout.to_string().into()]);
        }
        if let Some(retries) = self.retries {
            arguments.extend(["--retries".into(), retries.to_string().into()]);
        }
        arguments
    }

    /// As the registry takes it.
    pub(crate) fn config(&self) -> kiln_registry::Config {
        kiln_registry::Config {
            authfile: self.authfile.clone(),
            registries_conf: self.registries_conf.clone(),
            cert_dir: self.cert_dir.clone(),
            insecure: !self.tls_verify,
            timeout: self.registry_timeout.map(|given| given.0),
            retries: self.retries,
        }
    }
}
