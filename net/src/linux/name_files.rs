//! `/etc/hosts` and `/etc/resolv.conf` of a container.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;

use kiln_contract::{NetworkRequest, NetworkSpec};

use crate::NetError;
use crate::dns::{host_name_servers, parse_name_servers};

const LOCALHOST: &str = "127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
";

/// `hosts(5)`: localhost, the container under its own names, and `--add-host`. `gateway` is what `host-gateway` means.
pub(super) fn hosts(
    request: &NetworkRequest,
    address: Option<IpAddr>,
    gateway: Option<IpAddr>,
) -> Result<String, NetError> {
    let mut text = String::from(LOCALHOST);
    if let Some(address) = address {
        let _ = match (request.hostname.as_str(), request.name.as_str()) {
            ("", name) => writeln!(text, "{address}\t{name}"),
            (hostname, name) if name.is_empty() || name == hostname => {
                writeln!(text, "{address}\t{hostname}")
            }
            (hostname, name) => writeln!(text, "{address}\t{hostname} {name}"),
        };
    }
    text.push_str(&added(request, gateway)?);
    Ok(text)
}

/// The lines of `--add-host`.
pub(super) fn added(request: &NetworkRequest, gateway: Option<IpAddr>) -> Result<String, NetError> {
    let mut text = String::new();
    for entry in &request.network.add_hosts {
        let invalid = |why: &str| NetError::Invalid(format!("the host `{entry}` cannot be added: {why}"));
        let (name, address) =
            entry.split_once([':', '=']).ok_or_else(|| invalid("it must be `name:address`"))?;
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(invalid("its name is empty or has spaces"));
        }
        let address = match address {
            "host-gateway" => gateway.ok_or_else(|| invalid("this network has no gateway to the host"))?,
            text => text
                .trim_start_matches('[')
                .trim_end_matches(']')
                .parse()
                .map_err(|_| invalid("its address is neither an IP address nor `host-gateway`"))?,
        };
        let _ = writeln!(text, "{address}\t{name}");
    }
    Ok(text)
}

/// Whether `--add-host` asks for the way to the host.
pub(super) fn wants_gateway(spec: &NetworkSpec) -> bool {
    spec.add_hosts.iter().any(|entry| entry.ends_with(":host-gateway") || entry.ends_with("=host-gateway"))
}

/// `resolv.conf(5)` with these name servers, and search domains and options as asked for, else as the host has them.
pub(super) fn resolv_conf(spec: &NetworkSpec, name_servers: &[IpAddr]) -> String {
    render(spec, name_servers, &fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

fn render(spec: &NetworkSpec, name_servers: &[IpAddr], host: &str) -> String {
    let of_host = |keyword: &str| -> Vec<String> {
        let line =
            host.lines().rev().find_map(|line| line.trim().strip_prefix(keyword)?.strip_prefix([' ', '\t']));
        line.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    };
    let or_host = |asked: &[String], keyword: &str| match asked {
        [] => of_host(keyword),
        // `--dns-search .` is none.
        [dot] if dot == "." => Vec::new(),
        asked => asked.to_vec(),
    };
    let mut text = String::new();
    for server in name_servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, values) in
        [("search", or_host(&spec.dns_search, "search")), ("options", or_host(&spec.dns_options, "options"))]
    {
        if !values.is_empty() {
            let _ = writeln!(text, "{keyword} {}", values.join(" "));
        }
    }
    text
}

/// The host's name servers that can be asked from elsewhere. A resolver on loopback knows better ones: where
/// systemd-resolved is at work, it writes them down.
pub(super) fn reachable_name_servers() -> Vec<IpAddr> {
    let reachable = |servers: Vec<IpAddr>| -> Vec<IpAddr> {
        servers.into_iter().filter(|server| !server.is_loopback()).collect()
    };
    let servers = reachable(host_name_servers());
    if servers.is_empty() {
        let text = fs::read_to_string("/run/systemd/resolve/resolv.conf").unwrap_or_default();
        return reachable(parse_name_servers(&text));
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_contract::InstanceId;

    fn request(add_hosts: &[&str]) -> NetworkRequest {
        NetworkRequest {
            id: InstanceId::random(),
            name: "web".into(),
            hostname: "box".into(),
            network: NetworkSpec {
                add_hosts: add_hosts.iter().map(|entry| (*entry).to_owned()).collect(),
                ..NetworkSpec::default()
            },
            ports: Vec::new(),
            namespace: None,
        }
    }

    #[test]
    fn added_hosts_are_names_with_addresses() {
        let gateway = Some("10.1.0.1".parse().unwrap());
        let table: [(&str, Option<&str>); 8] = [
            ("a:192.0.2.1", Some("192.0.2.1\ta\n")),
            ("a=192.0.2.1", Some("192.0.2.1\ta\n")),
            ("a:fd00::1", Some("fd00::1\ta\n")),
            ("a:[fd00::1]", Some("fd00::1\ta\n")),
            ("host:host-gateway", Some("10.1.0.1\thost\n")),
            ("a", None),
            (":192.0.2.1", None),
            ("a:b", None),
        ];
        for (entry, line) in table {
            assert_eq!(added(&request(&[entry]), gateway).ok().as_deref(), line, "{entry}");
        }
        assert!(added(&request(&["host:host-gateway"]), None).is_err());
    }

    #[test]
    fn a_container_finds_itself_by_both_names() {
        let text = hosts(&request(&[]), Some("10.1.0.2".parse().unwrap()), None).unwrap();
        assert!(
            text.ends_with("10.1.0.2\tbox web\n") && text.starts_with("127.0.0.1\tlocalhost\n"),
            "{text}"
        );
    }

    #[test]
    fn what_was_not_asked_for_is_as_the_host_has_it() {
        let host = "# c\nnameserver 192.0.2.53\nnameserver fe80::1%eth0\nsearch a.example b.example\noptions edns0\n";
        assert_eq!(parse_name_servers(host), ["192.0.2.53".parse::<IpAddr>().unwrap()]);
        let server = ["127.0.0.11".parse().unwrap()];
        let mut spec = NetworkSpec::default();
        let text = "nameserver 127.0.0.11\nsearch a.example b.example\noptions edns0\n";
        assert_eq!(render(&spec, &server, host), text);
        spec.dns_search = vec![".".into()];
        spec.dns_options = vec!["ndots:2".into(), "rotate".into()];
        assert_eq!(render(&spec, &server, host), "nameserver 127.0.0.11\noptions ndots:2 rotate\n");
    }
}
