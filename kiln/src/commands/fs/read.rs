//! `kiln fs read`, which is `cat` too.

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
    /// The file; may be left out where there is only one, as `kiln fs write` makes it
    path: Option<String>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let contents = contents(context, &self.reference)?;
        let path = match self.path {
            Some(path) => path.into_bytes(),
            None => contents.only_file()?.ok_or_else(|| {
                CliError::usage(format!("`{}` has not just one file", self.reference))
                    .with_hint(format!("name one: `kiln fs ls {}` lists them", self.reference))
            })?,
        };
        let mut file = contents.read(&path)?;
        let mut out = Out::new();
        let mut buffer = vec![0; PIECE];
        loop {
            let length = file.read(&mut buffer).map_err(|error| {
                CliError::file(format!("cannot read `{}`", String::from_utf8_lossy(&path)), error)
            })?;
            if length == 0 {
                break;
            }
            out.bytes(&buffer[..length])?;
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
