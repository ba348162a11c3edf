//! `--publish`, `--publish-all` and `--expose`.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use kiln_contract::{Protocol, PublishSpec};

use super::{ImageSettings, ResolveError, Result};

const PUBLISH: &str = "--publish";

/// All published ports: those of `--publish`, and with `--publish-all` every port that the image or `--expose`
/// names, at a port that the host chooses.
pub(crate) fn ports(
    image: &ImageSettings,
    publish: &[String],
    all: bool,
    expose: &[String],
) -> Result<Vec<PublishSpec>> {
    let mut ports = Vec::new();
    for text in publish {
        ports.extend(parse(text)?);
    }
    let exposed = expose.iter().map(String::as_str).chain(image.exposed_ports.keys().map(String::as_str));
    for text in exposed {
        let (container, protocol) =
            parse_range_with_protocol(text).map_err(|why| ResolveError::value("--expose", text, why))?;
        for container_port in container {
            let there = |p: &PublishSpec| p.container_port == container_port && p.protocol == protocol;
            if all && !ports.iter().any(there) {
                ports.push(PublishSpec {
                    host_address: None,
                    host_port: 0,
                    host_port_last: None,
                    container_port,
                    protocol,
                });
            }
        }
    }
    Ok(ports)
}

/// `[address:][host port or range:]container port or range[/protocol]`.
fn parse(text: &str) -> Result<Vec<PublishSpec>> {
    let bad = |why: String| ResolveError::value(PUBLISH, text, why);
    let (address, rest) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) =
                rest.split_once("]:").ok_or_else(|| bad("the IPv6 address is not closed by `]:`".into()))?;
            (Some(address), rest)
        }
        None => match text.rsplitn(3, ':').collect::<Vec<_>>()[..] {
            [container, host, address] => {
                (Some(address), &text[text.len() - container.len() - host.len() - 1..])
            }
            _ => (None, text),
        },
    };
    let host_address = match address {
        None | Some("") => None,
        Some(address) => {
            Some(address.parse::<IpAddr>().map_err(|_| bad(format!("`{address}` is not an IP address")))?)
        }
    };
    let (host, container) = match rest.split_once(':') {
        Some((host, container)) => (Some(host).filter(|host| !host.is_empty()), container),
        None => (None, rest),
    };
    let (container, protocol) = parse_range_with_protocol(container).map_err(bad)?;
    let host = host.map_or(Ok(0..=0), |host| parse_range(host, 0)).map_err(bad)?;
    if *host.start() == 0 && *host.end() != 0 {
        return Err(bad("0 lets the host choose, and begins no range".into()));
    }
    let publish = |host_port, host_port_last, container_port| PublishSpec {
        host_address,
        host_port,
        host_port_last,
        container_port,
        protocol,
    };
    let (of_host, of_container) = (host.len(), container.len());
    match (of_host, of_container) {
        // As Docker: whichever of them is free.
        (2.., 1) => Ok(vec![publish(*host.start(), Some(*host.end()), *container.start())]),
        _ if *host.start() == 0 => {
            Ok(container.map(|container_port| publish(0, None, container_port)).collect())
        }
        _ if of_host == of_container => {
            Ok(host.zip(container).map(|(host, container)| publish(host, None, container)).collect())
        }
        _ => Err(bad(format!("{of_host} ports of the host for {of_container} of the container"))),
    }
}

/// `80` or `80/udp`: what `kiln port` takes.
pub(crate) fn parse_container_port(text: &str) -> std::result::Result<(u16, Protocol), String> {
    match parse_range_with_protocol(text)? {
        (ports, protocol) if ports.len() == 1 => Ok((*ports.start(), protocol)),
        _ => Err(format!("`{text}` is more than one port")),
    }
}

fn parse_range_with_protocol(text: &str) -> std::result::Result<(RangeInclusive<u16>, Protocol), String> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Err(format!("`{protocol}` is not a protocol that can be published (tcp, udp)")),
    };
    Ok((parse_range(ports, 1)?, protocol))
}

fn parse_range(text: &str, lowest: u16) -> std::result::Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let one = |text: &str| {
        let port = text
            .parse::<u16>()
            .ok()
            .filter(|port| *port >= lowest && text.bytes().all(|b| b.is_ascii_digit()));
        port.ok_or_else(|| format!("`{text}` is not a port ({lowest} to 65535)"))
    };
    let (first, last) = (one(first)?, one(last)?);
    if first > last { Err(format!("the range {first}-{last} runs backwards")) } else { Ok(first..=last) }
}

/// Published ports as tables show them: `0.0.0.0:8080->80/tcp, 9000/udp`.
pub(crate) fn show_ports(ports: &[PublishSpec]) -> String {
    ports.iter().map(show_port).collect::<Vec<_>>().join(", ")
}

fn show_port(port: &PublishSpec) -> String {
    let inside = format!("{}/{}", port.container_port, port.protocol);
    if port.host_port == 0 { inside } else { format!("{}->{inside}", host_side(port)) }
}

/// `0.0.0.0:8080`, `[::1]:8080`; `0.0.0.0:8000-8010` if one of these is still to be taken.
pub(crate) fn host_side(port: &PublishSpec) -> String {
    let ports = match port.host_port_last {
        None => port.host_port.to_string(),
        Some(last) => format!("{}-{last}", port.host_port),
    };
    match port.host_address {
        None => format!("0.0.0.0:{ports}"),
        Some(IpAddr::V4(address)) => format!("{address}:{ports}"),
        Some(IpAddr::V6(address)) => format!("[{address}]:{ports}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports_read_as_docker_reads_them() {
        let table = [
            ("80", "80/tcp"),
            ("8080:80", "0.0.0.0:8080->80/tcp"),
            ("5353:53/udp", "0.0.0.0:5353->53/udp"),
            ("53/UDP", "53/udp"),
            (":80", "80/tcp"),
            ("127.0.0.1:8080:80", "127.0.0.1:8080->80/tcp"),
            ("127.0.0.1::80", "80/tcp"),
            ("[::1]:8080:80", "[::1]:8080->80/tcp"),
            ("[::1]::80", "80/tcp"),
            ("::8080:80", "[::]:8080->80/tcp"),
            ("8000-8002:80-82", "0.0.0.0:8000->80/tcp, 0.0.0.0:8001->81/tcp, 0.0.0.0:8002->82/tcp"),
            ("90-91", "90/tcp, 91/tcp"),
            ("8000-8010:80", "0.0.0.0:8000-8010->80/tcp"),
            ("[::1]:8000-8010:80/udp", "[::1]:8000-8010->80/udp"),
            ("8000-8000:80", "0.0.0.0:8000->80/tcp"),
            ("0:80-81", "80/tcp, 81/tcp"),
            ("0:80", "80/tcp"),
        ];
        for (text, expected) in table {
            let expected = if text == "::8080:80" { None } else { Some(expected) };
            match (parse(text), expected) {
                (Ok(ports), Some(expected)) => assert_eq!(show_ports(&ports), expected, "{text}"),
                (Err(_), None) => {}
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
        let loopback = parse("127.0.0.1::80").unwrap();
        assert_eq!(loopback[0].host_address, Some("127.0.0.1".parse().unwrap()));
        for text in [
            "",
            "x",
            "80:",
            "0",
            "65536",
            "80/sctp",
            "8000-8010:80-81",
            "8000:80-81",
            "0-10:80",
            "82-80",
            "1.2.3:80:80",
            "[::1:80",
            "+80",
            "80:-1",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn publish_all_takes_exposed_ports_that_are_not_published_already() {
        let image: ImageSettings =
            serde_json::from_str(r#"{"ExposedPorts":{"80/tcp":{},"53/udp":{}}}"#).unwrap();
        let own = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let got = ports(&image, &own(&["8080:80"]), true, &own(&["90-91"])).unwrap();
        assert_eq!(show_ports(&got), "0.0.0.0:8080->80/tcp, 90/tcp, 91/tcp, 53/udp");
        let got = ports(&image, &own(&["8080:80"]), false, &own(&["90"])).unwrap();
        assert_eq!(show_ports(&got), "0.0.0.0:8080->80/tcp");
        assert!(ports(&image, &[], false, &own(&["x"])).is_err());
    }
}
