//! `kiln fs cat`.

use std::io::Read as _;

use clap_complete::engine::ArgValueCompleter;

use super::contents;
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Out;

/// As much is read at once.
const PIECE: usize = 64 * 1024;

/// Write a file of an image to standard output, without mounting it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name; several may be joined by `+`
    #[arg(value_name = "REF[+REF…]", add = ArgValueCompleter::new(complete::images))]
    reference: String,
    /// The file
    path: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let contents = contents(context, &self.reference)?;
        let mut file = contents.read(self.path.as_bytes())?;
        let mut out = Out::new();
        let mut buffer = vec![0; PIECE];
        loop {
            let length = file
                .read(&mut buffer)
                .map_err(|error| CliError::file(format!("cannot read `{}`", self.path), error))?;
            if length == 0 {
                break;
            }
            out.bytes(&buffer[..length])?;
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
