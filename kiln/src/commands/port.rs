//! `kiln port`.

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::RuntimeBackend;

use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::Exit;
use crate::output::{Format, FormatArgs, Out, print_rows};
use crate::resolve::{ResolveError, host_side, parse_container_port};

/// Show where the ports of an instance are published
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or id
    #[arg(add = ArgValueCompleter::new(complete::instances))]
    instance: String,
    /// Only this port of the instance; its host side alone is printed
    #[arg(value_name = "PORT[/PROTOCOL]")]
    port: Option<String>,
    #[command(flatten)]
    format: FormatArgs,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let wanted = self
            .port
            .as_deref()
            .map(|text| parse_container_port(text).map_err(|why| ResolveError::value("PORT", text, why)));
        let wanted = wanted.transpose()?;
        let instances = context.instances()?;
        let record = context.instance(&instances, &self.instance)?;
        let mut ports = instances.ports(&record.id)?;
        if let Some((number, protocol)) = wanted {
            ports.retain(|port| port.container_port == number && port.protocol == protocol);
            if ports.is_empty() {
                return Err(CliError::failed(format!(
                    "{number}/{protocol} of {} is not published",
                    record.spec.name
                )));
            }
        }
        if self.format.format != Format::Table {
            print_rows(self.format.format, &ports, |_| crate::output::Table::default())?;
            return Ok(Exit::SUCCESS);
        }
        let mut out = Out::new();
        for port in &ports {
            match wanted {
                Some(_) => out.line(host_side(port))?,
                None => {
                    out.line(format!("{}/{} -> {}", port.container_port, port.protocol, host_side(port)))?;
                }
            }
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
