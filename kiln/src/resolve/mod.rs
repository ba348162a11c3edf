//! From what was typed and what the image says to what is run: pure functions, no files, no processes.
//!
//! Flags are *parsed* by clap (`commands/`), *resolved* here into a [`kiln_contract::InstanceSpec`], and only
//! then does a command *run*. What a function needs of the host (the working directory, the environment, the
//! content of an env file) comes in through [`Host`], so that a table can test it.

mod command;
mod environment;
mod error;
mod health;
mod image;
mod labels;
mod mounts;
mod names;
mod network;
mod ports;
mod resources;
mod signal;
mod spec;
mod times;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

pub(crate) use environment::exec_environment;
pub(crate) use error::ResolveError;
pub(crate) use image::ImageSettings;
pub(crate) use labels::{label_map, labels};
pub(crate) use names::{check_name, random_name};
pub(crate) use ports::{host_side, parse_container_port, show_ports};
pub(crate) use signal::parse_signal;
pub(crate) use spec::{ImageFacts, instance_spec};
pub(crate) use times::{ago, parse_time, span};

/// What resolving returns.
pub(crate) type Result<T> = std::result::Result<T, ResolveError>;

/// What resolving may know of the host.
pub(crate) struct Host<'a> {
    /// The directory in which the command was typed; nothing, if it has been removed since.
    pub(crate) cwd: Option<PathBuf>,
    /// The user's home, for `~/…`.
    pub(crate) home: Option<PathBuf>,
    /// Gives a variable of the caller's environment.
    pub(crate) variable: &'a dyn Fn(&str) -> Option<String>,
    /// Gives the text of a file that a flag names.
    pub(crate) read: &'a dyn Fn(&Path) -> io::Result<String>,
    /// Finds a program in `$PATH`.
    pub(crate) find_program: &'a dyn Fn(&str) -> Option<PathBuf>,
}

impl Host<'_> {
    /// The host as it is, given to `with`.
    pub(crate) fn real<T>(with: impl FnOnce(&Host<'_>) -> T) -> T {
        let host = Host {
            cwd: std::env::current_dir().ok(),
            home: std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from),
            variable: &|name| std::env::var(name).ok(),
            read: &|path| std::fs::read_to_string(path),
            find_program: &|name| {
                std::env::split_paths(&std::env::var_os("PATH")?)
                    .map(|directory| directory.join(name))
                    .find(|path| path.is_file())
            },
        };
        with(&host)
    }

    /// What a path means to whoever typed it as the value of `flag`.
    fn absolute(&self, flag: &'static str, path: &Path) -> Result<PathBuf> {
        match &self.cwd {
            _ if path.is_absolute() => Ok(path.to_owned()),
            Some(cwd) => Ok(cwd.join(path)),
            None => {
                let why = "the path is relative to the working directory, which has been removed";
                Err(ResolveError::value(flag, path.display().to_string(), why))
            }
        }
    }

    /// Lines of a file of `NAME=value` or `label=value`: without comments and empty lines.
    fn lines_of(&self, what: &'static str, path: &Path) -> Result<Vec<String>> {
        let text =
            (self.read)(path).map_err(|source| ResolveError::File { what, path: path.to_owned(), source })?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let lines =
            text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Ok(lines.map(str::to_owned).collect())
    }
}

/// `name=value` pairs; a word without `=` has an empty value.
fn pair(text: &str) -> (&str, &str) {
    text.split_once('=').unwrap_or((text, ""))
}

/// Labels and sysctls: the last of one name wins.
type Map = BTreeMap<String, String>;

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A host with a working directory `/work`, a home `/home/me`, `HOST_VAR=from-host`, and the files given.
    pub(crate) fn with_host<T>(files: &[(&str, &str)], with: impl FnOnce(&Host<'_>) -> T) -> T {
        let files: BTreeMap<PathBuf, String> =
            files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
        with(&Host {
            cwd: Some("/work".into()),
            home: Some("/home/me".into()),
            variable: &|name| (name == "HOST_VAR").then(|| "from-host".to_owned()),
            read: &|path| files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into()),
            find_program: &|name| (name == "runc").then(|| "/usr/bin/runc".into()),
        })
    }
}
