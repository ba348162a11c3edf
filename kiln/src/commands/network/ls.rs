//! `kiln network ls`.

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{Filters, FormatArgs, Out, Table, print_rows};

/// List networks
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what fits: name, driver, label
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let filters = Filters::parse(&self.filter, &["name", "driver", "label"])?;
        let mut networks = context.networks()?.list()?;
        networks.retain(|network| {
            filters.any("name", |part| network.name.contains(part))
                && filters.any("driver", |driver| network.driver == driver)
                && filters.labels(&network.labels)
        });
        if self.quiet {
            let mut out = Out::new();
            for network in &networks {
                out.line(&network.name)?;
            }
            out.flush()?;
            return Ok(Exit::SUCCESS);
        }
        print_rows(self.format.format, &networks, |networks| {
            let mut table = Table::new(["NAME", "DRIVER", "SUBNET", "GATEWAY", "INTERFACE", "INSTANCES"])
                .right("INSTANCES");
            for network in networks {
                let none = || "-".to_owned();
                // Only bridges have addresses and members of their own.
                let members = network.subnet.map_or_else(none, |_| network.leases.len().to_string());
                table.row([
                    network.name.clone(),
                    network.driver.clone(),
                    network.subnet.map_or_else(none, |subnet| subnet.to_string()),
                    network.gateway.map_or_else(none, |gateway| gateway.to_string()),
                    if network.interface.is_empty() { none() } else { network.interface.clone() },
                    members,
                ]);
            }
            table
        })?;
        Ok(Exit::SUCCESS)
    }
}
