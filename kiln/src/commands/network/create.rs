//! `kiln network create`.

use std::net::IpAddr;

use ipnet::IpNet;
use kiln_net::NetworkOptions;

use crate::context::Context;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::Out;
use crate::resolve::{check_name, label_map};

/// Make a network, and print its name
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name
    name: String,
    /// Its addresses (10.90.0.0/24); a free range otherwise
    #[arg(long, value_name = "SUBNET", value_parser = subnet)]
    subnet: Option<IpNet>,
    /// The host's address on it; the first of the range otherwise
    #[arg(long, value_name = "ADDRESS")]
    gateway: Option<IpAddr>,
    /// Nothing outside of it can be reached
    #[arg(long)]
    internal: bool,
    /// Add a label
    #[arg(short, long, value_name = "NAME=VALUE")]
    label: Vec<String>,
    /// What makes it: a bridge, for containers and machines; or usernet, for machines only, which takes no rights
    #[arg(short, long, value_name = "DRIVER", default_value = "bridge", value_parser = ["bridge", "usernet"])]
    driver: String,
}

fn subnet(text: &str) -> std::result::Result<IpNet, String> {
    text.parse().map_err(|_| {
        format!("`{text}` is not a subnet (an address and the length of its prefix: 10.90.0.0/24)")
    })
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        check_name("NAME", &self.name)?;
        let options = NetworkOptions {
            subnet: self.subnet,
            gateway: self.gateway,
            internal: self.internal,
            usernet: self.driver == "usernet",
            labels: label_map("--label", &self.label)?,
        };
        let network = context.networks()?.create(&self.name, &options)?;
        let mut out = Out::new();
        out.line(network.name)?;
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}
