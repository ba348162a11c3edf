//! `--format`: the same rows as a table, as one JSON array, or as JSON lines.

use std::io::{self, BufWriter, StdoutLock, Write};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::Table;
use crate::error::{CliError, Result};

/// The form of a result. Field names of the JSON forms are stable: they change only with the major version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns
    #[default]
    Table,
    /// One JSON document
    Json,
    /// One JSON object a line
    Jsonl,
}

/// `--format`, for commands whose result can be read by programs.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct FormatArgs {
    /// The form of the output
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: Format,
}

/// Standard output, buffered. A reader that went away is [`CliError::Output`], which ends the command quietly.
pub(crate) struct Out(BufWriter<StdoutLock<'static>>);

impl Out {
    /// Standard output of this process.
    pub(crate) fn new() -> Self {
        Self(BufWriter::new(io::stdout().lock()))
    }

    /// Writes a line.
    pub(crate) fn line(&mut self, text: impl AsRef<str>) -> Result<()> {
        writeln!(self.0, "{}", text.as_ref()).map_err(CliError::Output)
    }

    /// Writes bytes as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.write_all(bytes).map_err(CliError::Output)
    }

    /// Writes a table.
    pub(crate) fn table(&mut self, table: &Table) -> Result<()> {
        table.write(&mut self.0).map_err(CliError::Output)
    }

    /// Hands over what is buffered.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.0.flush().map_err(CliError::Output)
    }
}

/// Writes rows in the form that was asked for.
pub(crate) fn print_rows<T: Serialize>(
    format: Format,
    rows: &[T],
    table: impl FnOnce(&[T]) -> Table,
) -> Result<()> {
    let mut out = Out::new();
    match format {
        Format::Table => out.table(&table(rows))?,
        Format::Json => out.line(serde_json::to_string_pretty(rows)?)?,
        Format::Jsonl => {
            for row in rows {
                out.line(serde_json::to_string(row)?)?;
            }
        }
    }
    out.flush()
}

/// Writes one value: as indented JSON, or on one line.
pub(crate) fn print_json<T: Serialize>(format: Format, value: &T) -> Result<()> {
    let mut out = Out::new();
    out.line(match format {
        Format::Jsonl => serde_json::to_string(value)?,
        Format::Table | Format::Json => serde_json::to_string_pretty(value)?,
    })?;
    out.flush()
}
