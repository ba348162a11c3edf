//! `--network` and what belongs to it.

use std::net::IpAddr;

use kiln_contract::NetworkSpec;

use super::{ResolveError, Result};

/// What was typed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Typed<'a> {
    pub(crate) network: Option<&'a str>,
    pub(crate) aliases: &'a [String],
    pub(crate) address: Option<IpAddr>,
    pub(crate) add_hosts: &'a [String],
    pub(crate) dns: &'a [IpAddr],
    pub(crate) dns_search: &'a [String],
    pub(crate) dns_options: &'a [String],
}

/// How the workload is connected.
pub(crate) fn network(typed: Typed<'_>) -> Result<NetworkSpec> {
    let mode = match typed.network {
        None | Some("default") => "default",
        // Docker's name for its default bridge.
        Some("bridge") => "kiln",
        Some("") => return Err(ResolveError::value("--network", "", "it is empty")),
        Some("container:") => {
            return Err(ResolveError::value("--network", "container:", "it needs the name of a container"));
        }
        Some(mode) => mode,
    };
    let isolated = mode == "none" || mode == "host" || mode.starts_with("container:");
    if isolated && typed.address.is_some() {
        return Err(ResolveError::Conflict(format!("--ip needs a bridge network, and --network is {mode}")));
    }
    if isolated && !typed.aliases.is_empty() {
        return Err(ResolveError::Conflict(format!(
            "--network-alias needs a bridge network, and --network is {mode}"
        )));
    }
    Ok(NetworkSpec {
        mode: mode.to_owned(),
        aliases: typed.aliases.to_vec(),
        address: typed.address,
        add_hosts: typed.add_hosts.iter().map(|text| add_host(text)).collect::<Result<_>>()?,
        dns: typed.dns.to_vec(),
        dns_search: typed.dns_search.to_vec(),
        dns_options: typed.dns_options.to_vec(),
        allow: Vec::new(),
    })
}

/// `name:address` or `name=address`, in the first form.
fn add_host(text: &str) -> Result<String> {
    let bad = |why: &str| ResolveError::value("--add-host", text, why);
    let (name, address) = text
        .split_once('=')
        .or_else(|| text.split_once(':'))
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(|| bad("it is name:address"))?;
    let address = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    if address != "host-gateway" && address.parse::<IpAddr>().is_err() {
        return Err(bad("the part after the name is neither an IP address nor host-gateway"));
    }
    Ok(format!("{name}:{address}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_read_as_docker_reads_them() {
        let table =
            [(None, "default"), (Some("bridge"), "kiln"), (Some("host"), "host"), (Some("mine"), "mine")];
        for (typed, mode) in table {
            assert_eq!(network(Typed { network: typed, ..Default::default() }).unwrap().mode, mode);
        }
        let address = Some("10.0.0.9".parse().unwrap());
        for mode in ["none", "host", "container:x"] {
            assert!(network(Typed { network: Some(mode), address, ..Default::default() }).is_err(), "{mode}");
        }
        for mode in ["", "container:"] {
            assert!(network(Typed { network: Some(mode), ..Default::default() }).is_err(), "{mode}");
        }
    }

    #[test]
    fn hosts_take_both_separators_and_the_gateway() {
        let table = [
            ("db:10.0.0.2", Some("db:10.0.0.2")),
            ("db=10.0.0.2", Some("db:10.0.0.2")),
            ("db:::1", Some("db:::1")),
            ("db=[::1]", Some("db:::1")),
            ("up:host-gateway", Some("up:host-gateway")),
            ("db", None),
            (":10.0.0.2", None),
            ("db:nowhere", None),
        ];
        for (text, expected) in table {
            assert_eq!(add_host(text).ok().as_deref(), expected, "{text}");
        }
    }
}
