//! `kiln logs`.

use std::io::{self, Write};
use std::ops::ControlFlow;

use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use kiln_contract::{LogLine, LogQuery, LogStream, RuntimeBackend};
use serde::Serialize;

use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::Format;
use crate::resolve::{ResolveError, parse_time};

/// Show what an instance wrote
///
/// Its standard output goes to standard output, its standard error to standard error.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// Go on with new lines until it ends
    #[arg(short, long)]
    follow: bool,
    /// Only what was written since then: a time (2026-01-02T15:04:05Z), or how long ago (10m)
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only what was written before then
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only the last so many lines, or `all`
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", allow_hyphen_values = true)]
    tail: String,
    /// Show when each line was written
    #[arg(short, long)]
    timestamps: bool,
    /// The form of the output: the text itself, or JSON lines
    #[arg(long, value_name = "FORMAT", default_value = "table", hide_possible_values = true)]
    format: Format,
}

/// A line as `--format jsonl` writes it.
#[derive(Debug, Serialize)]
struct LogRow {
    /// When it was written (RFC 3339).
    time: Timestamp,
    /// `stdout` or `stderr`.
    stream: LogStream,
    /// The text, with its newline; bytes that are not UTF-8 are replaced.
    log: String,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let now = Timestamp::now();
        let query = LogQuery {
            follow: self.follow,
            since: self.since.as_deref().map(|text| parse_time("--since", text, now)).transpose()?,
            until: self.until.as_deref().map(|text| parse_time("--until", text, now)).transpose()?,
            tail: tail(&self.tail)?,
        };
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        let mut failed = None;
        instances.logs(&record.id, &query, &mut |line| match self.show(&line) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        })?;
        failed.map_or(Ok(Exit::SUCCESS), Err)
    }

    fn show(&self, line: &LogLine) -> Result<()> {
        let mut text = Vec::new();
        if self.format == Format::Table {
            if self.timestamps {
                text.extend_from_slice(format!("{:.9} ", line.time).as_bytes());
            }
            text.extend_from_slice(&line.bytes);
        } else {
            let log = String::from_utf8_lossy(&line.bytes).into_owned();
            text = serde_json::to_vec(&LogRow { time: line.time, stream: line.stream, log })?;
            text.push(b'\n');
        }
        let to_stderr = line.stream == LogStream::Stderr && self.format == Format::Table;
        // Line by line: whoever follows wants to see each when it comes.
        let written = if to_stderr {
            io::stderr().write_all(&text)
        } else {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&text).and_then(|()| stdout.flush())
        };
        written.map_err(CliError::Output)
    }
}

fn tail(text: &str) -> Result<Option<usize>> {
    match text {
        "all" | "-1" => Ok(None),
        number => {
            let bad = || ResolveError::value("--tail", text, "it is a number of lines, or `all`");
            Ok(Some(number.parse().map_err(|_| bad())?))
        }
    }
}
