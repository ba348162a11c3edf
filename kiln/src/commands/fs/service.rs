//! `kiln fs service`.

use std::time::Duration;

use clap::Subcommand;
use kiln_view::router::{self, Client};
use kiln_view::views::Views;

use super::fetcher;

use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{FormatArgs, Table, print_rows};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Start(StartArgs),
    Stop(StopArgs),
    Status(StatusArgs),
}

impl Command {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Self::Start(args) => args.run(context),
            Self::Stop(args) => args.run(context),
            Self::Status(args) => args.run(context),
        }
    }
}

/// Start the service that shows the router's views
///
/// The first view starts it by itself, and it ends when it has shown nothing for a while. If one was killed, the next
/// shows again what that showed.
#[derive(Debug, clap::Args)]
pub(crate) struct StartArgs {
    /// How long it stays when it shows nothing
    #[arg(long, value_name = "SECONDS", default_value_t = router::IDLE.as_secs())]
    idle: u64,
    /// Be the service, instead of starting it
    #[arg(long)]
    foreground: bool,
}

impl StartArgs {
    fn run(&self, context: &Context) -> Result<Exit> {
        let idle = Duration::from_secs(self.idle);
        if self.foreground {
            router::serve(&Views::open(context.home()).fetching(fetcher(context)?), idle, || {})?;
        } else if Client::connect(context.home())?.is_none() {
            router::start(context.home(), idle, router::this_program)?;
        }
        Ok(Exit::SUCCESS)
    }
}

/// End the service, and take its mounts away
///
/// The views stay recorded for those who are in them: the next service shows them again.
#[derive(Debug, clap::Args)]
pub(crate) struct StopArgs {}

impl StopArgs {
    fn run(&self, context: &Context) -> Result<Exit> {
        if let Some(mut client) = Client::connect(context.home())? {
            client.shutdown()?;
        }
        Ok(Exit::SUCCESS)
    }
}

/// Tell what the service shows, where, and to which processes
///
/// Those that descend from them see it too.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    format: FormatArgs,
}

/// One view, as it is listed.
#[derive(Debug, serde::Serialize)]
struct Row {
    name: String,
    at: String,
    processes: Vec<u32>,
}

impl StatusArgs {
    fn run(&self, context: &Context) -> Result<Exit> {
        let mut client = Client::connect(context.home())?.ok_or_else(|| {
            CliError::failed("the service of the router's views does not run")
                .with_hint("the next view starts it: kiln fs run --backend router")
        })?;
        let rows: Vec<Row> = client
            .status()?
            .views
            .into_iter()
            .map(|view| Row { name: view.name, at: view.at, processes: view.processes })
            .collect();
        print_rows(self.format.format, &rows, |rows| {
            let mut table = Table::new(["NAME", "AT", "PROCESSES"]);
            for row in rows {
                let processes: Vec<String> = row.processes.iter().map(u32::to_string).collect();
                table.row([row.name.clone(), row.at.clone(), processes.join(" ")]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
