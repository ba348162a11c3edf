//! `kiln fs ls-tags` and `kiln fs search`.

use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use kiln_contract::Digest;
use kiln_store::{ImageName, Store};
use serde::Serialize;

use crate::complete;
use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Out, Table, print_rows};
use crate::resolve::ago;

/// List names, or those below a path: `kiln fs ls-tags me` lists `me/tools:1` and `me/libs/zlib:2`
#[derive(Debug, clap::Args)]
pub(crate) struct Ls {
    /// A name without its tag, or what such names begin with before a `/`
    #[arg(add = ArgValueCompleter::new(complete::images))]
    path: Option<String>,
    #[command(flatten)]
    shown: Shown,
}

/// List the names that have a text in them, upper or lower case alike
#[derive(Debug, clap::Args)]
pub(crate) struct Search {
    /// The text
    term: String,
    #[command(flatten)]
    shown: Shown,
}

/// How names are listed.
#[derive(Debug, clap::Args)]
struct Shown {
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    /// Digests in full
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// A name as the JSON forms write it.
#[derive(Debug, Serialize)]
struct Row {
    /// `name:tag`.
    name: String,
    /// The digest of the manifest.
    target: Digest,
    /// When the name was given (RFC 3339).
    time: Timestamp,
    /// By what.
    note: String,
    /// How many versions it has: the last is `name:tag~N`, with N one less.
    versions: usize,
}

impl Ls {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let path = self.path.as_deref().map(|path| path.trim_matches('/'));
        self.shown.print(&context.store()?, |name| {
            path.is_none_or(|path| {
                let tagged = name.familiar();
                let untagged = tagged.strip_suffix(&format!(":{}", name.tag.as_deref().unwrap_or_default()));
                let below = |name: &str| {
                    name.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                };
                // With the registry too, as in `docker.io/library`.
                tagged == path || untagged.is_some_and(below) || below(&name.repository)
            })
        })
    }
}

impl Search {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let term = self.term.to_lowercase();
        self.shown.print(&context.store()?, |name| name.familiar().to_lowercase().contains(&term))
    }
}

impl Shown {
    fn print(&self, store: &Store, wanted: impl Fn(&ImageName) -> bool) -> Result<Exit> {
        let mut rows = Vec::new();
        for (name, entry) in store.tags()?.into_iter().filter(|(name, _)| wanted(name)) {
            let versions = store.tag_history(&name)?.len();
            let familiar = name.familiar();
            rows.push(Row {
                name: familiar,
                target: entry.target,
                time: entry.time,
                note: entry.note,
                versions,
            });
        }
        if self.quiet {
            let mut out = Out::new();
            for row in &rows {
                out.line(&row.name)?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let now = Timestamp::now();
        print_rows(self.format.format, &rows, |rows| {
            let mut table = Table::new(["NAME", "DIGEST", "VERSIONS", "WHEN", "BY"]).right("VERSIONS");
            for row in rows {
                let digest = if self.no_trunc { row.target.to_string() } else { row.target.short() };
                let versions = row.versions.to_string();
                table.row([row.name.clone(), digest, versions, ago(row.time, now), row.note.clone()]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
