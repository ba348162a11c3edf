//! `kiln fs runtimes …`.

use clap::Subcommand;
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use kiln_view::views::{Backend, Views};

use super::find_view;
use super::info::{self, Shown};
use crate::complete;
use crate::context::{self, Context};
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{FormatArgs, Out, Table, print_rows};
use crate::resolve::ago;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Ls(Ls),
    Info(info::Args),
    Rm(Rm),
    Prune(Prune),
}

/// List views
#[derive(Debug, clap::Args)]
pub(crate) struct Ls {
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

/// Remove views in which nobody is, with what was changed in them
#[derive(Debug, clap::Args)]
pub(crate) struct Rm {
    /// Names
    #[arg(required = true, value_name = "VIEW", add = ArgValueCompleter::new(complete::views))]
    views: Vec<String>,
}

/// Remove what killed processes left of views
#[derive(Debug, clap::Args)]
pub(crate) struct Prune {
    /// Views that were to be kept, too
    #[arg(short, long)]
    all: bool,
}

impl Command {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let views = Views::open(context.home());
        match self {
            Self::Ls(args) => args.run(&views),
            Self::Info(args) => args.run(context),
            Self::Rm(args) => context::each(&args.views, |name| {
                find_view(&views, Some(name))?;
                views.remove(name)?;
                let mut out = Out::new();
                out.line(name)?;
                out.flush()
            }),
            Self::Prune(args) => {
                let mut out = Out::new();
                for name in views.prune(args.all)? {
                    out.line(name)?;
                }
                out.flush()?;
                Ok(Exit::SUCCESS)
            }
        }
    }
}

impl Ls {
    fn run(&self, views: &Views) -> Result<Exit> {
        let records = views.list()?;
        if self.quiet {
            let mut out = Out::new();
            for record in &records {
                out.line(&record.name)?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        let rows: Vec<Shown> =
            records.into_iter().map(|record| Shown { active: views.is_active(&record), record }).collect();
        let now = Timestamp::now();
        print_rows(self.format.format, &rows, |rows| {
            let mut table = Table::new(["NAME", "STATE", "OF", "AT", "BACKEND", "CREATED", "COMMAND"]);
            for Shown { record, active } in rows {
                table.row([
                    record.name.clone(),
                    if *active { "active" } else { "idle" }.to_owned(),
                    record.reference.clone(),
                    record.at.display().to_string(),
                    match record.backend {
                        Backend::Overlay => "overlay",
                        Backend::Fuse => "fuse",
                        Backend::Router => "router",
                    }
                    .to_owned(),
                    ago(record.created, now),
                    record.command.join(" "),
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
