//! `kiln man` (hidden): man pages and the reference, generated from the definition of the command line.

use std::path::PathBuf;

use clap::Command;

use crate::error::{CliError, Result};
use crate::exit::Exit;

/// Write man pages to a directory
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory, made if it is missing
    directory: PathBuf,
}

impl Args {
    pub(crate) fn run(&self, command: &Command) -> Result<Exit> {
        let context =
            |error| CliError::file(format!("cannot write man pages to {}", self.directory.display()), error);
        std::fs::create_dir_all(&self.directory).map_err(context)?;
        clap_mangen::generate_to(command.clone(), &self.directory).map_err(context)?;
        Ok(Exit::SUCCESS)
    }
}
