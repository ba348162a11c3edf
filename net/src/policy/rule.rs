//! One rule, as users write it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use thiserror::Error;

use super::closed::canonical;

/// Ports of TCP and UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ports {
    /// All, and echo requests too.
    All,
    /// From the first to the last.
    These(u16, u16),
}

/// One thing that may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub(super) what: What,
    pub(super) ports: Ports,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    Any,
    HostLoopback,
    Network(IpNet),
    /// Lower case, without a dot at its end.
    Name(String),
    /// Every name that ends in a dot and this.
    Below(String),
}

/// A rule that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{rule}` is no rule of what may be reached: {reason}")]
pub struct RuleError {
    /// What was given.
    pub rule: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Ports {
    pub(crate) fn contain(self, port: Option<u16>) -> bool {
        match (self, port) {
            (Self::All, _) => true,
            (Self::These(first, last), Some(port)) => (first..=last).contains(&port),
            (Self::These(..), None) => false,
        }
    }
}

impl Rule {
    /// Whether it is about this name, which is in lower case and has no dot at its end.
    pub(super) fn matches(&self, name: &str) -> bool {
        match &self.what {
            What::Name(own) => own == name,
            What::Below(domain) => name
                .strip_suffix(domain.as_str())
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|rest| !rest.is_empty()),
            _ => false,
        }
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(rule: &str) -> Result<Self, RuleError> {
        let wrong = |reason: String| RuleError { rule: rule.to_owned(), reason };
        let (what, ports) = split_ports(rule).map_err(wrong)?;
        let what = parse_what(what).map_err(wrong)?;
        if what == What::Any && ports != Ports::All {
            return Err(wrong(
                "`any` has no port; `0.0.0.0/0:PORT` and `[::/0]:PORT` open one everywhere".into(),
            ));
        }
        Ok(Self { what, ports })
    }
}

/// Splits `WHAT[:PORT[-PORT]]`; IPv6 with a port stands in brackets.
fn split_ports(rule: &str) -> Result<(&str, Ports), String> {
    if let Some(rest) = rule.strip_prefix('[') {
        let (what, ports) = rest.split_once(']').ok_or("a bracket is not closed")?;
        if !what.contains(':') {
            return Err("only IPv6 addresses stand in brackets".into());
        }
        return match ports.strip_prefix(':') {
            Some(ports) => Ok((what, parse_ports(ports)?)),
            None if ports.is_empty() => Ok((what, Ports::All)),
            None => Err("only `:PORT` may follow the bracket".into()),
        };
    }
    match rule.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Ok((rule, Ports::All)),
        Some((what, ports)) => Ok((what, parse_ports(ports)?)),
        None => Ok((rule, Ports::All)),
    }
}

fn parse_ports(text: &str) -> Result<Ports, String> {
    let port = |text: &str| match text.parse() {
        Ok(port) if port > 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err(format!("`{text}` is no port (1 to 65535, or two of them as FIRST-LAST)")),
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    if first > last {
        return Err(format!("the ports {first} to {last} are none"));
    }
    Ok(Ports::These(first, last))
}

fn parse_what(text: &str) -> Result<What, String> {
    match text {
        "" => return Err("it names nothing".into()),
        "any" => return Ok(What::Any),
        "host-loopback" => return Ok(What::HostLoopback),
        "*" => return Err("everything is `any`".into()),
        _ => {}
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        let address = canonical(address);
        if address.is_unspecified() {
            return Err(
                "it is no destination; the host's loopback is `host-loopback`, everything is `any`".into()
            );
        }
        return Ok(What::Network(address.into()));
    }
    if text.contains('/') {
        let network: IpNet = text
            .parse()
            .map_err(|_| "it is neither an address nor a network such as 10.0.0.0/8".to_owned())?;
        if network.addr() != network.network() {
            return Err(format!("the network is {}", network.trunc()));
        }
        if let IpAddr::V6(address) = network.addr()
            && address.to_ipv4_mapped().is_some()
        {
            return Err("write IPv4 networks as IPv4".into());
        }
        return Ok(What::Network(network));
    }
    let (below, name) = match text.strip_prefix("*.") {
        Some(domain) => (true, domain),
        None => (false, text),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    check_name(&name)?;
    Ok(if below { What::Below(name) } else { What::Name(name) })
}

fn check_name(name: &str) -> Result<(), String> {
    if name.contains('*') {
        return Err("`*` can only stand for the first label and what is before it: `*.example.org`".into());
    }
    if !name.is_ascii() {
        return Err("names outside of ASCII are written as in the DNS: `xn--…`".into());
    }
    if name.contains(':') {
        return Err("it is no IPv6 address".into());
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err("it is neither an address nor a name".into());
    }
    // No top-level domain is a number; whatever ends in one was meant to be an address.
    if name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err("it is no IPv4 address".into());
    }
    Ok(())
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = match self.ports {
            Ports::All => String::new(),
            Ports::These(first, last) if first == last => format!(":{first}"),
            Ports::These(first, last) => format!(":{first}-{last}"),
        };
        match &self.what {
            What::Any => f.write_str("any"),
            What::HostLoopback => write!(f, "host-loopback{ports}"),
            What::Network(network) => {
                let whole = network.prefix_len() == network.max_prefix_len();
                let text = if whole { network.addr().to_string() } else { network.to_string() };
                match network {
                    IpNet::V6(_) if !ports.is_empty() => write!(f, "[{text}]{ports}"),
                    _ => write!(f, "{text}{ports}"),
                }
            }
            What::Name(name) => write!(f, "{name}{ports}"),
            What::Below(domain) => write!(f, "*.{domain}{ports}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_as_they_are_written() {
        for (rule, shown) in [
            ("any", "any"),
            ("host-loopback", "host-loopback"),
            ("host-loopback:5432", "host-loopback:5432"),
            ("Example.ORG.", "example.org"),
            ("*.example.org:443", "*.example.org:443"),
            ("registry:5000-5010", "registry:5000-5010"),
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.1:80", "192.0.2.1:80"),
            ("10.0.0.0/8:22", "10.0.0.0/8:22"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]:443", "[2001:db8::1]:443"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("[2001:db8::/32]:1-65535", "[2001:db8::/32]:1-65535"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
        ] {
            let parsed: Rule = rule.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(parsed.to_string(), shown, "{rule}");
            assert_eq!(shown.parse(), Ok(parsed), "{shown}");
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_reason() {
        for (rule, reason) in [
            ("", "names nothing"),
            (":80", "names nothing"),
            ("*", "everything is `any`"),
            ("any:80", "`any` has no port"),
            ("a b", "neither an address nor a name"),
            ("a..b", "neither an address nor a name"),
            ("*.*.org", "`*` can only stand for the first label"),
            ("a.*.org", "`*` can only stand for the first label"),
            ("bücher.example", "xn--"),
            ("1.2.3", "no IPv4 address"),
            ("1.2.3.4.5", "no IPv4 address"),
            ("256.0.0.1", "no IPv4 address"),
            ("10.0.0.1/8", "the network is 10.0.0.0/8"),
            ("10.0.0.0/33", "such as 10.0.0.0/8"),
            ("example.org/24", "such as 10.0.0.0/8"),
            ("::ffff:10.0.0.0/104", "IPv4 networks as IPv4"),
            ("example.org:0", "`0` is no port"),
            ("example.org:65536", "`65536` is no port"),
            ("example.org:+80", "`+80` is no port"),
            ("example.org:http", "`http` is no port"),
            ("example.org:", "`` is no port"),
            ("example.org:90-80", "90 to 80 are none"),
            ("[::1", "bracket is not closed"),
            ("[::1]80", "only `:PORT` may follow"),
            ("[example.org]:80", "only IPv6 addresses stand in brackets"),
            ("2001:db8::g", "no IPv6 address"),
            ("0.0.0.0", "no destination"),
            ("::", "no destination"),
            ("https://example.org", "`//example.org` is no port"),
            (&"x".repeat(254), "neither"),
        ] {
            let error = rule.parse::<Rule>().unwrap_err();
            assert!(error.reason.contains(reason), "{error}");
            assert!(error.to_string().starts_with(&format!("`{rule}` is no rule")), "{error}");
        }
    }
}
